"""Gray photographs are found whatever JPEG did to them; photographs in color are not taken for gray."""

import io

import numpy as np
import pytest
from PIL import Image
from skimage import data

from jax_densevit.data.gray import is_gray

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _gray(image: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(Image.fromarray(image).convert("L"))[..., None], 3, axis=2)


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("quality", [30, 75, 95])
def test_photos_in_color_and_their_gray_versions(name, quality):
    photo = getattr(data, name)()
    assert not is_gray(_jpeg(photo, quality))
    assert is_gray(_jpeg(_gray(photo), quality))


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_a_scanner_s_color_noise_and_a_faint_tint_are_no_color(quality):
    gray = _gray(data.astronaut()).astype(np.float64)
    noise = np.random.default_rng(0).normal(0, 2, gray.shape)
    tinted = np.clip(gray + noise + (4, 0, -4), 0, 255).astype(np.uint8)
    assert is_gray(_jpeg(tinted, quality))


def test_a_small_colored_thing_makes_a_photo_one_in_color_and_single_pixels_do_not():
    photo = _gray(data.astronaut())  # 512x512: a thousandth is 262.1 pixels
    photo[100, :262] = (200, 30, 30)
    assert is_gray(photo)
    photo[101, 0] = (200, 30, 30)
    assert not is_gray(photo)


def test_differences_do_not_wrap_around():
    for color, gray in (((255, 0, 0), False), ((0, 21, 0), False), ((250, 255, 235), True), ((0, 20, 0), True)):
        assert is_gray(np.full((4, 5, 3), color, np.uint8)) is gray
