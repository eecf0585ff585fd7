"""Convolution blocks against their definitions."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.layers.convolution import ConvNorm, Upsample, convolve
from jax_densevit.layers.kernel_gradient import as_on_accelerators


@pytest.mark.parametrize("factor", [2, 3])
def test_upsample_writes_one_patch_per_pixel(factor):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    kernel = rng.normal(size=(factor, factor, 5, 6)).astype(np.float32)
    bias = rng.normal(size=6).astype(np.float32)
    y = Upsample(6, factor).apply({"params": {"kernel": kernel, "bias": bias}}, jnp.asarray(x))
    assert y.shape == (2, 3 * factor, 4 * factor, 6)
    for i in range(3 * factor):
        for j in range(4 * factor):
            expected = x[:, i // factor, j // factor] @ kernel[i % factor, j % factor] + bias
            np.testing.assert_allclose(y[:, i, j], expected, atol=1e-5)


def test_upsample_is_a_transposed_convolution():
    """Equal to the gradient of the strided convolution with the same kernel: what a transposed convolution is."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(1, 3, 3, 4)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(2, 2, 4, 5)), jnp.float32)
    strided = lambda y: jax.lax.conv_general_dilated(  # noqa: E731
        y, kernel.swapaxes(2, 3), (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    (expected,) = jax.vjp(strided, jnp.zeros((1, 6, 6, 5)))[1](x)
    given = {"params": {"kernel": kernel, "bias": jnp.zeros(5)}}
    np.testing.assert_allclose(Upsample(5).apply(given, x), expected, atol=1e-5)


def test_upsample_starts_at_unit_gain():
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 64))
    y, _ = Upsample(64).init_with_output(jax.random.key(1), x)
    assert 0.85 < float(y.std()) < 1.15


@pytest.mark.parametrize("kernel_size,use_bias", [(1, False), (3, True)])
def test_conv_norm_is_convolution_then_normalisation_then_relu(kernel_size, use_bias):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 5, 4, 3)).astype(np.float32)
    block = ConvNorm(6, kernel_size, use_bias)
    given = block.init(jax.random.key(0), jnp.asarray(x), train=False)
    assert ("bias" in given["params"]["conv"]) == use_bias
    if use_bias:
        given["params"]["conv"]["bias"] = jnp.asarray(rng.normal(size=6), jnp.float32)
    kernel = np.asarray(given["params"]["conv"]["kernel"])
    pad = kernel_size // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    y = sum(padded[:, i : i + 5, j : j + 4] @ kernel[i, j] for i in range(kernel_size) for j in range(kernel_size))
    y = y + np.asarray(given["params"]["conv"].get("bias", 0.0))
    out, _ = block.apply(given, jnp.asarray(x), train=True, mutable=["batch_stats"])
    expected = np.maximum((y - y.mean((0, 1, 2))) / np.sqrt(y.var((0, 1, 2)) + 1e-5), 0)
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize(
    "kernel_size,options",
    [
        (1, {}),
        (1, {"padding": 0, "use_bias": True}),
        (1, {"padding": 1}),
        (1, {"strides": 2}),
        (1, {"feature_group_count": 2}),
        (1, {"input_dilation": 2, "padding": 0}),
        (1, {"padding": "VALID", "kernel_dilation": 2}),
        (3, {}),
        (3, {"padding": "VALID", "features": 96, "channels": 48}),
        (3, {"padding": ((2, 1), (0, 1)), "features": 48, "channels": 96}),
        (2, {"padding": ((1, 0), (0, 1)), "features": 5, "channels": 20}),
        (3, {"features": 96, "channels": 48, "strides": 2}),
        (3, {"features": 96, "channels": 48, "kernel_dilation": 2}),
        (3, {"features": 96, "channels": 48, "padding": 3}),
    ],
)
def test_convolve_is_the_convolution(kernel_size, options):
    """Products, or gradients that are products, wherever they may stand for it; whatever else stays a convolution."""
    options = {"features": 8, "channels": 6, **options}
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, options.pop("channels")))
    theirs = nn.Conv(kernel_size=(kernel_size,) * 2, **options)
    ours = theirs.clone(conv_general_dilated=convolve)
    variables = theirs.init(jax.random.key(1), x)
    results = [jax.vjp(model.apply, variables, x) for model in (ours, theirs)]
    gradients = [pull(jnp.cos(y)) for y, pull in results]
    np.testing.assert_allclose(results[0][0], results[1][0], atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *gradients)


def test_plans_for_accelerators_have_their_gradients():
    """The products of a CPU are not what a TPU would hold and send."""

    def program():
        layer, x = ConvNorm(8), jnp.zeros((2, 8, 8, 8))
        variables = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, train=False))
        gradient = jax.grad(lambda variables: layer.apply(variables, x, train=False).sum())
        return str(jax.make_jaxpr(gradient)(variables))

    with as_on_accelerators():
        planned = program()
    assert "platform_index" in program() and "platform_index" not in planned and "conv_general_dilated" in planned
