"""Ways of resizing for feature networks: where samples lie, what is averaged, and how far the modes are apart."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jax_densevit.data.resize_modes import SCALES, resize_picture
from jax_densevit.errors import UserError
from jax_densevit.layers.resize import resize_bilinear


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("mode", SCALES)
def test_same_size_and_constant(mode):
    image = noise(9, 14)
    found = resize_picture(image, (9, 14), mode)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, image, atol=1e-4)
    np.testing.assert_allclose(resize_picture(np.full((5, 8, 3), 77, np.uint8), (16, 3), mode), 77, atol=1e-4)


def test_samples_of_tf1():
    """Sample i at i * given / wanted, the far edge repeated: on a ramp the values say where the samples lie."""
    ramp = np.broadcast_to(10 * np.arange(8, dtype=np.uint8)[None, :, None], (4, 8, 3))
    found = resize_picture(ramp, (4, 20), "tf1")[0, :, 0]
    np.testing.assert_allclose(found, np.minimum(10 * np.arange(20) * 0.4, 70), atol=1e-4)
    np.testing.assert_allclose(resize_picture(ramp, (4, 3), "tf1")[0, :, 0], [0, 80 / 3, 160 / 3], atol=1e-4)
    turned = resize_picture(ramp.transpose(1, 0, 2), (20, 4), "tf1")
    np.testing.assert_allclose(turned[:, 0, 0], found, atol=1e-5)


@pytest.mark.parametrize("size", [(299, 299), (7, 41), (5, 4)])
def test_pytorch_fid_is_bilinear_between_middles(size):
    image = noise(11, 17)
    want = resize_bilinear(jnp.asarray(image, jnp.float32), size)
    np.testing.assert_allclose(resize_picture(image, size, "pytorch_fid"), want, atol=2e-3)


def test_clean_is_pillow_without_its_rounding():
    image = 100 + noise(40, 25) // 5  # far from 0 and 255, where Pillow cuts after each axis
    for size in ((13, 9), (60, 31)):
        found = resize_picture(image, size, "clean")
        rounded = np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC), np.float32)
        assert np.abs(found - rounded).max() < 2
        assert np.abs(found - rounded).mean() < 0.5 and np.any(found != np.rint(found))
    hard = np.repeat(np.repeat(noise(4, 4) // 128 * 255, 4, 0), 4, 1)
    found = resize_picture(hard.astype(np.uint8), (37, 37), "clean")
    assert found.min() == 0 and found.max() == 255  # bicubic reaches beyond both; that is cut


def test_antialiasing():
    """Stripes of one pixel, at a third: averages are gray, samples are not."""
    stripes = np.zeros((60, 60, 3), np.uint8)
    stripes[:, ::2] = 255
    spread = {mode: resize_picture(stripes, (20, 20), mode).std() for mode in SCALES}
    assert spread["clean"] < 30 and spread["torchmetrics"] < 30
    assert spread["tf1"] > 100 and spread["pytorch_fid"] > 100


def test_unknown_mode():
    with pytest.raises(UserError, match="did you mean 'tf1'"):
        resize_picture(noise(4, 4), (2, 2), "tf")
