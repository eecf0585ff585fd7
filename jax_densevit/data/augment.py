"""Augmentation on the device: flips, right-angle rotations and photometric distortion of fixed-size uint8 batches.

Everything an example goes through is drawn from its own seed, so its result does not depend on the batch, the device or
the host it is in. Labels and other maps follow the image's geometry and are never interpolated.

The photometric distortion is that of SSD (Liu et al., ECCV 2016) as SETR and MMSegmentation use it, on uint8 with
OpenCV's integer arithmetic: every step clips and drops to whole numbers before the next one begins.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.data.source import MAPS
from jax_densevit.errors import UserError

Batch = dict[str, Any]
BRIGHTNESS = 32.0  # largest shift of the values 0..255
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18  # steps of two degrees, OpenCV's unit of hue: -18 .. 17
_GEOMETRIC = ("image", *MAPS)


def augment(
    batch: Batch, *, flip: float = 0.0, vertical_flip: float = 0.0, rotate90: bool = False, photometric: bool = False
) -> Batch:
    """Augments a batch; runs inside `jit`.

    Args:
      batch: "image" uint8 [B, H, W, 3], "seed" uint32 [B, 2]; "labels" and other maps [B, H, W] follow the image;
        "size" int32 [B, 2], the height and width before padding at the bottom and on the right, keeps distortion out of
        the padding, and padding where it is. Other entries pass through.
      flip, vertical_flip: the probability of a mirror image, left-right and upside-down.
      rotate90: turn by 0, 90, 180 or 270 degrees, each as likely.
      photometric: distort brightness, contrast, saturation and hue.

    Returns:
      The batch with those arrays replaced; "size", if it is there, with the sides of turned images swapped.

    Raises:
      UserError: `rotate90` for images that are not square.
    """
    batch = dict(batch)
    size = batch.get("size")
    height, width = batch["image"].shape[1:3]
    if rotate90 and height != width:
        raise UserError(f"data.rotate90 needs square crops, but they are {height}x{width}: change data.crop.")
    draws = _draws(batch["seed"])
    if photometric:
        distorted = photometric_distortion(batch["image"], draws[:, 3:])
        if size is not None:
            inside = (jnp.arange(height) < size[:, :1])[:, :, None] & (jnp.arange(width) < size[:, 1:])[:, None, :]
            distorted = jnp.where(inside[..., None], distorted, batch["image"])
        batch["image"] = distorted
    turns = (draws[:, 2] * 4).astype(jnp.int32)
    turned = turns % 2 == 1
    rows, columns = (None, None) if size is None else size.T
    rows_after, columns_after = rows, columns
    if rotate90 and size is not None:
        batch["size"] = _where(turned, size[:, ::-1], size)
        rows_after, columns_after = batch["size"].T
    for name in _GEOMETRIC:
        if name in batch:
            x = batch[name]
            if flip:
                x = _where(draws[:, 0] < flip, _mirrored(x, 2, columns), x)
            if vertical_flip:
                x = _where(draws[:, 1] < vertical_flip, _mirrored(x, 1, rows), x)
            if rotate90:
                x = _where(turned, _turned(x, columns), x)
                x = _where(turns >= 2, _mirrored(_mirrored(x, 1, rows_after), 2, columns_after), x)
            batch[name] = x
    return batch


def normalise(image: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """(image / 255 - mean) / std per channel: uint8 [..., C] to float32 [..., C]; `mean`, `std` on images in [0, 1]."""
    mean, std = (np.asarray(v, np.float64) for v in (mean, std))
    return (image.astype(jnp.float32) - np.float32(255 * mean)) * np.float32(1 / (255 * std))


def photometric_distortion(image: jax.Array, draws: jax.Array) -> jax.Array:
    """Brightness, contrast, saturation and hue, each with probability 1/2.

    Contrast comes second or last, as a coin says. Brightness adds up to 32 of 255, contrast and saturation are factors
    from 0.5 to 1.5, hue turns by up to 36 degrees in whole steps of two.

    Args:
      image: uint8 [B, H, W, 3], RGB.
      draws: float32 [B, 9], uniform in [0, 1): coin and value of brightness, the coin of the order, coin and value of
        contrast, saturation and hue.

    Returns:
      uint8 [B, H, W, 3].
    """
    draws = draws[:, :, None, None]  # [B, 9, 1, 1]
    brightness = jnp.where(draws[:, 0] < 0.5, (2 * draws[:, 1] - 1) * BRIGHTNESS, 0.0)[..., None]
    early = draws[:, 2] < 0.5
    contrast = jnp.where(draws[:, 3] < 0.5, _between(CONTRAST, draws[:, 4]), 1.0)
    saturation = jnp.where(draws[:, 5] < 0.5, _between(SATURATION, draws[:, 6]), 1.0)
    hue = jnp.where(draws[:, 7] < 0.5, jnp.floor(draws[:, 8] * 2 * HUE).astype(jnp.int32) + 180 - HUE, 0)

    x = _whole(image.astype(jnp.float32) + brightness)
    x = _whole(x * jnp.where(early, contrast, 1.0)[..., None])
    # Going to HSV and back is itself a loss of a few values, so it happens only for the images whose coin said so.
    h, s, v = rgb_to_hsv(x.astype(jnp.int32))
    s = _whole(s.astype(jnp.float32) * saturation).astype(jnp.int32)
    x = jnp.where((draws[:, 5] < 0.5)[..., None], hsv_to_rgb(h, s, v), x)
    h, s, v = rgb_to_hsv(x.astype(jnp.int32))
    x = jnp.where((draws[:, 7] < 0.5)[..., None], hsv_to_rgb(jax.lax.rem(h + hue, 180), s, v), x)
    return _whole(x * jnp.where(early, 1.0, contrast)[..., None]).astype(jnp.uint8)


def rgb_to_hsv(rgb: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """OpenCV's uint8 conversion, in its fixed-point arithmetic of 12 fractional bits.

    Args:
      rgb: int32 [..., 3], 0..255.

    Returns:
      int32 [...] each: hue in steps of two degrees (0..179), saturation and value (0..255).
    """
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    value = jnp.max(rgb, axis=-1)
    spread = value - jnp.min(rgb, axis=-1)
    # OpenCV's tables of rounded quotients, computed: a gather per pixel would cost more than a division.
    by_value, by_spread = _rounded_quotient(255 << 12, value), _rounded_quotient(30 << 12, spread)
    saturation = (spread * by_value + (1 << 11)) >> 12
    hue = jnp.where(value == r, g - b, jnp.where(value == g, b - r + 2 * spread, r - g + 4 * spread))
    hue = (hue * by_spread + (1 << 11)) >> 12
    return jnp.where(hue < 0, hue + 180, hue), saturation, value


def _rounded_quotient(dividend: int, divisor: jax.Array) -> jax.Array:
    """`dividend / divisor`, rounded to the nearest whole number; 0 where the divisor is 0."""
    return jnp.where(divisor == 0, 0, jax.lax.div(2 * dividend + divisor, 2 * jnp.maximum(divisor, 1)))


def hsv_to_rgb(hue: jax.Array, saturation: jax.Array, value: jax.Array) -> jax.Array:
    """The inverse of :func:`rgb_to_hsv`: int32 [..., 3], cut to whole numbers.

    OpenCV's vector code computes the same in float32 and so is one less where the result is whole and float32 is not
    exact (1.6 % of all colours); integers give every device the same answer.
    """
    sextant, part = jax.lax.div(hue, 30), jax.lax.rem(hue, 30)
    low = jax.lax.div(value * (255 - saturation), 255)
    falling = jax.lax.div(value * (30 * 255 - saturation * part), 30 * 255)
    rising = jax.lax.div(value * (30 * 255 - saturation * (30 - part)), 30 * 255)
    sextant = jnp.clip(sextant, 0, 5)
    # Selections, not a gather: the compiler would send the indices of the whole batch to every device for one.
    channels = (
        jax.lax.select_n(sextant, value, falling, low, low, rising, value),
        jax.lax.select_n(sextant, rising, value, value, falling, low, low),
        jax.lax.select_n(sextant, low, low, rising, value, value, falling),
    )
    return jnp.stack(channels, axis=-1)


def _draws(seeds: jax.Array) -> jax.Array:
    """Twelve uniform numbers per example from uint32 seeds [B, 2]: float32 [B, 12]."""
    keys = jax.random.wrap_key_data(seeds, impl="threefry2x32")
    return jax.vmap(lambda key: jax.random.uniform(key, (12,)))(keys)


def _between(bounds: tuple[float, float], draw: jax.Array) -> jax.Array:
    return bounds[0] + (bounds[1] - bounds[0]) * draw


def _whole(x: jax.Array) -> jax.Array:
    """What is left of float values as uint8: clipped to 0..255 and cut to whole numbers (still float32)."""
    return jnp.floor(jnp.clip(x, 0, 255))


def _where(chosen: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """x for the examples where `chosen` [B], y for the others."""
    return jnp.where(chosen.reshape(-1, *[1] * (x.ndim - 1)), x, y)


def _mirrored(x: jax.Array, axis: int, size: jax.Array | None) -> jax.Array:
    """x mirrored along an axis; with `size` int32 [B], only its first `size` entries, and the padding stays behind."""
    mirrored = jnp.flip(x, axis)
    if size is None:
        return mirrored
    length = x.shape[axis]
    # The mirror image ends with what was in front: it starts at `length - size`.
    moved = _from(mirrored, x, length - size, axis)
    inside = jnp.arange(length) < size[:, None]
    return jnp.where(inside.reshape(x.shape[0], *(length if a == axis else 1 for a in range(1, x.ndim))), moved, x)


def _turned(x: jax.Array, columns: jax.Array | None) -> jax.Array:
    """x [B, S, S, ...] turned left by 90 degrees; with `columns` int32 [B], those that are not padding."""
    turned = jnp.rot90(x, axes=(1, 2))
    # The padding that was on the right is on top now; it goes below.
    return turned if columns is None else _from(turned, turned, x.shape[1] - columns, 1)


def _from(x: jax.Array, then: jax.Array, start: jax.Array, axis: int) -> jax.Array:
    """x from `start` int32 [B] on along an axis, filled up with the beginning of `then`."""
    twice, length = jnp.concatenate([x, then], axis), x.shape[axis]
    return jax.vmap(lambda one, at: jax.lax.dynamic_slice_in_dim(one, at, length, axis - 1))(twice, start)
