"""Metrics of a picture against the true one: L1, Charbonnier, PSNR, SSIM, CIEDE2000, colorfulness.

All compare 8-bit pictures, what a user gets and a file holds. A state keeps a few whole numbers per picture; merging
puts pictures together and :func:`math.fsum` adds them up at the end, correctly rounded, so the order of merging changes
no digit. L1, Charbonnier, MSE, PSNR and colorfulness are counted in whole numbers from the start: the same to the last
digit whatever the batches, padding, devices and hosts. The SSIM of a window and the CIEDE2000 of a pixel are float32,
rounded to 2**-17 and 2**-10 before they are added up exactly: another batch shape or device may round a few of them the
other way, which moves the mean by about 1e-7.

Where an average over pictures and one over all pixels differ, both are given (`PSNR`, `PSNR_of_all_pixels`).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.layers.color import ciede2000, rgb_to_lab
from jax_densevit.metrics.metric import Metric, State
from jax_densevit.metrics.sums import exact_mean, exact_sum, no_pictures, sums, together

WINDOW, SIGMA = 11, 1.5  # of SSIM
_BLOCK = 64  # windows that one matrix product slides over


class PixelErrors:
    """L1, Charbonnier, mean square error and PSNR of RGB values in [0, 1]; exact.

    Args:
      epsilon: of the Charbonnier distance `sqrt(d^2 + epsilon^2)`.
    """

    def __init__(self, epsilon: float = 1e-3):
        self.epsilon = epsilon

    def empty(self) -> State:
        """`histogram` int64 [256]: channel values by absolute difference; per picture `values`, `squares_*` int64."""
        return {"histogram": np.zeros(256, np.int64), **no_pictures("values", "squares_high", "squares_low")}

    def measure(self, truth: jax.Array, picture: jax.Array, mask: jax.Array | None = None, size: Any = None) -> State:
        """Counts of one batch; runs inside `jit`.

        Args:
          truth, picture: uint8 `[B, H, W, 3]`.
          mask: bool `[B]`; examples where it is False count nothing. None counts all.
          size: (height, width), traced or not, of pictures that fill only the top left corner of their arrays.
        """
        inside, pixels = _area(truth, mask, size)
        difference = jnp.abs(truth.astype(jnp.int32) - picture.astype(jnp.int32))
        bins = jnp.where(inside[..., None], difference, 256).reshape(len(truth), -1)
        # Per example first: a batch sharded over devices is counted where it lies.
        counts = jax.vmap(lambda b: jnp.zeros(257, jnp.int32).at[b].add(1))(bins)
        squares = exact_sum("squares", jnp.where(inside, (difference**2).sum(-1), 0))
        return {"histogram": counts[:, :256].sum(0), "values": pixels * truth.shape[-1], **squares}

    def merge(self, a: State, b: State) -> State:
        """The pictures of both; histograms are added."""
        histogram = np.asarray(a["histogram"], np.int64) + np.asarray(b["histogram"], np.int64)
        rest = [{name: rows for name, rows in state.items() if name != "histogram"} for state in (a, b)]
        return {"histogram": histogram, **together(*rest, "values")}

    def compute(self, state: State) -> dict[str, Any]:
        """`L1`, `charbonnier`, `MSE` over all pixels, `PSNR` (dB, mean over pictures), `PSNR_of_all_pixels`.

        Pictures without any error have no PSNR: they are counted as `identical` and left out of its mean.
        """
        histogram = state["histogram"]
        count, level = int(histogram.sum()), np.arange(256) / 255

        def mean(of_level: np.ndarray) -> float | None:
            return math.fsum(histogram * of_level) / count if count else None

        error = sums("squares", state) / 255**2 / state["values"]
        return {
            "L1": mean(level),
            "charbonnier": mean(np.sqrt(level**2 + self.epsilon**2)),
            "MSE": mean(level**2),
            "PSNR": exact_mean(-10 * np.log10(error[error > 0])),
            "PSNR_of_all_pixels": -10 * math.log10(mean(level**2)) if histogram[1:].any() else None,
            "identical": int((error == 0).sum()),
            "pictures": len(error),
        }


class SSIM:
    """Structural similarity (Wang et al. 2004): 11x11 Gaussian window of sigma 1.5, population covariances, only
    windows that lie wholly inside ("valid"), per channel of RGB, K1 = 0.01, K2 = 0.03: the numbers of `tf.image.ssim`.
    """

    _UNIT = 2**-17

    def empty(self) -> State:
        """Per picture: `windows` and the sum of SSIM over them in units of 2**-17, `sum_*`, int64."""
        return no_pictures("windows", "sum_high", "sum_low", "pictures")

    def measure(self, truth: jax.Array, picture: jax.Array, mask: jax.Array | None = None, size: Any = None) -> State:
        """Sums of one batch; arguments as in :meth:`PixelErrors.measure`."""
        height, width = truth.shape[1:3] if size is None else size
        border = WINDOW - 1
        maps = ssim_map(truth, picture)
        inside, windows = _area(maps, mask, (height - border, width - border))
        values = jnp.where(inside, jnp.round(maps / self._UNIT).astype(jnp.int32), 0)
        pictures = jnp.ones(len(truth), jnp.int32) if mask is None else mask.astype(jnp.int32)
        return {"windows": windows, **exact_sum("sum", values), "pictures": pictures}

    def merge(self, a: State, b: State) -> State:
        """The pictures of both."""
        return together(a, b, "pictures")

    def compute(self, state: State) -> dict[str, Any]:
        """`SSIM`, the mean over pictures; those smaller than the window have none (`too_small_for_SSIM`)."""
        some = state["windows"] > 0
        value = sums("sum", state)[some] * self._UNIT / state["windows"][some]
        return {"SSIM": exact_mean(value), "too_small_for_SSIM": int((~some).sum())}


class CIEDE2000:
    """The color difference CIEDE2000, per pixel, as a mean over each picture and then over pictures."""

    _UNIT = 2**-10

    def empty(self) -> State:
        """Per picture: `pixels` and the sum of differences over them in units of 2**-10, `sum_*`, int64."""
        return no_pictures("pixels", "sum_high", "sum_low")

    def measure(self, truth: jax.Array, picture: jax.Array, mask: jax.Array | None = None, size: Any = None) -> State:
        """Sums of one batch; arguments as in :meth:`PixelErrors.measure`."""
        inside, pixels = _area(truth, mask, size)
        difference = ciede2000(*(rgb_to_lab(image.astype(jnp.float32) / 255) for image in (truth, picture)))
        values = jnp.where(inside, jnp.round(difference / self._UNIT).astype(jnp.int32), 0)
        return {"pixels": pixels, **exact_sum("sum", values)}

    def merge(self, a: State, b: State) -> State:
        """The pictures of both."""
        return together(a, b, "pixels")

    def compute(self, state: State) -> dict[str, Any]:
        """`CIEDE2000`: 0 is the same color, 1 about the least difference that is seen, 100 black against white."""
        return {"CIEDE2000": exact_mean(sums("sum", state) * self._UNIT / state["pixels"])}


class Colorfulness:
    """Colorfulness (Hasler and Suesstrunk 2003), `sqrt(var rg + var yb) + 0.3 sqrt(mean rg^2 + mean yb^2)` with signed
    `rg = R - G`, `yb = (R + G) / 2 - B` on 0..255; 0 is gray, 15 slightly and 60 quite colorful. Exact.
    """

    _SUMS = tuple(f"{whose}_{what}" for whose in ("truth", "picture") for what in ("rg", "yb", "rg2", "yb2"))

    def empty(self) -> State:
        """Per picture: `pixels` and for both pictures the sums of `rg`, `2 yb` and of their squares, int64."""
        return no_pictures("pixels", *(f"{name}_{part}" for name in self._SUMS for part in ("high", "low")))

    def measure(self, truth: jax.Array, picture: jax.Array, mask: jax.Array | None = None, size: Any = None) -> State:
        """Sums of one batch; arguments as in :meth:`PixelErrors.measure`."""
        inside, pixels = _area(truth, mask, size)
        state = {"pixels": pixels}
        for whose, image in (("truth", truth), ("picture", picture)):
            red, green, blue = jnp.moveaxis(jnp.where(inside[..., None], image, 0).astype(jnp.int32), -1, 0)
            rg, yb = red - green, red + green - 2 * blue
            for what, values in (("rg", rg), ("yb", yb), ("rg2", rg**2), ("yb2", yb**2)):
                state |= exact_sum(f"{whose}_{what}", values)
        return state

    def merge(self, a: State, b: State) -> State:
        """The pictures of both."""
        return together(a, b, "pixels")

    def compute(self, state: State) -> dict[str, Any]:
        """Means over pictures: `colorfulness`, `true_colorfulness`, the signed `delta_colorfulness` between the two
        (negative: too pale) and `abs_delta_colorfulness`, of the difference without its sign.
        """
        found = {whose: self._of_pictures(state, whose) for whose in ("truth", "picture")}
        delta = found["picture"] - found["truth"]
        return {
            "colorfulness": exact_mean(found["picture"]),
            "true_colorfulness": exact_mean(found["truth"]),
            "delta_colorfulness": exact_mean(delta),
            "abs_delta_colorfulness": exact_mean(np.abs(delta)),
        }

    def _of_pictures(self, state: State, whose: str) -> np.ndarray:
        units = {"rg": 1, "yb": 2, "rg2": 1, "yb2": 4}
        return _colorfulness(*(sums(f"{whose}_{of}", state) / (unit * state["pixels"]) for of, unit in units.items()))


class PictureMetrics:
    """Several of the metrics above as one, their results side by side.

    Args:
      parts: metrics by name; all of those above by default.
    """

    def __init__(self, parts: Mapping[str, Metric] | None = None, epsilon: float = 1e-3):
        everything = {
            "pixels": PixelErrors(epsilon),
            "ssim": SSIM(),
            "ciede2000": CIEDE2000(),
            "colorfulness": Colorfulness(),
        }
        self.parts = everything if parts is None else dict(parts)

    def empty(self) -> State:
        """The states of the parts by name."""
        return {name: part.empty() for name, part in self.parts.items()}

    def measure(self, truth: jax.Array, picture: jax.Array, mask: jax.Array | None = None, size: Any = None) -> State:
        """What the parts measure of one batch; arguments as in :meth:`PixelErrors.measure`."""
        return {name: part.measure(truth, picture, mask, size) for name, part in self.parts.items()}

    def merge(self, a: State, b: State) -> State:
        """Part by part."""
        return {name: part.merge(a[name], b[name]) for name, part in self.parts.items()}

    def compute(self, state: State) -> dict[str, Any]:
        """The results of all parts in one dict."""
        return {key: value for name, part in self.parts.items() for key, value in part.compute(state[name]).items()}


def colorfulness(picture: np.ndarray) -> float:
    """The colorfulness of one picture, uint8 `[H, W, 3]`, on the host; see :class:`Colorfulness`."""
    red, green, blue = np.moveaxis(np.asarray(picture, np.float64), -1, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    return float(_colorfulness(rg.mean(), yb.mean(), (rg**2).mean(), (yb**2).mean()))


def _colorfulness(rg, yb, rg2, yb2):
    """From the means of rg, yb and their squares."""
    variance = np.maximum(rg2 - rg**2, 0) + np.maximum(yb2 - yb**2, 0)
    return np.sqrt(variance) + 0.3 * np.sqrt(rg**2 + yb**2)


def ssim_map(truth: jax.Array, picture: jax.Array) -> jax.Array:
    """SSIM of every window that lies wholly inside, the mean over channels: uint8 `[B, H, W, C]` x 2 to float32
    `[B, max(H - 10, 0), max(W - 10, 0)]`.
    """
    if min(truth.shape[1:3]) < WINDOW:
        return jnp.zeros((len(truth), *(max(side - WINDOW + 1, 0) for side in truth.shape[1:3])), jnp.float32)
    # Variances do not change when a constant is taken away, and of smaller numbers float32 keeps more digits.
    x, y = (image.astype(jnp.float32) - 127.5 for image in (truth, picture))
    mean_x, mean_y, square_x, square_y, product = _blur(jnp.stack([x, y, x * x, y * y, x * y]))
    var_x, var_y, covariance = square_x - mean_x**2, square_y - mean_y**2, product - mean_x * mean_y
    mean_x, mean_y = mean_x + 127.5, mean_y + 127.5
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return jnp.mean(luminance * (2 * covariance + c2) / (var_x + var_y + c2), -1)


def _blur(x: jax.Array) -> jax.Array:
    """Weighted means over all windows that lie wholly inside `[..., H, W, C]`.

    Products with a band matrix, by blocks: on a CPU half the time of adding up shifted copies, and one matrix unit's
    work elsewhere.
    """
    offsets = np.arange(WINDOW) - WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    for axis in (x.ndim - 3, x.ndim - 2):
        length = x.shape[axis] - WINDOW + 1
        block = min(length, _BLOCK)
        count = -(-length // block)
        band = np.zeros((block, block + WINDOW - 1), np.float32)
        for i in range(block):
            band[i, i : i + WINDOW] = weights / weights.sum()
        x = jnp.pad(x, [(0, count * block - length) if i == axis else (0, 0) for i in range(x.ndim)])
        starts = range(0, count * block, block)
        parts = jnp.stack([jax.lax.slice_in_dim(x, i, i + block + WINDOW - 1, axis=axis) for i in starts])
        x = jnp.tensordot(band, parts, axes=((1,), (axis + 1,)), precision=jax.lax.Precision.HIGHEST)
        x = jnp.moveaxis(x, (1, 0), (axis, axis + 1))  # blocks, and places in them, to where they belong
        x = x.reshape(*x.shape[:axis], count * block, *x.shape[axis + 2 :])
        x = jax.lax.slice_in_dim(x, 0, length, axis=axis)
    return x


def _area(images: jax.Array, mask: jax.Array | None, size: Any) -> tuple[jax.Array, jax.Array]:
    """bool `[B, H, W]` where pixels count, and int32 `[B]` how many they are; `size` may even be negative."""
    batch, room = images.shape[0], images.shape[1:3]
    height, width = room if size is None else size
    inside = (jnp.arange(room[0])[:, None] < height) & (jnp.arange(room[1]) < width)
    inside = jnp.broadcast_to(inside, (batch, *room))
    if mask is not None:
        inside &= mask[:, None, None]
    return inside, inside.sum((1, 2), dtype=jnp.int32)
