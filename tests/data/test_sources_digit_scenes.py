"""Digit scenes: pure, seeded, separable, and honest about what is held out."""

import concurrent.futures
import gzip
import struct

import numpy as np
import pytest
from scipy import ndimage

from jax_densevit.data.sources.digits import load_glyphs
from jax_densevit.data.sources.registry import create_source
from jax_densevit.errors import UserError


def same(a, b):
    return a["id"] == b["id"] and all(np.array_equal(a[k], b[k]) for k in ("image", "labels", "instances"))


def test_reads_are_pure_in_any_order_and_from_any_thread():
    source = create_source("digit_scenes", length=40)
    other = create_source("digit_scenes", length=40)
    first = [source.read(i) for i in range(40)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        again = list(pool.map(other.read, reversed(range(40))))
    assert all(same(a, b) for a, b in zip(first, reversed(again), strict=True))
    assert len({example["id"] for example in first}) == 40


def test_seed_split_and_index_each_change_the_scene():
    base = create_source("digit_scenes").read(3)
    for options, index in (({"seed": 1}, 3), ({"split": "val"}, 3), ({}, 4)):
        assert not np.array_equal(base["image"], create_source("digit_scenes", **options).read(index)["image"])


@pytest.mark.parametrize("style", ["color", "plain", "wild"])
@pytest.mark.parametrize("overlap", ["none", "allowed"])
def test_labels_instances_and_image_agree(style, overlap):
    source = create_source("digit_scenes", style=style, overlap=overlap, size=(48, 72), scale=(12, 24), length=60)
    counts = []
    for i in range(60):
        example = source.read(i)
        image, labels, instances = example["image"], example["labels"], example["instances"]
        assert image.shape == (48, 72, 3) and image.dtype == np.uint8
        assert labels.shape == instances.shape == source.size(i) == (48, 72)
        assert labels.dtype == np.uint8 and instances.dtype == np.uint16
        assert np.array_equal(labels > 0, instances > 0) and labels.max() <= 10
        for number in np.unique(instances[instances > 0]):
            assert len(np.unique(labels[instances == number])) == 1  # one digit is one class
        if overlap == "none":
            counts.append(instances.max())
            # Grown by one pixel no instance touches another: the ink of two digits is never adjacent.
            for number in range(1, instances.max() + 1):
                grown = ndimage.binary_dilation(instances == number, np.ones((3, 3)))
                assert set(np.unique(instances[grown])) <= {0, number}
        ink, ground = image[labels > 0].mean(0), image[labels == 0].mean(0)
        assert np.abs(ink - ground).max() > 25, "the digits cannot be seen"
    if overlap == "none":
        assert set(counts) == {1, 2, 3, 4}


def test_amodal_masks_are_whole_digits():
    """What is seen is part of the whole; the last digit hides nothing of itself; nothing is inked but digits."""
    options = {"overlap": "allowed", "scale": (20, 28), "digits": (2, 4), "length": 30}
    source, plain = create_source("digit_scenes", **options, amodal=True), create_source("digit_scenes", **options)
    hidden = 0
    for i in range(30):
        example, seen = source.read(i), plain.read(i)
        assert "amodal" not in seen and all(
            np.array_equal(example[name], seen[name]) for name in ("image", "instances")
        )
        whole = [(example["amodal"] >> n & 1).astype(bool) for n in range(16)]
        count = sum(mask.any() for mask in whole)
        assert 2 <= count <= 4 and example["amodal"].dtype == np.uint16
        assert np.array_equal(example["amodal"] > 0, example["instances"] > 0)
        top = np.zeros_like(example["instances"])
        for n in range(count):
            top[whole[n]] = n + 1
        assert np.array_equal(top, example["instances"])
        hidden += sum(int((whole[n] & (example["instances"] != n + 1)).sum()) for n in range(count))
    assert hidden > 500
    apart = create_source("digit_scenes", overlap="none", amodal=True, length=5).read(3)
    assert np.array_equal(apart["amodal"], np.where(apart["instances"] > 0, 1 << (apart["instances"] - 1), 0))
    with pytest.raises(UserError, match="room for 16 digits"):
        create_source("digit_scenes", overlap="allowed", amodal=True, digits=(1, 17))


def test_digits_have_the_size_asked_for():
    source = create_source("digit_scenes", digits=(1, 1), scale=(20, 20), style="plain", length=40)
    longest = []
    for i in range(40):
        ys, xs = np.nonzero(source.read(i)["labels"])
        longest.append(max(np.ptp(ys), np.ptp(xs)) + 1)
    assert 18 <= min(longest) and max(longest) <= 20  # the faint rim of the last pixel may fall below half coverage


def test_crowded_scenes_end_and_keep_their_count():
    source = create_source("digit_scenes", digits=(12, 12), scale=(12, 14), length=10)
    assert [source.read(i)["instances"].max() for i in range(10)] == [12] * 10


def test_no_handwritten_digit_is_in_two_splits():
    pictures = {
        split: {g.tobytes() + bytes(g.size) for g in load_glyphs(split).images} for split in ("train", "val", "test")
    }
    assert sum(len(load_glyphs(split)) for split in pictures) == 1797
    assert all(len(set(load_glyphs(split).digits)) == 10 for split in pictures)
    assert not pictures["train"] & pictures["test"] and not pictures["train"] & pictures["val"]
    assert not pictures["val"] & pictures["test"]


def write_mnist(folder, part, digits, seed):
    rng = np.random.default_rng(seed)
    images = np.zeros((len(digits), 28, 28), np.uint8)
    images[:, 6:22, 8:20] = rng.integers(130, 256, (len(digits), 16, 12))
    folder.mkdir(exist_ok=True)
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz", "wb") as file:
        file.write(struct.pack(">IIII", 0x803, len(digits), 28, 28) + images.tobytes())
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(digits)) + bytes(digits))


