"""The middle of every example: any source, images larger and smaller than the window, evaluated as often as others."""

import numpy as np
import pytest
from PIL import Image

from jax_densevit.data.pipeline import evaluation_plan, evaluation_stream
from jax_densevit.data.raw import inspecting
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
    return {
        "name": "paired_folder",
        "images": str(tmp_path / "images"),
        "labels": str(tmp_path / "masks"),
        "classes": ("a", "b", "c"),
    }


def test_the_middle_and_never_more_than_there_is(folder):
    source = create_source(**folder, centre_crop=(6, 6))
    first_pixels = [(1, 3), (1, 3), (0, 7), (0, 0)]
    for i, (size, first) in enumerate(zip(SIZES, first_pixels, strict=True)):
        example = source.read(i)
        shape = min(size[0], 6), min(size[1], 6)
        assert source.size(i) == example["image"].shape[:2] == example["labels"].shape == shape
        assert tuple(example["image"][0, 0, :2]) == first
        rows, columns = example["image"][..., 0].astype(int), example["image"][..., 1].astype(int)
        np.testing.assert_array_equal(example["labels"], (rows + columns) % 3)
    assert len(source) == len(SIZES) and source.info.classes == ("a", "b", "c") and len(source.pairs) == len(SIZES)


def test_every_example_is_evaluated_once(folder):
    source = create_source(**folder, centre_crop=(6, 6))
    plan = evaluation_plan(source, batch_size=3)
    seen = [i for batch in evaluation_stream(source, plan) for i in batch["index"][batch["mask"]]]
    assert sorted(seen) == [0, 1, 2, 3]


def test_options(folder):
    whole = create_source(**folder, centre_crop=(0, 0))
    assert whole.size(0) == SIZES[0]
    with inspecting():
        assert create_source(**folder, centre_crop=(6, 6)).size(0) == SIZES[0]
    for size in ((6, 0), (6,), (-1, 6)):
        with pytest.raises(UserError, match="centre_crop=.* must be"):
            create_source(**folder, centre_crop=size)
    with pytest.raises(UserError, match="did you mean 'centre_crop'"):
        create_source(**folder, center_crop=(6, 6))


def test_the_student_s_cityscapes(tmp_path):
    """Resized to 140x280; random crops of 128x256 in training, their centre in validation."""
    from jax_densevit.data.pipeline import train_stream

    for split in ("train", "val"):
        for kind, suffix, mode in (("leftImg8bit", "leftImg8bit", "RGB"), ("gtFine", "gtFine_labelTrainIds", "L")):
            path = tmp_path / kind / split / f"bonn/bonn_0_{suffix}.png"
            path.parent.mkdir(parents=True)
            Image.new(mode, (64, 32)).save(path)
    cities = {"name": "cityscapes", "root": str(tmp_path), "size": (140, 280)}
    stream = train_stream(
        create_source(**cities, split="train"), batch_size=2, seed=0, crop=(128, 256), feeder="threads"
    )
    assert next(stream)["image"].shape == (2, 128, 256, 3)
    stream.close()
    val = create_source(**cities, split="val", centre_crop=(128, 256))
    assert val.size(0) == val.read(0)["labels"].shape == (128, 256)
