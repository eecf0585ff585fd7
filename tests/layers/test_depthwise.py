"""The shifted products against XLA's grouped convolution, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.layers.depthwise import DepthwiseConv, depthwise, depthwise_3x3


def grouped(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers, feature_group_count=x.shape[-1]
    )


@pytest.mark.parametrize("shape", [(2, 5, 7, 4), (1, 1, 1, 3), (3, 1, 6, 2)])
def test_equals_the_grouped_convolution(shape):
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    kernel = jnp.asarray(rng.normal(size=(3, 3, 1, shape[-1])), jnp.float32)
    results = []
    for function in (depthwise_3x3, grouped):
        y, pull = jax.jit(lambda x, kernel, function=function: jax.vjp(function, x, kernel))(x, kernel)
        results.append((y, *pull(g)))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("size,stride", [(5, 1), (5, 2), (4, 3)])
def test_other_kernels_and_strides(size, stride):
    """Even and odd sides: where a stride leaves a border of another width on each side, the wider one comes last."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(size, size, 1, 3)), jnp.float32)
    for shape in ((2, 6, 9, 3), (1, 1, 2, 3)):
        x = jnp.asarray(rng.normal(size=shape), jnp.float32)
        numbers = ("NHWC", "HWIO", "NHWC")
        want = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=3
        )
        np.testing.assert_allclose(jax.jit(depthwise, static_argnums=2)(x, kernel, stride), want, atol=1e-5)


def test_half_precision_adds_in_float32():
    """256 + nine halves: bfloat16 has steps of 2 there, and would lose every half."""
    x = jnp.full((1, 3, 3, 1), 0.5, jnp.bfloat16).at[0, 0, 0, 0].set(256)
    y = depthwise_3x3(x, jnp.ones((3, 3, 1, 1), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16 and y[0, 1, 1, 0] == 260


def test_layer_has_the_layout_of_a_convolution():
    variables = DepthwiseConv().init(jax.random.key(0), jnp.zeros((1, 4, 4, 5)))
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes == {"kernel": (3, 3, 1, 5), "bias": (5,)}
    assert all(jnp.abs(leaf).max() <= 1 / 3 for leaf in jax.tree.leaves(variables))
