"""Attention along the rows or the columns of a feature map, with a learned bias per relative position.

Axial attention is Ho et al. 2019 (https://arxiv.org/abs/1912.12180): two attentions of `side` keys instead of one of
`side^2`. Maps whose scores are large (256 x 256 in ColTran's last stage: 268 MB a picture) are attended in groups of
lines, in the backward pass too, so that the scores are never held whole.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.layers.attention import attend

COLUMN, ROW = 1, 2  # the axis of [B, H, W, ...] along which a column, or a row, extends

# Scores of one picture that are held at once: 16 MB in float32.
_LARGEST = 2**22


def axial_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis: int,
    table: jax.Array | None = None,
    causal: bool = False,
    implementation: str = "xla",
    largest: int = _LARGEST,
) -> jax.Array:
    """`softmax(q k^T / sqrt(d) + bias) v` among the pixels of each row, or of each column.

    Args:
      q, k, v: `[B, H, W, heads, d]`.
      axis: `ROW` (along the width) or `COLUMN` (along the height).
      table: `[heads, 2 * L]` biases by relative position, see :func:`relative_bias`; L is the length of `axis`.
      causal: a pixel sees itself and what comes before it along the axis, nothing after.
      implementation: of `layers.attention.attend`. "xla" goes by groups of lines when one picture has more than
        `largest` scores, and computes them again in the backward pass; "cudnn" holds none.
      largest: how many scores of one picture may be held at once.

    Returns:
      `[B, H, W, heads, d]` in the type of `v`; scores and softmax are float32.
    """
    length, heads = q.shape[axis], q.shape[-2]
    bias = None if table is None else relative_bias(table)
    mask = np.tri(length, dtype=bool) if causal else None
    along = functools.partial(attend, bias=bias, mask=mask, implementation=implementation)
    # The lines are one more batch axis, wherever it lies: nothing is moved before attention moves its heads.
    lines = ROW + COLUMN - axis
    group = max(1, largest // (heads * length * length))
    if implementation != "xla" or group >= q.shape[lines]:
        return jax.vmap(along, in_axes=lines, out_axes=lines)(q, k, v)
    along = jax.checkpoint(along, prevent_cse=False)
    moved = [jnp.moveaxis(x, lines, 0) for x in (q, k, v)]
    return jnp.moveaxis(jax.lax.map(lambda line: along(*line), moved, batch_size=group), 0, lines)


def attend_position(
    q: jax.Array, k: jax.Array, v: jax.Array, position: jax.Array, table: jax.Array | None = None
) -> jax.Array:
    """One query of a causal :func:`axial_attention` against keys and values kept so far: a step of decoding.

    Args:
      q: `[..., heads, d]`, the query at `position` of the axis.
      k, v: `[..., heads, L, d]`; what lies after `position` is not looked at, but must be finite.
      position: int, may be traced.
      table: `[heads, 2 * L]`.

    Returns:
      `[..., heads, d]` in the type of `v`.
    """
    length = k.shape[-2]
    scores = jnp.einsum("...nd,...nld->...nl", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if table is not None:
        scores += jax.lax.dynamic_slice_in_dim(table.astype(jnp.float32), length - 1 - position, length, axis=1)
    scores = jnp.where(jnp.arange(length) <= position, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("...nl,...nld->...nd", weights, v)


def relative_bias(table: jax.Array) -> jax.Array:
    """`[heads, 2 * L]` -> `[heads, L, L]`: query i and key j meet at `table[:, j - i + L - 1]`.

    The last column is never used. (It makes the result a reshape of the repeated table, without a gather, whose
    gradient would be a scatter.)
    """
    heads, length = table.shape[0], table.shape[1] // 2
    rolled = jnp.tile(table, (1, length))[:, : length * (2 * length - 1)]
    return rolled.reshape(heads, length, 2 * length - 1)[:, :, length - 1 :]
