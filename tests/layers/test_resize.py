"""Bilinear and nearest resizing against definitions written out in NumPy, and against recorded PyTorch outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_densevit.layers.resize import resize_bilinear


def bilinear_by_pixel(x, size, align_corners):
    """The definition, one output pixel at a time, in float64."""
    (h, w), (height, width) = x.shape[:2], size
    out = np.zeros((height, width, x.shape[2]))
    for i in range(height):
        for j in range(width):
            if align_corners:
                r = i * (h - 1) / max(height - 1, 1)
                c = j * (w - 1) / max(width - 1, 1)
            else:
                r = max((i + 0.5) * h / height - 0.5, 0)
                c = max((j + 0.5) * w / width - 0.5, 0)
            r0, c0 = min(int(r), h - 1), min(int(c), w - 1)
            r1, c1 = min(r0 + 1, h - 1), min(c0 + 1, w - 1)
            a, b = r - r0, c - c0
            out[i, j] = (1 - a) * ((1 - b) * x[r0, c0] + b * x[r0, c1]) + a * ((1 - b) * x[r1, c0] + b * x[r1, c1])
    return out


sides = st.integers(1, 9)


@settings(max_examples=60, deadline=None)
@given(h=sides, w=sides, height=sides, width=sides, factor=st.booleans(), align_corners=st.booleans())
def test_bilinear_is_its_definition(h, w, height, width, factor, align_corners):
    size = (h * height, w * width) if factor else (height, width)
    x = np.random.default_rng(h * 100 + w).normal(size=(h, w, 2)).astype(np.float32)
    y = resize_bilinear(jnp.asarray(x), size, align_corners)
    np.testing.assert_allclose(y, bilinear_by_pixel(x, size, align_corners), atol=2e-6)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(4, 6), (8, 12), (5, 4), (12, 7)])
def test_gradient_is_the_transpose(size, align_corners):
    """<resize(x), y> = <x, grad>: holds to rounding only if backward is the exact adjoint of forward."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 4, 6, 3)), jnp.float32)
    y = jnp.asarray(rng.normal(size=(2, *size, 3)), jnp.float32)
    out, pull = jax.vjp(lambda x: resize_bilinear(x, size, align_corners), x)
    (back,) = pull(y)
    np.testing.assert_allclose(jnp.vdot(out, y), jnp.vdot(x, back), rtol=1e-4)
    # A constant stays that constant, so the adjoint keeps the sum.
    np.testing.assert_allclose(back.sum(), y.sum(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(resize_bilinear(jnp.full((1, 4, 6, 1), 3.7), size, align_corners), 3.7, rtol=1e-6)


@pytest.mark.parametrize("size", [(8, 12), (5, 7)])
def test_transforms_and_leading_axes_agree(size):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 4, 6, 2)), jnp.float32)
    whole = jax.jit(resize_bilinear, static_argnums=1)(x, size)
    assert whole.shape == (2, 3, *size, 2)
    mapped = jax.vmap(jax.vmap(lambda x: resize_bilinear(x, size)))(x)
    np.testing.assert_allclose(whole, mapped, atol=1e-6)
    np.testing.assert_allclose(whole[1, 2], resize_bilinear(x[1, 2], size), atol=1e-6)


def test_half_precision_rounds_once():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 5, 4)), jnp.bfloat16)
    for size in ((10, 15), (7, 3)):
        y = resize_bilinear(x, size)
        assert y.dtype == jnp.bfloat16
        np.testing.assert_array_equal(y, resize_bilinear(x.astype(jnp.float32), size).astype(jnp.bfloat16))


def test_refusals():
    with pytest.raises(TypeError, match="floating"):
        resize_bilinear(jnp.zeros((4, 4, 1), jnp.uint8), (2, 2))
    with pytest.raises(ValueError, match="positive"):
        resize_bilinear(jnp.zeros((4, 4, 1)), (0, 2))


@pytest.mark.reference
def test_recorded_outputs(reference_data):
    recorded = np.load(reference_data / "goldens/setr/misc_resize_loss_miou_sched.npz", allow_pickle=False)
    x = jnp.asarray(recorded["x"]).transpose(0, 2, 3, 1)
    for name in ("x4_ac0", "to_13x17_ac0", "x4_ac1", "to_13x17_ac1"):
        expected = recorded[name].transpose(0, 2, 3, 1)
        y = resize_bilinear(x, expected.shape[1:3], align_corners=name.endswith("1"))
        np.testing.assert_allclose(y, expected, atol=1e-6, err_msg=name)
