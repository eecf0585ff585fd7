"""Metrics of pictures against scikit-image and slow NumPy; exactness whatever the batches."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import deltaE_ciede2000, rgb2lab
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from jax_densevit.metrics.image import CIEDE2000, SSIM, Colorfulness, PictureMetrics, PixelErrors

EVERYTHING = PictureMetrics()
MEASURE = jax.jit(EVERYTHING.measure)


def pictures(seed, count, height=24, width=31):
    """Pairs of noisy gradients, uint8."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 1, height)[:, None, None] * rng.uniform(-200, 200, (count, 1, 1, 3))
    truth = np.clip(rng.uniform(40, 200, (count, 1, 1, 3)) + ramp + rng.normal(0, 9, (count, height, width, 3)), 0, 255)
    picture = np.clip(0.8 * truth + rng.normal(20, 8, truth.shape), 0, 255)
    return truth.round().astype(np.uint8), picture.round().astype(np.uint8)


def run(metric, *batches, measure=None):
    state = metric.empty()
    for batch in batches:
        state = metric.merge(state, jax.device_get((measure or jax.jit(metric.measure))(*batch)))
    return metric.compute(state)


def colorfulness(image):
    red, green, blue = np.moveaxis(image.astype(np.float64), -1, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    return np.sqrt(rg.var() + yb.var()) + 0.3 * np.sqrt(rg.mean() ** 2 + yb.mean() ** 2)


def ssim(truth, picture):
    """Only windows that lie wholly inside count: scikit-image's own mean is over those too."""
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    return structural_similarity(truth, picture, channel_axis=-1, **options)


def test_against_scikit_image_and_numpy():
    truth, picture = pictures(0, 5)
    found = run(EVERYTHING, (truth[:2], picture[:2]), (truth[2:], picture[2:]))
    difference = (truth.astype(np.float64) - picture) / 255
    pairs = list(zip(truth, picture, strict=True))
    delta = [colorfulness(b) - colorfulness(a) for a, b in pairs]
    expected = {
        "L1": np.abs(difference).mean(),
        "charbonnier": np.sqrt(difference**2 + 1e-6).mean(),
        "MSE": mean_squared_error(truth / 255, picture / 255),
        "PSNR": np.mean([peak_signal_noise_ratio(a, b) for a, b in pairs]),
        "PSNR_of_all_pixels": peak_signal_noise_ratio(truth, picture),
        "colorfulness": np.mean([colorfulness(b) for _, b in pairs]),
        "true_colorfulness": np.mean([colorfulness(a) for a, _ in pairs]),
        "delta_colorfulness": np.mean(delta),
        "abs_delta_colorfulness": np.mean(np.abs(delta)),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name
    assert found["SSIM"] == pytest.approx(np.mean([ssim(a, b) for a, b in pairs]), abs=1e-5)
    differences = [deltaE_ciede2000(rgb2lab(a), rgb2lab(b)).mean() for a, b in pairs]
    assert found["CIEDE2000"] == pytest.approx(np.mean(differences), abs=2e-3)
    assert found["pictures"] == 5 and found["identical"] == 0 and found["too_small_for_SSIM"] == 0


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=3))
def test_any_batching_padding_and_order_gives_the_same_numbers(seed, cuts):
    """Batches are filled up with masked examples and arrays with room, as an evaluation does; merged in any order."""
    truth, picture = pictures(seed, sum(cuts))
    rng = np.random.default_rng(seed)
    states, start = [], 0
    for cut in cuts:
        rows = [start + i if i < cut else start for i in range(4)]
        roomy = [rng.integers(0, 256, (4, 32, 48, 3)).astype(np.uint8) for _ in range(2)]
        for array, images in zip(roomy, (truth, picture), strict=True):
            array[:, :24, :31] = images[rows]
        states.append(jax.device_get(MEASURE(*roomy, np.arange(4) < cut, (24, 31))))
        start += cut
    all_of_them = [np.concatenate([images, images[[0] * (12 - start)]]) for images in (truth, picture)]
    whole = jax.device_get(MEASURE(*all_of_them, np.arange(12) < start))
    whole = EVERYTHING.merge(EVERYTHING.empty(), whole)
    forward = backward = EVERYTHING.empty()
    for i in range(len(states)):
        forward = EVERYTHING.merge(forward, states[i])
        backward = EVERYTHING.merge(EVERYTHING.merge(EVERYTHING.empty(), states[-1 - i]), backward)
    expected, found = EVERYTHING.compute(whole), EVERYTHING.compute(forward)
    assert EVERYTHING.compute(backward) == found
    for name in ("SSIM", "CIEDE2000"):  # float32 per pixel: its last bit depends on the compiled shape
        assert found.pop(name) == pytest.approx(expected.pop(name), abs=2e-6)
    assert found == expected
    assert expected["pictures"] == sum(cuts)


