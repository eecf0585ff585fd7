"""What ColTran's tasks make of pictures, against the original TensorFlow pipeline (only with --reference-data)."""

import numpy as np
import pytest

from jax_densevit.data.source import DataInfo
from jax_densevit.tasks import create_task

pytestmark = pytest.mark.reference

INFO = DataInfo("photos")


@pytest.fixture(scope="module")
def golden(reference_data):
    return np.load(reference_data / "goldens" / "coltran" / "utils.npz", allow_pickle=False)


@pytest.mark.parametrize("case", ["11x18_to_8", "18x11_to_8", "9x14_to_4", "16x16_to_8"])
def test_the_square_in_the_middle(golden, case):
    image, expected = golden[f"square_eval/{case}/in"], golden[f"square_eval/{case}/out"]
    side = len(expected)
    task = create_task("coltran_color_upsampler", INFO, image_size=side, coarse_size=side, photo_size=side)
    *_, truth = task._examples({"image": image[None]})
    np.testing.assert_array_equal(np.moveaxis(np.asarray(truth[0]), 0, -1), expected)


def test_symbols_and_gray(golden):
    task = create_task("coltran_colorizer", INFO, image_size=1, photo_size=1)
    gray, _ = task.inputs({"image": golden["gray/rgb"][:, None, None]})
    np.testing.assert_array_equal(gray[:, 0, 0], golden["gray/from_int32"])
    # Every color of three bits, from the middle of its bin.
    _, symbols = task.inputs({"image": (32 * golden["bins/labels"] + 16).astype(np.uint8)[:, None, None]})
    np.testing.assert_array_equal(symbols[:, 0, 0], golden["bins/labels_to_bins"])


def test_coarse_pictures_of_the_spatial_upsampler(golden):
    task = create_task("coltran_spatial_upsampler", INFO, image_size=16, coarse_size=4, photo_size=16)
    image = golden["down_up/in"].astype(np.uint8)[None]
    values, _, _, truth = task._examples({"image": image})
    for found, name in ((truth, "targets"), (values, "targets_4_up_back")):
        np.testing.assert_array_equal(np.moveaxis(np.asarray(found[0]), 0, -1), golden[f"down_up/{name}"])
