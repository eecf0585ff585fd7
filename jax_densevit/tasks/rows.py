"""The last bilinear resize of a dense model, done by blocks of output rows so that full-size logits never exist.

Logits of 150 classes at 512x512 are 157 MB per image and head in float32, and a loss holds several copies of them. A
block of output rows needs only the few source rows around it: a loop over blocks slices those out, enlarges them and
hands them to whoever reads pixels, a loss (:func:`sum_over_pixels`) or an argmax (:func:`map_over_pixels`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.layers.resize import interpolation_matrix, resize_bilinear
from jax_densevit.tasks.rooms import Samples, sample_axis

# One block of one example, in bytes of float32 logits.
BLOCK_BYTES = 8 * 2**20


class RowBlocks(NamedTuple):
    """How output rows depend on source rows: block i is `weights[i] @ source[starts[i] : starts[i] + n]`."""

    starts: np.ndarray  # int32 [blocks]
    weights: np.ndarray  # float32 [blocks, rows, n]; rows beyond the output's height are zero


def plan_rows(source: int, covers: int, height: int, rows: int) -> RowBlocks:
    """Splits `height` output rows into blocks of `rows`; `source` rows of logits stretch over `covers >= height`."""
    matrix = interpolation_matrix(source, covers, False)[:height]
    blocks = -(-height // rows)
    matrix = np.pad(matrix, ((0, blocks * rows - height), (0, 0))).reshape(blocks, rows, source)
    used = [np.flatnonzero(block.any(0)) for block in matrix]
    n = max(u[-1] - u[0] + 1 for u in used)
    starts = np.array([min(u[0], source - n) for u in used], np.int32)
    weights = np.stack([block[:, s : s + n] for block, s in zip(matrix, starts, strict=True)])
    return RowBlocks(starts, weights.astype(np.float32))


def sum_over_pixels(
    pixels: Callable[[jax.Array, jax.Array], jax.Array],
    logits: jax.Array,
    labels: jax.Array,
    covers: tuple[int, int],
    *,
    fill: int,
    rows: int = 0,
) -> jax.Array:
    """Sum of a per-pixel quantity of the resized logits, per example, without ever holding the resized logits.

    Equal to `pixels(resize_bilinear(logits, covers)[:, :H, :W], labels)`. The gradient is computed together with the
    value, block by block, so that nothing is resized twice; second derivatives are not defined.

    Args:
      pixels: sums over the pixels of each example, `(logits [B, r, W, K], labels [B, r, W]) -> [B]`; a label equal to
        `fill` must add nothing.
      logits: float32 `[B, h, w, K]`.
      labels: integers `[B, H, W]`, or `[B, H, W, C]` for whoever compares with more than a label.
      covers: the (height, width) that the logits stretch over, at least (H, W).
      fill: the label of the rows that complete the last block.
      rows: output rows per block; 0 chooses by memory.

    Returns:
      float32 `[B]`.
    """
    height, width = labels.shape[1:3]
    rows = rows or automatic_rows(width, logits.shape[-1], height)
    plan = plan_rows(logits.shape[1], covers[0], height, min(rows, height))
    blocks, rows, n = plan.weights.shape
    more = ((0, 0),) * (labels.ndim - 2)
    labels = jnp.pad(labels, ((0, 0), (0, blocks * rows - height), *more), constant_values=fill)

    def block_sum(part, weights, block_labels):
        return pixels(_enlarge(part, weights, covers[1], width), block_labels)

    def blocked(labels):
        by_block = labels.reshape(len(labels), blocks, rows, *labels.shape[2:]).swapaxes(0, 1)
        return plan.starts, plan.weights, by_block

    @jax.custom_vjp
    def total(logits, labels):
        def step(sums, block):
            start, weights, block_labels = block
            part = jax.lax.dynamic_slice_in_dim(logits, start, n, 1)
            return sums + block_sum(part, weights, block_labels), None

        return jax.lax.scan(step, jnp.zeros(len(logits), jnp.float32), blocked(labels))[0]

    def forward(logits, labels):
        def step(carry, block):
            sums, gradient = carry
            start, weights, block_labels = block
            part = jax.lax.dynamic_slice_in_dim(logits, start, n, 1)
            value, pull = jax.vjp(lambda part: block_sum(part, weights, block_labels), part)
            (slope,) = pull(jnp.ones_like(value))
            slope += jax.lax.dynamic_slice_in_dim(gradient, start, n, 1)
            return (sums + value, jax.lax.dynamic_update_slice_in_dim(gradient, slope, start, 1)), None

        start = jnp.zeros(len(logits), jnp.float32), jnp.zeros_like(logits)
        return jax.lax.scan(step, start, blocked(labels))[0]

    total.defvjp(forward, lambda gradient, upstream: (gradient * upstream[:, None, None, None], None))
    return total(logits, labels)


def map_over_pixels(
    pixels: Callable[..., Any],
    logits: jax.Array,
    down: Samples,
    across: Samples,
    *beside: jax.Array,
    rows: int = 0,
) -> Any:
    """What `pixels` makes of the sampled logits, by blocks of output rows.

    Args:
      pixels: `[B, r, W, K] -> ` a pytree of arrays `[B, r, W, ...]`, each pixel by itself (an argmax, a maximum).
      logits: float32 `[B, h, w, K]`.
      down, across: samples of the H output rows and W columns.
      beside: arrays `[B, H, W, ...]` of which `pixels` takes the same block of rows, after the logits.
      rows: output rows per block; 0 chooses by memory.

    Returns:
      The pytree with arrays `[B, H, W, ...]`.
    """
    height, width = len(down.low), len(across.low)
    rows = min(rows or automatic_rows(width, logits.shape[-1], height), height)
    blocks = -(-height // rows)
    down = Samples(*(jnp.pad(values, (0, blocks * rows - height)).reshape(blocks, rows) for values in down))

    def join(values):  # [blocks, B, r, W, ...] -> [B, H, W, ...]
        values = values.swapaxes(0, 1)
        return values.reshape(values.shape[0], -1, *values.shape[3:])[:, :height]

    def split(values):  # [B, H, W, ...] -> [blocks, B, r, W, ...]
        values = jnp.pad(values, ((0, 0), (0, blocks * rows - height), *((0, 0),) * (values.ndim - 2)))
        return values.reshape(values.shape[0], blocks, rows, *values.shape[2:]).swapaxes(0, 1)

    def block(part):
        down, beside = part
        return pixels(sample_axis(sample_axis(logits, down, 1), across, 2), *beside)

    return jax.tree.map(join, jax.lax.map(block, (down, tuple(split(values) for values in beside))))


def automatic_rows(width: int, channels: int, height: int) -> int:
    """Output rows per block so that a block of one example stays within `BLOCK_BYTES`, blocks of about equal size."""
    most = max(1, BLOCK_BYTES // (4 * width * channels))
    return -(-height // -(-height // most))


def _enlarge(part: jax.Array, weights: jax.Array, covers: int, width: int) -> jax.Array:
    """Source rows `[B, n, w, K]` to a block of output `[B, r, W, K]`: rows by a small product, columns by resizing."""
    block = jnp.einsum("rn,bnwk->brwk", weights, part, precision=jax.lax.Precision.HIGHEST)
    return resize_bilinear(block, (block.shape[1], covers))[:, :, :width]
