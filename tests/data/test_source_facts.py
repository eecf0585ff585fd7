"""What a source's facts say without its data is what the source itself says."""

import numpy as np
import pytest
from PIL import Image

from jax_densevit.data.sources.registry import create_source, source_facts
from jax_densevit.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for part in ("images", "instances"):
        (tmp_path / "train" / part).mkdir(parents=True)
        pixels = np.random.default_rng(0).integers(0, 2, (8, 8, *((3,) if part == "images" else ())), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "train" / part / "a.png")
    return tmp_path


def test_facts_are_those_of_the_source(folder):
    train = folder / "train"
    pair = {"images": str(train / "images"), "labels": str(train / "instances"), "classes": ("one", "two")}
    for name, options in (
        ("paired_folder", pair),
        ("paired_folder", {**pair, "palette": ((0, 0, 1), (9, 9, 9)), "std": (0.5,) * 3}),
        ("instance_folder", {"root": str(folder), "split": "train", "stretch": (1.0, 99.0)}),
        ("photo_folder", {"root": str(train / "images"), "gray": "keep", "mean": (0.0,) * 3}),
        ("digit_scenes", {"split": "train", "centre_crop": (32, 32)}),
        ("sample_photos", {"split": "val", "std": (1.0,) * 3}),
    ):
        assert source_facts(name, **options) == create_source(name, **options).info, name


@pytest.mark.parametrize(
    ("name", "options", "classes"),
    [
        ("ade20k", {}, 150),
        ("cityscapes", {}, 19),
        ("cityscapes", {"all_classes": True}, 34),
        ("voc2012", {}, 21),
        ("voc2012_photos", {}, 0),
        ("pascal_context", {}, 60),
        ("pascal_context", {"protocol": 59}, 59),
        ("hypersim", {"size": (384, 512)}, 40),
    ],
)
def test_public_sets_are_known_without_their_files(name, options, classes):
    info = source_facts(name, root="no/such/folder", split="train", **options)
    assert len(info.classes) == len(info.palette) == classes and info.name.startswith(name)


def test_what_only_the_data_know(tmp_path):
    with pytest.raises(UserError, match="not a prepared folder"):
        source_facts("arrays", folder=str(tmp_path))
    with pytest.raises(UserError, match="did you mean 'ade20k'"):
        source_facts("ade20")
