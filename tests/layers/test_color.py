"""Color spaces against scikit-image, published pairs of colors, and what must hold for every color."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import color as oracle

from jax_densevit.errors import UserError
from jax_densevit.layers import color

LEVELS = np.arange(256) / 255
GRAYS = np.repeat(LEVELS[:, None], 3, 1).astype(np.float32)

# Pairs 1, 7-10, 13, 17, 20, 24, 25, 31, 34 of Sharma, Wu and Dalal's table: L a b of both, difference.
SHARMA = [
    ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
    ((50, 0, 0), (50, -1, 2), 2.3669),
    ((50, -1, 2), (50, 0, 0), 2.3669),
    ((50, 2.49, -0.001), (50, -2.49, 0.0009), 7.1792),
    ((50, 2.49, -0.001), (50, -2.49, 0.0010), 7.1792),
    ((50, -0.001, 2.49), (50, 0.0009, -2.49), 4.8045),
    ((50, 2.5, 0), (73, 25, -18), 27.1492),
    ((50, 2.5, 0), (58, 24, 15), 19.4535),
    ((50, 2.5, 0), (50, 3.2592, 0.335), 1.0),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((90.8027, -2.0831, 1.441), (91.1528, -1.6435, 0.0447), 1.4441),
    ((2.0776, 0.0795, -1.135), (0.9033, -0.0636, -0.5514), 0.9082),
]


def colors(seed=0, count=4000):
    rng = np.random.default_rng(seed)
    corners = np.stack(np.meshgrid(*[[0, 1]] * 3), -1).reshape(-1, 3)
    return np.concatenate([rng.random((count, 3)), corners, GRAYS]).astype(np.float32)


def test_linear_light_and_xyz_are_those_of_scikit_image():
    rgb = colors()
    linear = color.srgb_to_linear(rgb)
    np.testing.assert_allclose(linear @ color.RGB_TO_XYZ.T, oracle.rgb2xyz(rgb), atol=2e-6)
    np.testing.assert_allclose(color.linear_to_srgb(linear), rgb, atol=2e-6)


def test_lab_is_that_of_scikit_image_but_for_the_white():
    rgb = colors()
    lab = np.asarray(color.rgb_to_lab(rgb))
    np.testing.assert_allclose(lab, oracle.rgb2lab(rgb), atol=0.01)
    np.testing.assert_allclose(lab[..., 0], oracle.rgb2lab(rgb)[..., 0], atol=1e-4)
    np.testing.assert_allclose(color.lab_to_rgb(lab), rgb, atol=2e-5)


def test_every_gray_has_no_chroma_and_every_8_bit_color_comes_back():
    lab = np.asarray(color.rgb_to_lab(GRAYS))
    assert np.abs(lab[:, 1:]).max() < 1e-4
    assert lab[0, 0] == pytest.approx(0, abs=1e-5) and lab[-1, 0] == pytest.approx(100, abs=1e-4)
    grid = np.stack(np.meshgrid(*[np.arange(0, 256, 5)] * 3), -1).astype(np.float32)
    back = jax.jit(lambda rgb: jnp.round(255 * color.lab_to_rgb(color.rgb_to_lab(rgb / 255))))(grid)
    np.testing.assert_array_equal(back, grid)


@pytest.mark.parametrize("formula", color.GRAYS)
def test_a_gray_picture_stays_as_it_is(formula):
    np.testing.assert_allclose(color.to_gray(GRAYS, formula), LEVELS, atol=1e-6)


def test_gray_formulas_by_name():
    rgb = colors()
    np.testing.assert_allclose(color.to_gray(rgb, "bt709"), oracle.rgb2gray(rgb), atol=3e-4)  # 0.2125, 0.7154, 0.0721
    np.testing.assert_allclose(color.to_gray(rgb, "bt601"), oracle.rgb2ycbcr(rgb)[..., 0] / 219 - 16 / 219, atol=1e-4)
    np.testing.assert_allclose(color.to_gray(rgb, "study_bgr"), color.to_gray(rgb[:, ::-1], "bt601"), atol=1e-6)
    np.testing.assert_allclose(color.to_gray(rgb, "mean"), rgb.mean(-1), atol=1e-6)
    gray = np.asarray(color.to_gray(rgb, "lab_l"))
    expected = oracle.rgb2lab(rgb)[..., 0]
    np.testing.assert_allclose(oracle.rgb2lab(np.repeat(gray[:, None], 3, 1))[..., 0], expected, atol=1e-3)
    with pytest.raises(UserError, match="no gray formula named 'bt602'; did you mean 'bt601'"):
        color.to_gray(rgb, "bt602")


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0, 128))
def test_colored_gray_has_its_lightness_and_lies_in_the_gamut(seed, scale):
    rng = np.random.default_rng(seed)
    gray = rng.random(64).astype(np.float32)
    gray[:2] = 0, 1
    ab = (scale * rng.uniform(-1, 1, (64, 2))).astype(np.float32)
    rgb = np.asarray(color.color_gray(gray, ab))
    assert rgb.min() >= 0 and rgb.max() <= 1
    np.testing.assert_allclose(
        color.rgb_to_lab(rgb)[:, 0], color.rgb_to_lab(gray[:, None].repeat(3, 1))[:, 0], atol=2e-3
    )


def test_colored_gray_gives_a_color_back_that_the_gamut_has():
    rgb = colors()
    lab = color.rgb_to_lab(rgb)
    np.testing.assert_allclose(color.color_gray(color.to_gray(rgb, "lab_l"), lab[:, 1:]), rgb, atol=2e-4)


def test_ciede2000_of_published_pairs():
    first, second, expected = (np.array(column, np.float32) for column in zip(*SHARMA, strict=True))
    np.testing.assert_allclose(color.ciede2000(first, second), expected, atol=2e-4)
    np.testing.assert_allclose(color.ciede2000(second, first), expected, atol=2e-4)
    np.testing.assert_array_equal(color.ciede2000(first, first), 0)


def test_ciede2000_is_that_of_scikit_image():
    rng = np.random.default_rng(1)
    first, second = (oracle.rgb2lab(rng.random((5000, 3))) for _ in range(2))
    second[:2000] = first[:2000] + rng.normal(0, 1, (2000, 3))
    first[4000:, 1:] = 0  # one side without chroma
    second[4500:, 1:] = 0
    expected = oracle.deltaE_ciede2000(first, second)
    np.testing.assert_allclose(color.ciede2000(first, second), expected, atol=2e-3, rtol=1e-5)


def test_gradients_are_finite_everywhere():
    rgb = np.concatenate([colors(count=50), [[-0.2, 0.5, 1.3], [0, 0, 0], [1, 1, 1]]]).astype(np.float32)
    for function in (
        lambda x: color.rgb_to_lab(x).sum(),
        lambda x: color.lab_to_rgb(100 * x).sum(),
        lambda x: color.to_gray(x, "lab_l").sum(),
    ):
        assert np.isfinite(jax.jit(jax.grad(function))(rgb)).all()