def test_mnist_folder_with_both_parts_and_with_one(tmp_path):
    digits = [d for d in range(10) for _ in range(10)]
    write_mnist(tmp_path / "one", "t10k", digits, 0)
    sizes = [len(load_glyphs(split, str(tmp_path / "one"))) for split in ("train", "val", "test")]
    assert sizes == [80, 10, 10]
    write_mnist(tmp_path / "two", "t10k", digits, 0)
    write_mnist(tmp_path / "two", "train", digits * 2, 1)
    sizes = [len(load_glyphs(split, str(tmp_path / "two"))) for split in ("train", "val", "test")]
    assert sizes == [180, 20, 100]
    assert create_source("digit_scenes", mnist=str(tmp_path / "two"), length=2).read(1)["labels"].any()


def test_bad_mnist_is_named(tmp_path):
    with pytest.raises(UserError, match="no MNIST"):
        create_source("digit_scenes", mnist=str(tmp_path))
    write_mnist(tmp_path, "t10k", [0, 1], 0)
    images = tmp_path / "t10k-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:-20])
    with pytest.raises(UserError, match="t10k-images"):
        create_source("digit_scenes", mnist=str(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "tset"}, "did you mean 'test'"),
        ({"overlap": "non"}, "did you mean 'none'"),
        ({"scale": (16, 80)}, "shorter side"),
        ({"digits": (4, 2)}, "fewest"),
        ({"digits": (40, 40)}, "do not fit"),
        ({"lenght": 5}, "did you mean 'length'"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        create_source("digit_scenes", **options)


def test_out_of_range_index_is_refused():
    source = create_source("digit_scenes", length=3)
    for index in (3, -1):
        with pytest.raises(IndexError):
            source.read(index)


@pytest.mark.reference
def test_real_mnist(reference_data):
    folder = str(reference_data / "data/mnist")
    sizes = [len(load_glyphs(split, folder)) for split in ("train", "val", "test")]
    assert sum(sizes) == 10_000 and sizes[1] == sizes[2] and 990 <= sizes[1] <= 1000
    example = create_source("digit_scenes", mnist=folder, length=5).read(0)
    assert example["instances"].max() >= 1
