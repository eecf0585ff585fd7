"""Uformer (Wang et al. 2022, https://arxiv.org/abs/2106.03106): a U-shaped transformer of window attention.

A 3x3 convolution, four encoder stages each followed by a 4x4 convolution of stride 2, a bottleneck, four decoder stages
each preceded by a 2x2 transposed convolution and the encoder's map, a 3x3 convolution. The blocks are LeWin blocks:
window attention and a feed-forward layer with a depthwise convolution (LeFF). Numbers are those of the authors' code,
whose blocks shift every second window although the paper does not say so.

The original takes square images whose side is a multiple of 128. Here levels have ceil(H / 2^k) x ceil(W / 2^k) tokens,
exactly: beyond them convolutions see zeros and windows see nothing, so any size works and no padding is ever read.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.convolution import Upsample, convolve
from jax_densevit.layers.embedding import torch_uniform
from jax_densevit.layers.fields import shared_fields
from jax_densevit.layers.transformer import REMAT_POLICIES
from jax_densevit.layers.window import PADDINGS
from jax_densevit.models.lewin import FEED_FORWARDS, LeWinBlock, Stage, clear
from jax_densevit.models.output import DenseOutput
from jax_densevit.models.registry import register_model

STAGES = (*(f"encoder_{i}" for i in range(4)), "bottleneck", *(f"decoder_{i}" for i in range(4)))
LEVELS = (0, 1, 2, 3, 4, 3, 2, 1, 0)  # halvings of the resolution, by stage
WIDTHS = (1, 2, 4, 8, 16, 16, 8, 4, 2)  # channels over `base`, by stage: decoder maps hold the encoder's too
RESIDUALS = ("study", "official", "none")


def windows_built_for(
    image_size: int | Sequence[int], windows: Sequence[int], shifts: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The published rule: a stage whose map is no larger than its window gets the map as its window, and no shift.

    The original applies it to the size the model is built for, whatever it runs on later: a model built for 128 does
    not shift in the bottleneck, one built for 256 does, and one built for 64 has smaller tables of positions there.

    Args:
      image_size: a side in pixels or (height, width), of which the smaller counts.
      windows, shifts: of the nine stages.

    Returns:
      (windows, shifts) of the nine stages.
    """
    side = image_size if isinstance(image_size, int) else min(image_size)
    maps = [max(side >> level, 1) for level in LEVELS]
    windows = tuple(min(size, window) for size, window in zip(maps, windows, strict=True))
    shifts = tuple(shift if size > window else 0 for size, window, shift in zip(maps, windows, shifts, strict=True))
    return windows, shifts


