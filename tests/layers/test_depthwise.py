"""The shifted products against XLA's grouped convolution, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.layers.depthwise import DepthwiseConv, depthwise


def grouped(x, kernel, stride, bias):
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=x.shape[-1]
    )
    return y + bias


@pytest.mark.parametrize(
    "size,stride,platform",
    [(3, 1, "cpu"), (3, 2, "cpu"), (5, 1, "cpu"), (5, 2, "cpu"), (4, 3, "cpu"), (1, 2, "cpu")]
    # Other platforms than CPUs sum the gradient to the kernel at once.
    + [(3, 1, "default"), (4, 3, "default")],
)
def test_equals_the_grouped_convolution(size, stride, platform, monkeypatch):
    """Even and odd sides: where a stride leaves a border of another width on each side, the wider one comes last."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, **ways: ways[platform](*args))
    rng = np.random.default_rng(0)
    bias = jnp.asarray(rng.normal(size=3), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(size, size, 1, 3)), jnp.float32)
    for shape in ((2, 6, 9, 3), (1, 1, 2, 3)):
        x = jnp.asarray(rng.normal(size=shape), jnp.float32)
        results = []
        for function in (depthwise, grouped):
            y, pull = jax.vjp(lambda *args, function=function: function(*args[:2], stride, args[2]), x, kernel, bias)
            results.append((y, *pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))))
        for ours, theirs in zip(*results, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_half_precision_adds_in_float32():
    """256 + nine halves: bfloat16 has steps of 2 there, and would lose every half."""
    x = jnp.full((1, 3, 3, 1), 0.5, jnp.bfloat16).at[0, 0, 0, 0].set(256)
    y = depthwise(x, jnp.ones((3, 3, 1, 1), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and y[0, 1, 1, 0] == 260


def test_layer_has_the_layout_of_a_convolution():
    variables = DepthwiseConv().init(jax.random.key(0), jnp.zeros((1, 4, 4, 5)))
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes == {"kernel": (3, 3, 1, 5), "bias": (5,)}
    assert all(jnp.abs(leaf).max() <= 1 / 3 for leaf in jax.tree.leaves(variables))
