"""TensorFlow Datasets by random access: Cityscapes from home-made zips, pets from a home-made prepared set."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from jax_densevit.data.class_names import CITYSCAPES_CLASSES
from jax_densevit.data.sources.registry import create_source
from jax_densevit.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")

LABEL_IDS = np.repeat(np.arange(32, dtype=np.uint8), 64)  # one row of a mask: ids 0..31
TRAIN_IDS = np.full(256, 255)
TRAIN_IDS[[7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]] = np.arange(19)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def manual_dir(tmp_path_factory):
    """The two zip files of Cityscapes with 3 + 1 + 1 examples; example n is all of color 10 n."""
    folder = tmp_path_factory.mktemp("manual")
    label = png(np.broadcast_to(LABEL_IDS, (1024, 2048)).copy())
    with (
        zipfile.ZipFile(folder / "leftImg8bit_trainvaltest.zip", "w") as images,
        zipfile.ZipFile(folder / "gtFine_trainvaltest.zip", "w") as labels,
    ):
        for split, numbers in (("train", (1, 2, 3)), ("val", (4,)), ("test", (5,))):
            for n in numbers:
                stem = f"{split}/aachen/aachen_000000_00000{n}"
                images.writestr(f"leftImg8bit/{stem}_leftImg8bit.png", png(np.full((1024, 2048, 3), 10 * n, np.uint8)))
                labels.writestr(f"gtFine/{stem}_gtFine_labelIds.png", label)
    return folder


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def data_dir(request, manual_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tfds.disable_progress_bar()
    builder = tfds.builder("cityscapes/semantic_segmentation", data_dir=str(folder), file_format=request.param)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=str(manual_dir)))
    return folder


def test_cityscapes_in_both_file_formats(data_dir):
    source = create_source("tfds", dataset="cityscapes", split="train", data_dir=str(data_dir))
    assert len(source) == 3 and source.info.classes == CITYSCAPES_CLASSES and source.size(1) == (1024, 2048)
    examples = [source.read(i) for i in (2, 0, 1, 2)]
    assert np.array_equal(examples[0]["image"], examples[3]["image"])
    for example in examples:
        assert example["image"].shape == (1024, 2048, 3)
        assert np.unique(example["image"]).tolist() == [10 * int(example["id"][-1])]
        assert np.array_equal(example["labels"][7], TRAIN_IDS[LABEL_IDS])
    assert sorted(e["id"] for e in examples[:3]) == [f"aachen_000000_00000{n}" for n in (1, 2, 3)]


def test_split_slices_partition_the_split(data_dir):
    names = {}
    for split in ("train", "train[:67%]", "train[67%:]", "validation"):
        source = create_source("tfds", dataset="cityscapes", split=split, data_dir=str(data_dir))
        names[split] = [source.read(i)["id"] for i in range(len(source))]
    assert names["train[:67%]"] + names["train[67%:]"] == names["train"]
    assert [len(v) for v in names.values()] == [3, 2, 1, 1]


def test_prepares_a_set_that_is_not_there_yet(manual_dir, tmp_path):
    tfds.disable_progress_bar()
    options = {"dataset": "cityscapes/semantic_segmentation", "split": "validation", "data_dir": str(tmp_path)}
    assert create_source("tfds", manual_dir=str(manual_dir), **options).read(0)["id"] == "aachen_000000_000004"
    with pytest.raises(UserError, match="cannot prepare.*manual_dir"):
        create_source("tfds", **{**options, "data_dir": str(tmp_path / "other")}, manual_dir=str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "val"}, "no split 'val'"),
        ({"dataset": "cityscape", "image": "a", "labels": "b", "classes": ("c",)}, "did you mean 'cityscapes'"),
        ({"dataset": "mnist"}, "say where 'mnist' keeps"),
        ({"image": "image"}, "no feature 'image'; did you mean 'image_"),
    ],
)
def test_wrong_options(data_dir, options, words):
    with pytest.raises(UserError, match=words):
        create_source("tfds", **{"dataset": "cityscapes", "split": "train", "data_dir": str(data_dir), **options})


@pytest.fixture
def pets(tmp_path):
    """Four pets of different sizes in the form that TFDS's own builder would have prepared."""
    rng = np.random.default_rng(0)
    features = tfds.builder("oxford_iiit_pet", data_dir=str(tmp_path / "none")).info.features

    def examples():
        for i in range(4):
            trimap = np.resize(np.array([1, 2, 3], np.uint8), (8 + i, 10, 1))
            image = rng.integers(0, 256, (8 + i, 10, 3), np.uint8)
            box = tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
            fixed = {"label": 0, "species": 0, "file_name": f"cat_{i}.jpg", "head_bbox": box}
            yield {"image": image, "segmentation_mask": trimap, **fixed}

    tfds.disable_progress_bar()
    version = str(tfds.builder("oxford_iiit_pet", data_dir=str(tmp_path / "none")).version)
    tfds.dataset_builders.store_as_tfds_dataset(
        name="oxford_iiit_pet",
        version=version,
        features=features,
        split_datasets={"train": list(enumerate(examples()))},
        data_dir=str(tmp_path / "data"),
    )
    return tmp_path / "data"