def _tokens(size: tuple[int, int], level: int, window: int = 1) -> int:
    """Tokens after `level` halvings, windows filled up."""
    sides = [-(-side // 2**level) for side in size]
    return math.prod(-(-side // window) * window for side in sides)


def _up(model: "Uformer") -> list[tuple[int, int]]:
    """Channels (given, made) of the four transposed convolutions: each takes the whole concatenation before it."""
    return [(width * model.base, 2 ** (3 - i) * model.base) for i, width in enumerate(WIDTHS[4:8])]


def _macs(model: "Uformer", size: tuple[int, int]) -> int:
    """Products alone: matrix products, convolutions and attention. 40.99e9 for S at 256 x 256, as PyTorch counts."""
    size = model.padded(size)
    windows, _ = model.windows_and_shifts()
    total = 27 * model.base * _tokens(size, 0) + 9 * 2 * model.base * model.num_classes * _tokens(size, 0)
    for level, width, depth, window in zip(LEVELS, WIDTHS, model.depths, windows, strict=True):
        channels, tokens = width * model.base, _tokens(size, level)
        block = (4 + 2 * model.mlp_ratio) * channels**2 * tokens
        block += 2 * _tokens(size, level, window) * window**2 * channels
        block += 9 * model.mlp_ratio * channels * tokens if model.feed_forward == "leff" else 0
        block += 27 * channels * tokens if model.projection == "conv" else 0
        total += depth * block
    for level in range(4):
        total += 32 * (2**level * model.base) ** 2 * _tokens(size, level + 1)
    for level, (given, made) in zip((4, 3, 2, 1), _up(model), strict=True):
        total += 4 * given * made * _tokens(size, level)
    return total


def macs_as_published(model: "Uformer", size: tuple[int, int]) -> int:
    """The authors' own count, that of the paper's tables: 12.00e9 for T, 43.86e9 for S and 89.46e9 for B at 256 x 256.

    Beside the products it has one operation per token and channel for every layer norm, and it counts the transposed
    convolutions four times (at their output's size, with all four positions of their kernel).
    """
    total, size = _macs(model, size), model.padded(size)
    for level, width, depth in zip(LEVELS, WIDTHS, model.depths, strict=True):
        total += 2 * depth * width * model.base * _tokens(size, level)
    for level, (given, made) in zip((4, 3, 2, 1), _up(model), strict=True):
        total += 3 * 4 * given * made * _tokens(size, level)
    return total


_SIZES = {
    "T": {"base": 16},
    "S": {"base": 32},
    "B": {"base": 32, "depths": (1, 2, 8, 8, 2, 8, 8, 2, 1)},
}


@register_model(
    "uformer",
    variants=_SIZES | {f"{name}-modulator": {**sizes, "modulator": True} for name, sizes in _SIZES.items()},
    default_variant="S",
    macs=_macs,
    image_size=(256, 256),
    num_classes=3,
)
class Uformer(nn.Module):
    """Uformer T, S and B; see the head of this file. The paper prints T and S without and B with modulators.

    Parameters: `input`, `{encoder_0..3,bottleneck,decoder_0..3}/block_<i>/...` (see `LeWinBlock`), `downsample_<i>`
    after `encoder_<i>`, `upsample_<i>` before `decoder_<i>` (so `decoder_0` is the smallest map, as the authors count),
    `output`. Images of more channels than three (two views of the authors' dual-pixel model: six) make a larger
    `input` and no other difference.

    Attributes:
      num_classes: K, output channels.
      base: channels at full resolution; they double with every halving.
      depths: blocks of the nine stages, in the order of `STAGES`.
      heads: heads of the nine stages.
      window: side of the windows, or of the nine stages'.
      shift: True shifts the windows of every second block by half a window, False none; or nine shifts.
      built_for: a side or (height, width): apply the published rule (`windows_built_for`) of a model built for it.
        None takes `window` and `shift` as they are, which is the rule's result from 256 pixels on.
      mlp_ratio: hidden width of the feed-forward layers over C.
      feed_forward: "leff", or "ffn" without its convolution.
      projection: of queries, keys and values: "linear", or "conv" inside windows.
      modulator: learned offsets of the tokens of a window, in the decoder's blocks.
      residual: what adds the image to the output: "study" does where K is the number of image channels (colorization,
        not segmentation), "official" where images have three channels (K must be 3 then), "none" never. The image is
        added as it was given: a task whose inputs are normalised gets normalised outputs.
      drop_path: highest rate of stochastic depth: from 0 up to it over the encoder, it in the bottleneck, and down to 0
        over the decoder.
      padding: "masked" reads no padding, see the head of this file. "original" pads images with zeros at the bottom and
        the right up to whole windows at every level (multiples of 128 pixels) and takes them for image, as the authors
        do; with `valid`, windows are masked by their rule (`layers.window.original_bias`).
      remat: name of `REMAT_POLICIES`, for every block.
      dtype: type of the computation; parameters, softmax, norms' statistics and the last layer are float32.
    """

    num_classes: int = 3
    base: int = 32
    depths: tuple[int, ...] = (2,) * 9
    heads: tuple[int, ...] = (1, 2, 4, 8, 16, 16, 8, 4, 2)
    window: int | tuple[int, ...] = 8
    shift: bool | tuple[int, ...] = True
    built_for: int | tuple[int, int] | None = None
    mlp_ratio: int = 4
    feed_forward: str = "leff"
    projection: str = "linear"
    modulator: bool = False
    residual: str = "study"
    drop_path: float = 0.1
    padding: str = "masked"
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False, valid: jax.Array | None = None) -> DenseOutput:
        """`[B, H, W, 3]` images of any size -> logits `[B, H, W, K]`; larger, see `covers`, with `padding="original"`.

        Args:
          images: normalised.
          train: stochastic depth, from the rng stream "dropout".
          valid: bool `[B, H, W]`, False where the images of a batch are padding; None when all of it is image. With
            `padding="masked"`, outputs at valid pixels do not depend on what or how much is padding to their right and
            below them.

        `features`: "bottleneck" `[B, ceil(H / 16), ceil(W / 16), 16 base]`.

        Raises:
          UserError: options that do not fit each other.
        """
        windows, shifts = self.windows_and_shifts()
        check_name("feed-forward layer (feed_forward)", self.feed_forward, FEED_FORWARDS)
        check_name("treatment of padding (padding)", self.padding, PADDINGS)
        check_name("rule for the residual (residual)", self.residual, RESIDUALS)
        check_name("rematerialisation policy (remat)", self.remat, REMAT_POLICIES)
        if self.residual == "official" and images.shape[-1] == 3 != self.num_classes:
            raise UserError(
                f"residual='official' adds images of 3 channels to {self.num_classes} outputs; "
                "take num_classes=3, or residual='study'."
            )
        size = self.padded(images.shape[1:3])
        pad = [(0, 0), *((0, padded - side) for padded, side in zip(size, images.shape[1:3], strict=True))]
        images = jnp.pad(images, [*pad, (0, 0)])
        masked = self.padding == "masked"
        valids = [None] * 5
        if valid is not None:
            if valid.ndim != 3 or valid.dtype != jnp.bool_:
                raise UserError(f"valid is bool [B, H, W], not {valid.dtype} {valid.shape}.")
            valids[0] = jnp.pad(valid, pad)
            for level in range(4):
                valids[level + 1] = _halve(valids[level], masked)
        seen = valids if masked else [None] * 5  # what convolutions may not see

        rates, start = _drop_path_rates(self.drop_path, self.depths), 0
        init = torch_uniform(9 * images.shape[-1])
        x = clear(images.astype(self.dtype), seen[0])
        x = self._conv3x3(self.base, init, self.dtype, "input")(x)
        x = nn.leaky_relu(x, 0.01)
        maps, features = [], {}
        same = shared_fields(self, LeWinBlock)
        for i, (name, level) in enumerate(zip(STAGES, LEVELS, strict=True)):
            if i > 4:
                init = torch_uniform(4 * (self.base << level))
                up = Upsample(self.base << level, 2, self.dtype, init, init, name=f"upsample_{i - 5}")(x)
                skip = maps[level]
                x = jnp.concatenate([up[:, : skip.shape[1], : skip.shape[2]], skip], axis=-1)
            own = {"num_heads": self.heads[i], "window": windows[i], "shift": shifts[i]}
            own["modulator"] = self.modulator and i > 4
            stage = Stage(tuple(rates[start : start + self.depths[i]]), self.remat, same | own, name=name)
            x = stage(x, valids[level], train)
            start += self.depths[i]
            if i < 4:
                maps.append(x)
                x = self._downsample(clear(x, seen[level]), i)
            elif i == 4:
                features["bottleneck"] = x
        init = torch_uniform(9 * x.shape[-1])
        x = clear(x, seen[0]).astype(jnp.float32)
        logits = self._conv3x3(self.num_classes, init, jnp.float32, "output")(x)
        if self.residual != "none" and images.shape[-1] == self.num_classes:
            if self.residual == "study" or images.shape[-1] == 3:
                logits = logits + images.astype(jnp.float32)
        return DenseOutput(logits=logits, features=features, covers=size)

    def _conv3x3(self, features: int, init: Any, dtype: Any, name: str) -> nn.Conv:
        options = {"padding": 1, "dtype": dtype, "kernel_init": init, "bias_init": init}
        return nn.Conv(features, (3, 3), conv_general_dilated=convolve, name=name, **options)

    def _downsample(self, x: jax.Array, i: int) -> jax.Array:
        """4x4 convolution of stride 2: `[B, h, w, C]` -> `[B, ceil(h / 2), ceil(w / 2), 2 C]`."""
        init = torch_uniform(16 * x.shape[-1])
        pad = [(1, 1 + side % 2) for side in x.shape[1:3]]
        features = self.base << (i + 1)
        name = f"downsample_{i}"
        return nn.Conv(features, (4, 4), 2, pad, dtype=self.dtype, kernel_init=init, bias_init=init, name=name)(x)

    def windows_and_shifts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(windows, shifts) of the nine stages after the published rule, where `built_for` asks for it."""
        for what in ("depths", "heads", "window", "shift"):
            given = getattr(self, what)
            if isinstance(given, tuple) and (len(given) != 9 or any(int(n) < 0 for n in given)):
                raise UserError(f"{what}={given} of a Uformer has nine numbers, one a stage: {', '.join(STAGES)}.")
        windows = self.window if isinstance(self.window, tuple) else (self.window,) * 9
        shifts = self.shift
        if not isinstance(shifts, tuple):
            shifts = tuple(window // 2 if shifts else 0 for window in windows)
        if min(windows) < 1:
            raise UserError(f"window={self.window} of a Uformer must be at least 1.")
        if self.built_for is not None:
            windows, shifts = windows_built_for(self.built_for, windows, shifts)
        return windows, shifts

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size that the model computes on: the image's, or with `padding="original"` the next that windows fit."""
        if self.padding == "masked":
            return tuple(size)
        multiple = math.lcm(
            *(window << level for window, level in zip(self.windows_and_shifts()[0], LEVELS, strict=True))
        )
        return tuple(-(-side // multiple) * multiple for side in size)


def _drop_path_rates(highest: float, depths: tuple[int, ...]) -> list[float]:
    """Of all blocks in order."""
    encoder, decoder = (np.linspace(0, highest, sum(part)) for part in (depths[:4], depths[5:]))
    return [float(rate) for rate in (*encoder, *[highest] * depths[4], *decoder[::-1])]


def _halve(valid: jax.Array, masked: bool) -> jax.Array:
    """`[B, h, w]` at half the resolution: tokens with any valid pixel, or the original's nearest (top left) one."""
    if not masked:
        return valid[:, ::2, ::2]
    batch, height, width = valid.shape
    valid = jnp.pad(valid, ((0, 0), (0, height % 2), (0, width % 2)))
    return valid.reshape(batch, (height + 1) // 2, 2, (width + 1) // 2, 2).any((2, 4))
