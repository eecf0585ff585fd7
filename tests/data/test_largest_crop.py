"""The largest crop of given proportions, averaged to its size: at random places, in the middle, labels and all."""

import numpy as np
import pytest

from jax_densevit.data.largest_crop import LargestCentreCrop, LargestRandomCrop
from jax_densevit.data.pipeline import train_stream
from jax_densevit.data.source import DataInfo
from jax_densevit.data.sources import create_source
from jax_densevit.errors import UserError
from jax_densevit.layers.resize import largest_window, resize_area


class Pictures:
    """Three labelled pictures of different shapes; values tell the place, labels repeat the red channel."""

    info = DataInfo("pictures")
    sizes = ((12, 20), (21, 9), (8, 8))
    kind = "test"

    def __len__(self):
        return len(self.sizes)

    def size(self, index):
        return self.sizes[index]

    def read(self, index):
        image = np.random.default_rng(index).integers(0, 256, (*self.sizes[index], 3), np.uint8)
        return {"image": image, "labels": image[..., 0].copy(), "id": str(index)}


@pytest.mark.parametrize(
    ("size", "shape", "window"),
    [
        ((12, 20), (8, 8), (12, 12)),
        ((20, 12), (8, 8), (12, 12)),
        ((12, 20), (2, 4), (10, 20)),
        ((30, 20), (6, 8), (15, 20)),
        ((1, 9), (1, 100), (1, 9)),
        ((7, 7), (256, 256), (7, 7)),
    ],
)
def test_windows_are_as_large_as_the_proportions_allow(size, shape, window):
    assert largest_window(size, shape) == window


def test_the_middle_averaged_by_area():
    source = LargestCentreCrop(Pictures(), [4, 4])
    assert len(source) == 3 and source.kind == "test" and source.size(1) == (4, 4)
    example, whole = source.read(0), Pictures().read(0)
    square = whole["image"][:, 4:16]
    np.testing.assert_array_equal(example["image"], np.round(square.reshape(4, 3, 4, 3, 3).mean((1, 3))))
    np.testing.assert_array_equal(example["labels"], whole["labels"][1::3, 5:16:3])  # middles of 3 x 3
    assert example["image"].dtype == example["labels"].dtype == np.uint8 and example["id"] == "0"
    tall, whole = source.read(1), Pictures().read(1)
    np.testing.assert_array_equal(tall["image"], resize_area(whole["image"][6:15], (4, 4)))


def test_random_places_reach_every_offset_and_follow_the_seed():
    crop, example = LargestRandomCrop((4, 4)), Pictures().read(0)
    starts = {}
    for start in range(9):
        starts[resize_area(example["image"][:, start : start + 12], (4, 4)).tobytes()] = start
    found = [starts[crop(example, (seed, 3))["image"].astype(np.int32).tobytes()] for seed in range(200)]
    assert set(found) == set(range(9)) and max(map(found.count, range(9))) < 50
    one, same = crop(example, (5, 6)), crop(example, (5, 6))
    for name in ("image", "labels", "size"):
        np.testing.assert_array_equal(one[name], same[name])
    assert one["size"].tolist() == [4, 4] and one["image"].shape == (4, 4, 3)


def test_small_pictures_are_enlarged_and_the_stream_has_one_size():
    stream = train_stream(Pictures(), batch_size=3, seed=0, crop=(16, 16), largest_crop=True, threads=1)
    batch = next(stream)
    stream.close()
    assert batch["image"].shape == (3, 16, 16, 3) and (batch["size"] == 16).all()
    row = int(np.flatnonzero(batch["index"] == 2)[0])
    whole = Pictures().read(2)
    np.testing.assert_array_equal(batch["image"][row], whole["image"].repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(batch["labels"][row], whole["labels"].repeat(2, 0).repeat(2, 1))


def test_every_source_takes_it():
    source = create_source("sample_photos", split="val", largest_crop=(6, 9))
    assert source.size(0) == (6, 9) and source.read(0)["image"].shape == (6, 9, 3)


@pytest.mark.parametrize(
    "options", [{}, {"crop": (4, 4), "resize_box": (8, 8)}, {"crop": (4, 4), "max_class_ratio": 0.5}]
)
def test_contradictions_are_named(options):
    with pytest.raises(UserError, match="largest_crop needs data.crop"):
        train_stream(Pictures(), batch_size=3, seed=0, largest_crop=True, **options)


def test_sizes_that_are_none_are_refused():
    with pytest.raises(UserError, match="largest_crop=.* must be"):
        create_source("sample_photos", largest_crop=(0, 3))
