"""Axial attention against loops in NumPy; groups of lines; decoding one position after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.layers.axial_attention import COLUMN, ROW, attend_position, axial_attention, relative_bias

SHAPE = (2, 3, 5, 2, 4)


def inputs(shape=SHAPE, seed=0):
    return tuple(jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(seed), 3))


def table_of(axis, shape=SHAPE, seed=1):
    return jax.random.normal(jax.random.key(seed), (shape[3], 2 * shape[axis]))


def by_hand(q, k, v, table, axis, causal):
    q, k, v, table = (np.asarray(x, np.float64) for x in (q, k, v, table))
    if axis == COLUMN:
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out, length = np.zeros_like(q), q.shape[2]
    for b, line, head, i in np.ndindex(q.shape[0], q.shape[1], q.shape[3], length):
        seen = range(i + 1) if causal else range(length)
        scores = np.array(
            [q[b, line, i, head] @ k[b, line, j, head] / 2 + table[head, j - i + length - 1] for j in seen]
        )
        weights = np.exp(scores - scores.max())
        out[b, line, i, head] = sum(w * v[b, line, j, head] for w, j in zip(weights / weights.sum(), seen, strict=True))
    return out.swapaxes(1, 2) if axis == COLUMN else out


@pytest.mark.parametrize("axis", [ROW, COLUMN])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_loops(axis, causal):
    q, k, v = inputs()
    table = table_of(axis)
    expected = by_hand(q, k, v, table, axis, causal)
    run = jax.jit(lambda *x: axial_attention(*x, axis=axis, table=table, causal=causal))
    np.testing.assert_allclose(run(q, k, v), expected, atol=1e-5)
    # Groups that divide the lines, and groups that do not.
    per_line = SHAPE[3] * SHAPE[axis] ** 2
    for lines in (1, 2):
        run = jax.jit(
            lambda *x, lines=lines: axial_attention(*x, axis=axis, table=table, causal=causal, largest=lines * per_line)
        )
        np.testing.assert_allclose(run(q, k, v), expected, atol=1e-5)


def test_relative_bias():
    table = np.random.default_rng(0).normal(size=(3, 10)).astype(np.float32)
    bias = np.asarray(relative_bias(jnp.asarray(table)))
    for i, j in np.ndindex(5, 5):
        np.testing.assert_array_equal(bias[:, i, j], table[:, j - i + 4])


@pytest.mark.parametrize("axis", [ROW, COLUMN])
def test_positions_one_by_one(axis):
    """Steps over kept keys and values equal causal attention, whatever lies in the part not yet written."""
    q, k, v = inputs()
    table = table_of(axis)
    whole = axial_attention(q, k, v, axis=axis, table=table, causal=True)
    # [B, other, heads, L, d], the form that steps keep.
    keys, values = ((x if axis == ROW else x.swapaxes(1, 2)).swapaxes(2, 3) for x in (k, v))
    step = jax.jit(attend_position)
    for position in range(SHAPE[axis]):
        y = step(
            jnp.take(q, position, axis=axis),
            keys.at[..., position + 1 :, :].set(1e3),
            values.at[..., position + 1 :, :].set(-1e3),
            position,
            table,
        )
        np.testing.assert_allclose(y, jnp.take(whole, position, axis=axis), atol=1e-5)


def largest_array(jaxpr):
    sizes = [variable.aval.size for equation in jaxpr.eqns for variable in equation.outvars]
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            sizes += [largest_array(inner)] if hasattr(inner, "eqns") else []
    return max(sizes, default=0)


def test_scores_are_never_held_whole():
    """Neither forward nor in the gradient, which equals that of the whole."""
    shape, table = (1, 16, 64, 1, 2), jnp.zeros((1, 128))
    scores = 16 * 64 * 64

    def gradient(largest):
        def loss(q, k, v, table):
            return jnp.sin(axial_attention(q, k, v, axis=ROW, table=table, largest=largest)).sum()

        return jax.grad(loss, argnums=(0, 1, 2, 3))

    q, k, v = inputs(shape)
    whole, grouped = gradient(scores), gradient(scores // 8)
    assert largest_array(jax.make_jaxpr(whole)(q, k, v, table).jaxpr) >= scores
    assert largest_array(jax.make_jaxpr(grouped)(q, k, v, table).jaxpr) <= scores // 8
    for a, b in zip(jax.jit(whole)(q, k, v, table), jax.jit(grouped)(q, k, v, table), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_half_precision_has_float32_scores():
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs())
    y = axial_attention(q, k, v, axis=ROW, table=table_of(ROW), causal=True)
    assert y.dtype == jnp.bfloat16
    exact = axial_attention(*(x.astype(jnp.float32) for x in (q, k, v)), axis=ROW, table=table_of(ROW), causal=True)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.05)
