"""The exact GELU against the error function in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.layers.activation import gelu_exact

GRID = np.linspace(-12, 12, 24001).astype(np.float32)
NORMAL = np.array([0.5 * math.erfc(-float(x) / math.sqrt(2)) for x in GRID])


def test_value():
    y = jax.jit(gelu_exact)(GRID)
    assert np.abs(np.asarray(y, np.float64) - GRID * NORMAL).max() < 5e-7
    assert np.abs(np.asarray(y, np.float64) - GRID * NORMAL)[np.abs(GRID) < 3].max() < 3e-7


def test_derivative():
    x = GRID.astype(np.float64)
    expected = NORMAL + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    backward = jax.jit(jax.grad(lambda x: gelu_exact(x).sum()))(jnp.asarray(GRID))
    assert np.abs(np.asarray(backward, np.float64) - expected).max() < 5e-7


def test_far_away_and_at_zero():
    x = jnp.asarray([0.0, -0.0, 40.0, -40.0, 1e30, -1e30], jnp.float32)
    np.testing.assert_allclose(gelu_exact(x), [0, 0, 40, 0, 1e30, 0], rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu_exact))(x), [0.5, 0.5, 1, 0, 1, 0], atol=1e-7)


def test_the_negative_tail_keeps_its_digits():
    x = np.asarray([-3.0, -5.0, -7.0], np.float32)
    exact = [float(v) * 0.5 * math.erfc(-float(v) / math.sqrt(2)) for v in x]
    np.testing.assert_allclose(gelu_exact(jnp.asarray(x)), exact, rtol=1e-3)


def test_half_precision_rounds_once():
    x = jnp.linspace(-4, 4, 101).astype(jnp.bfloat16)
    np.testing.assert_array_equal(gelu_exact(x), gelu_exact(x.astype(jnp.float32)).astype(jnp.bfloat16))
    assert jax.grad(lambda x: gelu_exact(x).sum())(x).dtype == jnp.bfloat16