def test_pets_trimap(pets):
    source = create_source("tfds", dataset="oxford_iiit_pet", split="train", data_dir=str(pets))
    assert source.info.classes == ("pet", "background", "border") and len(source) == 4
    for i in range(4):
        example = source.read(i)
        number = int(example["id"][4])
        assert example["labels"].shape == source.size(i) == (8 + number, 10)
        assert np.array_equal(example["labels"], np.resize([0, 1, 2], (8 + number, 10)))
    # Two classes instead, the border ignored.
    options = {"classes": ("background", "pet"), "id_map": {1: 1, 2: 0, 3: 255}}
    source = create_source("tfds", dataset="oxford_iiit_pet", split="train", data_dir=str(pets), **options)
    assert set(np.unique(source.read(0)["labels"])) == {0, 1, 255}


def test_photos_without_labels_and_splits_that_do_not_overlap(pets):
    def read(split):
        source = create_source("tfds_photos", dataset="oxford_iiit_pet", split=split, data_dir=str(pets))
        assert source.info.classes == ()
        examples = [source.read(i) for i in range(len(source))]
        assert [example["image"].shape[:2] for example in examples] == [source.size(i) for i in range(len(source))]
        assert all(example.keys() == {"image", "id"} for example in examples)
        return {example["id"]: example["image"] for example in examples}

    pictures = read("train")
    train, val = read("train[:-1]"), read("train[-1:]")
    assert len(pictures) == 4 and [*train, *val] == [*pictures] and len(val) == 1
    labelled = create_source("tfds", dataset="oxford_iiit_pet", split="train", data_dir=str(pets))
    for i in range(4):
        example = labelled.read(i)
        np.testing.assert_array_equal(example["image"], pictures[example["id"]])
    for options, words in (({"split": "val"}, "no split 'val'"), ({"image": "imag"}, "did you mean 'image'")):
        with pytest.raises(UserError, match=words):
            options = {"dataset": "oxford_iiit_pet", "split": "train", "data_dir": str(pets), **options}
            create_source("tfds_photos", **options)


def test_damaged_records_are_named(pets):
    path = next(pets.glob("**/*.tfrecord*"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(UserError, match=r"tfrecord-00000-of-00001: record 3 is cut off"):
        create_source("tfds", dataset="oxford_iiit_pet", split="train", data_dir=str(pets))
    broken = bytearray(whole)
    start = 12
    broken[start : start + 400] = b"\xff" * 400
    path.write_bytes(broken)
    source = create_source("tfds", dataset="oxford_iiit_pet", split="train", data_dir=str(pets))
    with pytest.raises(UserError, match=r"tfrecord-00000-of-00001 at byte 12"):
        source.read(0)
    assert source.read(1)["labels"].shape == source.size(1)
