"""Attention inside windows of a map, plain or shifted (Liu et al. 2021, https://arxiv.org/abs/2103.14030).

A map of any size is cut into windows of `window` x `window` tokens from the top left. With a shift s the windows begin
at row and column s instead, and the strips before and behind are windows of their own, cut off by the border. The
cyclic roll that makes whole windows of these strips is a matter of layout: tokens carry the number of the window that
they would have without it, and look at their own number only. So a map with a frame of padding at the bottom and the
right is attended to exactly as the map alone.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.attention import attend_by_head
from jax_densevit.layers.depthwise import DepthwiseConv
from jax_densevit.layers.embedding import torch_uniform
from jax_densevit.layers.product import flat_product

PADDINGS = ("masked", "original")
PROJECTIONS = ("linear", "conv")
_MASKED = -100.0  # what Swin and its followers add to the logits of pairs that may not look at each other


def partition(x: jax.Array, window: int, shift: int = 0) -> jax.Array:
    """Cuts a map into windows: `[B, H, W, ...]` -> `[B, ny, nx, window, window, ...]`.

    The bottom and the right are padded with zeros to whole windows (ny = ceil(H / window)), then the map is rolled by
    `shift` to the top and the left.
    """
    height, width = x.shape[1:3]
    pad = [(0, 0), (0, -height % window), (0, -width % window)] + [(0, 0)] * (x.ndim - 3)
    x = jnp.pad(x, pad) if height % window or width % window else x
    x = jnp.roll(x, (-shift, -shift), (1, 2)) if shift else x
    x = x.reshape(x.shape[0], x.shape[1] // window, window, x.shape[2] // window, window, *x.shape[3:])
    return x.swapaxes(2, 3)


def merge(windows: jax.Array, size: tuple[int, int], shift: int = 0) -> jax.Array:
    """The inverse of :func:`partition`: `[B, ny, nx, window, window, ...]` -> `[B, *size, ...]`."""
    batch, rows, columns, window = windows.shape[:4]
    x = windows.swapaxes(2, 3).reshape(batch, rows * window, columns * window, *windows.shape[5:])
    x = jnp.roll(x, (shift, shift), (1, 2)) if shift else x
    return x[:, : size[0], : size[1]]


def window_numbers(length: int, window: int, shift: int) -> jax.Array:
    """The window of each place along one axis, in the order of :func:`partition`: int32 `[ceil(length / window) *
    window]`. Rolled strips have numbers of their own; padding has -1."""
    total = -(-length // window) * window
    place = (jnp.arange(total, dtype=jnp.int32) + shift) % total
    return jnp.where(place < length, (place - shift) // window + 1, -1)


def window_groups(size: tuple[int, int], window: int, shift: int, valid: jax.Array | None = None) -> jax.Array | None:
    """Numbers that say which tokens of a window may look at each other: those with the same one.

    Args:
      size: (height, width) of the map; window, shift: of :func:`partition`.
      valid: bool `[B, H, W]`, False where the map is padding; None when all of it is valid.

    Returns:
      int32 `[B or 1, ny * nx, window ** 2]`, -1 for padding, which so looks at padding only and is never seen; None
      when every token may look at its whole window.
    """
    if not (shift or size[0] % window or size[1] % window or valid is not None):
        return None
    rows, columns = (window_numbers(length, window, shift) for length in size)
    numbers = jnp.where((rows >= 0)[:, None] & (columns >= 0), rows[:, None] * (size[1] + 2) + columns, -1)
    numbers = partition(numbers[None], window)
    if valid is not None:
        numbers = jnp.where(partition(valid, window, shift), numbers, -1)
    return numbers.reshape(numbers.shape[0], -1, window * window)


def original_bias(size: tuple[int, int], window: int, shift: int, valid: jax.Array | None = None) -> jax.Array | None:
    """What the published code adds to the logits of Uformer's windows: -100 for pairs of different strips, -100 where
    both tokens are padding.

    A valid token so does look at padding. The padding of shifted blocks is not rolled with the tokens: both faults are
    the original's, kept to compare with it.

    Args:
      size: (height, width) of the map, multiples of the window; window, shift, valid: as in :func:`window_groups`.

    Returns:
      `[B or 1, ny * nx, window ** 2, window ** 2]` float32, or None where it would be zero.
    """
    total = None
    if shift:
        groups = window_groups(size, window, shift)
        total = jnp.where(groups[..., :, None] == groups[..., None, :], 0.0, _MASKED)
    if valid is not None:
        padding = ~partition(valid, window).reshape(valid.shape[0], -1, window * window)
        both = jnp.where(padding[..., :, None] & padding[..., None, :], _MASKED, 0.0)
        total = both if total is None else total + both
    return total


def relative_bias(table: jax.Array, window: int) -> jax.Array:
    """A table of relative positions as the bias of all pairs of a window.

    Args:
      table: `[(2 * window - 1) ** 2, heads]`; row `(yi - yj + window - 1) * (2 * window - 1) + (xi - xj + window - 1)`
        is for query (yi, xi) and key (yj, xj).

    Returns:
      `[heads, window ** 2, window ** 2]`, queries before keys, both row-major. Made of slices, so that the gradient is
      no scatter.
    """
    side = 2 * window - 1
    pairs = table.reshape(side, side, -1)
    for axis in (0, 2):  # rows, then columns: axis of length 2w - 1 -> queries, keys
        # Row i of the window needs table rows i + w - 1 down to i.
        slices = [jax.lax.slice_in_dim(pairs, i, i + window, axis=axis) for i in range(window)]
        pairs = jnp.flip(jnp.stack(slices, axis), axis + 1)
    return pairs.transpose(4, 0, 2, 1, 3).reshape(-1, window * window, window * window)


class ConvProjection(nn.Module):
    """Depthwise 3x3 convolution inside windows, ReLU, a linear layer to heads.

    Parameters: `depthwise/{kernel,bias}`, `pointwise/{kernel [C, heads, d],bias [heads, d]}`.

    Attributes:
      head: (heads, d).
      window, shift: of :func:`partition`.
      cyclic: whether the convolution reaches over the seam of rolled windows; else strips are windows of their own.
      dtype: type of the computation.
    """

    head: tuple[int, int]
    window: int
    shift: int = 0
    cyclic: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> `[B, H, W, heads, d]`."""
        # Zeros in front make whole windows of the first strips.
        front = 0 if self.cyclic else -self.shift % self.window
        padded = jnp.pad(x, ((0, 0), (front, 0), (front, 0), (0, 0)))
        rolled = self.shift if self.cyclic else 0
        windows = partition(padded, self.window, rolled)
        y = DepthwiseConv(self.dtype, name="depthwise")(windows.reshape(-1, self.window, self.window, x.shape[-1]))
        y = merge(y.reshape(windows.shape), padded.shape[1:3], rolled)[:, front:, front:]
        init = torch_uniform(x.shape[-1])
        pointwise = nn.DenseGeneral(
            self.head, dtype=self.dtype, kernel_init=init, bias_init=init, dot_general=flat_product, name="pointwise"
        )
        return pointwise(nn.relu(y))


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias for every relative position (W-MSA, SW-MSA).

    Parameters: `qkv/{kernel [C, 3, heads, d],bias [3, heads, d]}`, `out/{kernel [heads, d, C],bias [C]}`,
    `position_bias [(2 window - 1)^2, heads]`. With `projection="conv"` instead of `qkv` the three of
    `{query,key,value}/{depthwise/{kernel,bias},pointwise/{kernel [C, heads, d],bias}}`.

    Attributes:
      num_heads: heads; window: side of the windows; shift: of the windows, 0 up to window - 1.
      projection: "linear", or "conv": depthwise 3x3 (with zeros around every window), ReLU, 1x1.
      padding: "masked", or "original" (sizes are multiples of the window, see :func:`original_bias`; convolutions of
        rolled windows reach over the seam).
      dtype: type of the computation; parameters and the softmax are float32.
    """

    num_heads: int
    window: int
    shift: int = 0
    projection: str = "linear"
    padding: str = "masked"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """`[B, H, W, C]` -> the same shape. `valid`: bool `[B, H, W]`, False at padding.

        Raises:
          UserError: heads that do not divide C, unknown names, a shift outside its range.
        """
        check_name("window projection (projection)", self.projection, PROJECTIONS)
        check_name("treatment of padding (padding)", self.padding, PADDINGS)
        if x.shape[-1] % self.num_heads:
            raise UserError(f"{self.num_heads} heads do not divide {x.shape[-1]} channels; choose a divisor.")
        if not 0 <= self.shift < self.window:
            raise UserError(f"A shift of {self.shift} is not within a window of {self.window}: 0 to {self.window - 1}.")
        size, window, heads = x.shape[1:3], self.window, self.num_heads
        head = (heads, x.shape[-1] // heads)
        init = nn.initializers.truncated_normal(0.02)
        # Heads to the front and tokens into windows in one transposition of each; a linear layer sees windows already,
        # and one map is rolled instead of three.
        if self.projection == "linear":
            qkv = nn.DenseGeneral((3, *head), dtype=self.dtype, kernel_init=init, dot_general=flat_product, name="qkv")(
                partition(x, window, self.shift)
            )
            qkv = [qkv[..., i, :, :] for i in range(3)]
        else:
            cyclic = self.padding == "original"
            if valid is not None and not cyclic:
                x = jnp.where(valid[..., None], x, jnp.zeros((), x.dtype))
            project = functools.partial(ConvProjection, head, window, self.shift, cyclic, self.dtype)
            qkv = [partition(project(name=name)(x), window, self.shift) for name in ("query", "key", "value")]
        q, k, v = (y.transpose(0, 1, 2, 5, 3, 4, 6) for y in qkv)
        windows = q.shape[:4]
        q, k, v = (y.reshape(y.shape[0], -1, heads, window * window, y.shape[-1]) for y in (q, k, v))
        table = self.param("position_bias", init, ((2 * window - 1) ** 2, heads))
        bias, mask = relative_bias(table, window), None
        if self.padding == "masked":
            groups = window_groups(size, window, self.shift, valid)
            if groups is not None:
                mask = (groups[..., :, None] == groups[..., None, :])[:, :, None]
        else:
            extra = original_bias(size, window, self.shift, valid)
            bias = bias if extra is None else bias + extra[:, :, None]
        y = attend_by_head(q, k, v, bias=bias, mask=mask)
        y = y.reshape(*windows, window, window, -1).transpose(0, 1, 2, 4, 5, 3, 6)
        y = nn.DenseGeneral(
            x.shape[-1], axis=(-2, -1), dtype=self.dtype, kernel_init=init, dot_general=flat_product, name="out"
        )(y)
        return merge(y, size, self.shift)
