"""Batch norm against NumPy in float64: output, running statistics, gradient, types; layer norm against Flax."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.errors import UserError
from jax_densevit.layers.normalization import BatchNorm, LayerNorm


def variables(channels, rng):
    draw = lambda low, high: jnp.asarray(rng.uniform(low, high, channels), jnp.float32)  # noqa: E731
    return {
        "params": {"scale": draw(0.5, 2), "bias": draw(-1, 1)},
        "batch_stats": {"mean": draw(-1, 1), "var": draw(0.5, 2)},
    }


def test_training_normalises_by_the_biased_and_collects_the_unbiased_variance():
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, (2, 3, 2, 4)).astype(np.float32)
    given = variables(4, rng)
    y, after = BatchNorm().apply(given, jnp.asarray(x), train=True, mutable=["batch_stats"])
    flat = x.reshape(-1, 4).astype(np.float64)
    scale, bias = (np.asarray(given["params"][k], np.float64) for k in ("scale", "bias"))
    expected = (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected, atol=2e-6)
    old = given["batch_stats"]
    np.testing.assert_allclose(after["batch_stats"]["mean"], 0.9 * old["mean"] + 0.1 * flat.mean(0), rtol=1e-6)
    np.testing.assert_allclose(after["batch_stats"]["var"], 0.9 * old["var"] + 0.1 * flat.var(0, ddof=1), rtol=1e-6)


def test_evaluation_uses_the_running_statistics_and_keeps_them():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(1, 1, 1, 4)), jnp.float32)
    given = variables(4, rng)
    y, after = BatchNorm(epsilon=1e-3).apply(given, x, train=False, mutable=["batch_stats"])
    mean, var = given["batch_stats"]["mean"], given["batch_stats"]["var"]
    expected = (x - mean) / np.sqrt(var + 1e-3) * given["params"]["scale"] + given["params"]["bias"]
    np.testing.assert_allclose(y, expected, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after["batch_stats"], given["batch_stats"])


def test_far_from_zero_keeps_its_digits():
    x = jnp.asarray(np.random.default_rng(2).normal(1000, 1, (64, 2)), jnp.float32)
    y, _ = BatchNorm().init_with_output(jax.random.key(0), x, train=True)
    np.testing.assert_allclose(np.var(y, axis=0), 1.0, rtol=1e-3)


def test_gradient_does_not_see_shift_and_scale_of_the_input():
    """The output is invariant to a*x + b per channel, so the gradient is orthogonal to ones and to x."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(4, 5, 3)), jnp.float32)
    target = jnp.asarray(rng.normal(size=(4, 5, 3)), jnp.float32)
    norm = BatchNorm(epsilon=1e-12)
    given = norm.init(jax.random.key(0), x, train=False)
    gradient = jax.grad(lambda x: (norm.apply(given, x, train=True, mutable=["batch_stats"])[0] * target).sum())(x)
    assert np.abs(gradient).max() > 0.1
    np.testing.assert_allclose(gradient.sum((0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose((gradient * x).sum((0, 1)), 0, atol=1e-5)


def test_half_precision_keeps_statistics_in_float32():
    x = jnp.ones((2, 3, 4), jnp.bfloat16)
    y, given = BatchNorm().init_with_output(jax.random.key(0), x, train=True)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(given)} == {jnp.dtype("float32")}


def test_one_value_per_channel_is_refused():
    with pytest.raises(UserError, match="one value per channel"):
        BatchNorm().init(jax.random.key(0), jnp.ones((1, 4)), train=True)


@pytest.mark.parametrize("platform", ["cpu", "default"])
def test_layer_norm_is_that_of_flax_in_value_and_gradient(platform, monkeypatch):
    """On a sharded batch; on other platforms than CPUs the gradient takes another way."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, **ways: ways[platform](*args))
    rng = np.random.default_rng(2)
    mesh = jax.sharding.Mesh(jax.devices()[:2], "data")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(jnp.asarray(rng.normal(50, 2, (2, 3, 8)), jnp.float32), sharding)
    dy = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    params = {"scale": jnp.asarray(rng.uniform(0.5, 2, 8), jnp.float32), "bias": jnp.arange(8.0)}
    ours, theirs = (
        jax.vjp(jax.jit(lambda p, x, layer=layer: layer.apply({"params": p}, x)), params, x)
        for layer in (LayerNorm(1e-5), nn.LayerNorm(epsilon=1e-5, use_fast_variance=False))
    )
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-5)
    chex.assert_trees_all_close(ours[1](dy), theirs[1](dy), atol=2e-5)


def test_layer_norm_in_half_precision_has_float32_statistics():
    x = jnp.asarray(np.random.default_rng(3).normal(300, 1, (4, 64)), jnp.bfloat16)
    layer = LayerNorm(dtype=jnp.bfloat16)
    y, gradient = (
        layer.init_with_output(jax.random.key(0), x)[0],
        jax.grad(lambda x: (layer.init_with_output(jax.random.key(0), x)[0].astype(jnp.float32) ** 3).sum())(x),
    )
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=0.02)
    assert y.dtype == gradient.dtype == jnp.bfloat16