def test_pictures_of_many_sizes():
    found, values = [], []
    for i, (height, width) in enumerate([(11, 11), (12, 40), (33, 11), (140, 75)]):
        truth, picture = pictures(i, 2, height, width)
        found.append((truth, picture))
        values += [ssim(a, b) for a, b in zip(truth, picture, strict=True)]
    assert run(SSIM(), *found)["SSIM"] == pytest.approx(np.mean(values), abs=1e-5)


@pytest.mark.parametrize("size", [(10, 30), (30, 10), (1, 1), (3, 400)])
def test_a_picture_smaller_than_the_window_has_no_ssim(size):
    truth, picture = pictures(0, 2, *size)
    larger = pictures(1, 1)
    assert run(SSIM(), (truth, picture)) == {"SSIM": None, "too_small_for_SSIM": 2}
    both = run(SSIM(), (truth, picture), larger)
    assert both["too_small_for_SSIM"] == 2 and both["SSIM"] == pytest.approx(ssim(larger[0][0], larger[1][0]), abs=1e-5)
    roomy = [np.pad(x, ((0, 0), (0, 40), (0, 40), (0, 0))) for x in (truth, picture)]
    assert run(SSIM(), (*roomy, None, size)) == {"SSIM": None, "too_small_for_SSIM": 2}


def test_perfect_and_empty():
    truth, picture = pictures(3, 2)
    found = run(EVERYTHING, (truth, truth), (truth[:1], picture[:1]))
    assert found["identical"] == 2 and found["PSNR"] == pytest.approx(peak_signal_noise_ratio(truth[0], picture[0]))
    perfect = run(EVERYTHING, (truth, truth))
    assert (perfect["L1"], perfect["PSNR"], perfect["PSNR_of_all_pixels"]) == (0, None, None)
    assert perfect["SSIM"] == pytest.approx(1, abs=1e-5) and perfect["CIEDE2000"] == 0
    assert perfect["charbonnier"] == pytest.approx(1e-3) and perfect["delta_colorfulness"] == 0
    nothing = run(EVERYTHING, (truth, picture, np.zeros(2, bool)))
    assert nothing["pictures"] == 0 and {nothing[key] for key in ("L1", "PSNR", "SSIM", "CIEDE2000")} == {None}


def test_colorfulness_is_signed_and_tells_pale_from_gaudy():
    truth, _ = pictures(4, 1)
    gray = np.repeat(truth.mean(-1, keepdims=True), 3, -1)
    pale, gaudy = (np.clip(gray + f * (truth - gray), 0, 255).round().astype(np.uint8) for f in (0.5, 1.3))
    assert run(Colorfulness(), (truth, pale))["delta_colorfulness"] < 0
    assert run(Colorfulness(), (truth, gaudy))["delta_colorfulness"] > 0
    assert run(Colorfulness(), (truth, gray.astype(np.uint8)))["colorfulness"] == 0
    # Reds that cancel greens: without their signs, both would count as equally red.
    halves = np.zeros((1, 4, 4, 3), np.uint8)
    halves[:, :2, :, 0] = halves[:, 2:, :, 1] = 200
    assert run(Colorfulness(), (halves, halves))["colorfulness"] == pytest.approx(colorfulness(halves[0]))


def test_sums_beyond_int32_are_exact():
    """A wide picture of the worst values: 3 * 255^2 per pixel, 2 * 10^9 in less than two rows."""
    black, white = np.zeros((1, 6, 9001, 3), np.uint8), np.full((1, 6, 9001, 3), 255, np.uint8)
    assert run(PixelErrors(), (black, white))["PSNR"] == 0
    yellow = white * np.array([1, 1, 0], np.uint8)
    found = run(Colorfulness(), (yellow, black))
    assert found["true_colorfulness"] == pytest.approx(0.3 * 255) and found["colorfulness"] == 0


def test_ciede2000_of_known_pictures():
    black, white = np.zeros((1, 3, 5, 3), np.uint8), np.full((1, 3, 5, 3), 255, np.uint8)
    assert run(CIEDE2000(), (black, white))["CIEDE2000"] == pytest.approx(100, abs=1e-3)


def test_charbonnier_takes_its_epsilon():
    truth, picture = pictures(6, 1)
    difference = (truth.astype(np.float64) - picture) / 255
    found = run(PixelErrors(0.1), (truth, picture))["charbonnier"]
    assert found == pytest.approx(np.sqrt(difference**2 + 0.01).mean(), rel=1e-12) and math.isfinite(found)
