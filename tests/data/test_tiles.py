"""Windows side by side: every pixel of the middle once, small images whole, as a config names them."""

import numpy as np
import pytest
from PIL import Image

from jax_densevit.data.pipeline import evaluation_plan, evaluation_stream
from jax_densevit.data.sources import create_source
from jax_densevit.errors import UserError

SIZES = ((8, 12), (9, 13), (4, 20), (3, 2))


@pytest.fixture
def folder(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for i, size in enumerate(SIZES):
        rows, columns = np.mgrid[: size[0], : size[1]].astype(np.uint8)
        Image.fromarray(np.stack([rows, columns, rows], -1)).save(tmp_path / f"images/{i}.png")
        Image.fromarray((rows + columns) % 3).save(tmp_path / f"masks/{i}.png")
    places = {"images": str(tmp_path / "images"), "labels": str(tmp_path / "masks")}
    return {"name": "paired_folder", **places, "classes": ("a", "b", "c")}


def test_every_pixel_once(folder):
    source = create_source(**folder, tiles=(4, 6))
    whole = create_source(**folder)
    assert len(source) == 4 + 4 + 3 + 1
    seen = {index: np.zeros(size, int) for index, size in enumerate(SIZES)}
    for index in range(len(source)):
        example = source.read(index)
        image, row, column = (int(part) for part in example["id"].replace(",", " ").split())
        assert source.size(index) == example["image"].shape[:2] == example["labels"].shape
        y, x = (int(value) for value in example["image"][0, 0, :2])
        height, width = source.size(index)
        seen[image][y : y + height, x : x + width] += 1
        np.testing.assert_array_equal(example["labels"], whole.read(image)["labels"][y : y + height, x : x + width])
        assert (row, column) == (y // 4, x // 6)
    covered = {0: (8, 12), 1: (8, 12), 2: (4, 18), 3: (3, 2)}
    for image, counts in seen.items():
        assert counts.max() == 1 and counts.sum() == np.prod(covered[image])


def test_of_the_middle_and_in_an_evaluation(folder):
    source = create_source(**folder, centre_crop=(4, 12), tiles=(4, 6))
    assert len(source) == 2 + 2 + 2 + 1 and source.info.classes == ("a", "b", "c")
    plan = evaluation_plan(source, 4)
    batches = list(evaluation_stream(source, plan, threads=1))
    assert sum(int(batch["mask"].sum()) for batch in batches) == 7


def test_mistakes_are_named(folder):
    with pytest.raises(UserError, match="both positive"):
        create_source(**folder, tiles=(0, 4))
    with pytest.raises(UserError, match="did you mean 'tiles'"):
        create_source(**folder, tile=(4, 4))


def test_photos_can_be_shrunk():
    full = create_source("sample_photos", split="val")
    small = create_source("sample_photos", split="val", side=100)
    assert small.size(0) == small.read(0)["image"].shape[:2] and max(small.size(0)) == 100
    height, width = full.size(0)
    assert abs(small.size(0)[0] / small.size(0)[1] - height / width) < 0.01
    assert abs(full.read(0)["image"].mean() - small.read(0)["image"].mean()) < 1
    assert create_source("sample_photos", split="val", side=5000).size(0) == full.size(0)
    with pytest.raises(UserError, match="side=-1"):
        create_source("sample_photos", side=-1)
