"""The shifted products against XLA's grouped convolution, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.layers.depthwise import DepthwiseConv, depthwise


def grouped(x, kernel, stride):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=x.shape[-1]
    )


@pytest.mark.parametrize("size,stride", [(3, 1), (3, 2), (5, 1), (5, 2), (4, 3), (1, 2)])
def test_equals_the_grouped_convolution(size, stride):
    """Even and odd sides: where a stride leaves a border of another width on each side, the wider one comes last."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(size, size, 1, 3)), jnp.float32)
    for shape in ((2, 6, 9, 3), (1, 1, 2, 3)):
        x = jnp.asarray(rng.normal(size=shape), jnp.float32)
        results = []
        for function in (depthwise, grouped):
            y, pull = jax.vjp(lambda x, kernel, function=function: function(x, kernel, stride), x, kernel)
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
