"""Cityscapes, ADE20K, VOC, Pascal Context and instance folders, from tiny trees in the published layouts."""

import json

import numpy as np
import pytest
from PIL import Image

from jax_densevit.data.class_names import ADE20K_CLASSES, CITYSCAPES_CLASSES, PASCAL_CONTEXT_CLASSES, default_palette
from jax_densevit.data.images import read_image, stretch_contrast
from jax_densevit.data.source import CROWD, DataInfo
from jax_densevit.data.sources.registry import create_source
from jax_densevit.errors import UserError


def image(path, size=(6, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(path)


def mask(path, values, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values)
    if palette:
        picture.putpalette([part for color in default_palette(256) for part in color])
    picture.save(path)


def ids(*values, size=(6, 8), dtype=np.uint8):
    return np.resize(np.array(values, dtype), size)


# --- Cityscapes -----------------------------------------------------------------------------------------------------

# The table of cityscapesScripts, written out once more and the other way round: trainId -> labelId.
LABEL_ID_OF = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]


def cityscapes_tree(root, split="train", kind="gtFine", train_ids=True):
    names = [f"{city}/{city}_000000_0000{n}_{{}}" for city in ("aachen", "bochum") for n in (19, 20)]
    label_ids = ids(*range(34), 255)
    train = np.full(256, 255, np.uint8)
    train[LABEL_ID_OF] = np.arange(19)
    for name in names:
        image(root / "leftImg8bit" / split / name.format("leftImg8bit.png"))
        mask(root / kind / split / name.format(f"{kind}_labelIds.png"), label_ids)
        mask(root / kind / split / name.format(f"{kind}_color.png"), label_ids)
        if train_ids:
            mask(root / kind / split / name.format(f"{kind}_labelTrainIds.png"), train[label_ids])
    return train[label_ids]


def test_cityscapes_both_encodings_give_the_same_labels(tmp_path):
    expected = cityscapes_tree(tmp_path)
    for choice in ("labelIds", "labelTrainIds", "auto"):
        source = create_source("cityscapes", root=str(tmp_path), split="train", ids=choice)
        example = source.read(3)
        assert len(source) == 4 and example["id"] == "bochum/bochum_000000_000020"
        assert np.array_equal(example["labels"], expected)
        assert source.info.classes == CITYSCAPES_CLASSES and source.info.palette[13] == (0, 0, 142)
    assert source.name_of(0).endswith("labelTrainIds.png")


def test_cityscapes_as_downloaded_and_coarse(tmp_path):
    expected = cityscapes_tree(tmp_path, "val", train_ids=False)
    assert np.array_equal(create_source("cityscapes", root=str(tmp_path), split="val").read(0)["labels"], expected)
    expected = cityscapes_tree(tmp_path, "train_extra", "gtCoarse", train_ids=False)
    source = create_source("cityscapes", root=str(tmp_path), split="train_extra", coarse=True)
    assert np.array_equal(source.read(0)["labels"], expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "test"}, "not public"),
        ({"split": "training"}, "did you mean 'train'"),
        ({"split": "train_extra"}, "no split 'train_extra'"),
        ({"split": "train", "ids": "trainIds"}, "did you mean 'labelTrainIds'"),
        ({"split": "val"}, "no folder .*val"),
    ],
)
def test_cityscapes_wrong_options(tmp_path, options, words):
    cityscapes_tree(tmp_path)
    with pytest.raises(UserError, match=words):
        create_source("cityscapes", root=str(tmp_path), **options)


def test_cityscapes_all_classes_are_the_label_ids(tmp_path):
    cityscapes_tree(tmp_path)
    source = create_source("cityscapes", root=str(tmp_path), split="train", all_classes=True)
    evaluated = create_source("cityscapes", root=str(tmp_path), split="train")
    info = source.info
    assert len(info.classes) == len(info.palette) == 34 and info.classes[0] == "unlabeled"
    # The evaluated classes keep their names and colors, under their label ids.
    order = [info.classes.index(name) for name in evaluated.info.classes]
    assert order == LABEL_ID_OF
    assert [info.palette[i] for i in order] == list(evaluated.info.palette)
    found, expected = source.read(3)["labels"], evaluated.read(3)["labels"]
    scored = expected != 255
    assert np.array_equal(found[scored], np.array(order)[expected[scored]]) and not np.isin(found[~scored], order).any()
    with pytest.raises(UserError, match="needs the files with ids='labelIds'"):
        create_source("cityscapes", root=str(tmp_path), split="train", ids="labelTrainIds", all_classes=True)


def test_cityscapes_objects(tmp_path):
    """1000 * id + k is an object; a thing's bare id is a crowd, a bare id of stuff is nothing."""
    cityscapes_tree(tmp_path)
    written = ids(7, 24, 26, 26_000, 26_001, 33_005, 29, 4, dtype=np.uint16)
    paths = sorted((tmp_path / "gtFine").glob("**/*_labelIds.png"))
    for path in paths:
        mask(path.with_name(path.name.replace("labelIds", "instanceIds")), written)
        mask(path, np.where(written < 1000, written, written // 1000).astype(np.uint8))
    options = {"root": str(tmp_path), "split": "train", "ids": "labelIds", "instances": True}
    source = create_source("cityscapes", **options)
    example = source.read(0)
    numbers = (0, CROWD + 24, CROWD + 26, 26_000, 26_001, 33_005, CROWD + 29, 0)
    assert np.array_equal(example["instances"], ids(*numbers, dtype=np.uint16))
    assert np.array_equal(example["labels"], ids(0, 11, 13, 13, 13, 18, 255, 255))
    assert source.info.things == CITYSCAPES_CLASSES[11:] and len(source.info.things) == 8
    assert len(create_source("cityscapes", **{**options, "ids": "auto"}, all_classes=True).info.things) == 10
    assert create_source("cityscapes", **options, size=(3, 4)).read(0)["instances"].shape == (3, 4)
    paths[0].with_name(paths[0].name.replace("labelIds", "instanceIds")).unlink()
    with pytest.raises(UserError, match="has no mask"):
        create_source("cityscapes", **options)


def test_cityscapes_at_a_small_size(tmp_path):
    full = cityscapes_tree(tmp_path)
    large = create_source("cityscapes", root=str(tmp_path), split="train").read(1)
    height, width = large["image"].shape[:2]
    source = create_source("cityscapes", root=str(tmp_path), split="train", size=(2 * height, 3 * width))
    example = source.read(1)
    assert source.size(1) == example["image"].shape[:2] == (2 * height, 3 * width) and example["id"] == large["id"]
    assert np.array_equal(example["labels"], full.repeat(2, 0).repeat(3, 1))  # never interpolated
    half = create_source("cityscapes", root=str(tmp_path), split="train", size=(height // 2, width)).read(1)
    rows = large["image"][1:5].astype(float)
    middle = (rows[0] + 3 * rows[1] + 3 * rows[2] + rows[3]) / 8  # a triangle as wide as the new pixels: antialiased
    assert height == 6 and np.abs(half["image"][1] - middle).max() <= 1
    assert len(half["labels"]) == height // 2
    with pytest.raises(UserError, match=r"size \(256, 0\) must be"):
        create_source("cityscapes", root=str(tmp_path), split="train", size=(256, 0))


def test_train_ids_under_the_name_of_label_ids_cannot_pass_for_each_other(tmp_path):
    # labelIds read as labelTrainIds: ids 19..33 belong to no class.
    cityscapes_tree(tmp_path)
    for path in tmp_path.glob("gtFine/train/*/*_labelIds.png"):
        path.rename(str(path).replace("_labelIds", "_labelTrainIds"))
    with pytest.raises(UserError, match="belong to no class"):
        create_source("cityscapes", root=str(tmp_path), split="train", ids="labelTrainIds")


# --- ADE20K ---------------------------------------------------------------------------------------------------------


def test_ade20k_reduces_the_zero_label(tmp_path):
    for folder, stem in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        image(tmp_path / "images" / folder / f"{stem}.jpg")
        mask(tmp_path / "annotations" / folder / f"{stem}.png", ids(0, 1, 150, 255))
    for split in ("train", "val"):
        source = create_source("ade20k", root=str(tmp_path), split=split)
        assert np.array_equal(source.read(0)["labels"], ids(255, 0, 149, 255))
    assert source.info.classes == ADE20K_CLASSES and len(source.info.palette) == len(ADE20K_CLASSES) == 150
    mask(tmp_path / "annotations/validation/ADE_val_00000001.png", ids(0, 151))
    with pytest.raises(UserError, match="ADE_val_00000001.png: the id 151"):
        create_source("ade20k", root=str(tmp_path), split="val")
    with pytest.raises(UserError, match="no split 'validation'.*'?val'?"):
        create_source("ade20k", root=str(tmp_path), split="validation")


# --- VOC ------------------------------------------------------------------------------------------------------------


def voc_tree(root):
    sets = {"train": ["2007_1", "2007_2"], "val": ["2007_3"], "aug": ["2008_4"], "trainval": ["2007_1", "2007_3"]}
    for i in range(1, 6):
        image(root / f"JPEGImages/200{7 if i < 4 else 8}_{i}.jpg")
    for i in range(1, 4):
        mask(root / f"SegmentationClass/2007_{i}.png", ids(0, i, 20, 255), palette=True)
    for name in ("2007_1", "2008_4"):
        mask(root / f"SegmentationClassAug/{name}.png", ids(0, 9, 255))
    for name, stems in sets.items():
        path = root / f"ImageSets/Segmentation/{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(stems) + "\n")


@pytest.mark.parametrize("inside", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_reads_indices_by_its_lists(tmp_path, inside):
    voc_tree(tmp_path / inside)
    source = create_source("voc2012", root=str(tmp_path), split="val")
    assert len(source) == 1 and np.array_equal(source.read(0)["labels"], ids(0, 3, 20, 255))
    assert [p.id for p in create_source("voc2012", root=str(tmp_path), split="trainval").pairs] == ["2007_1", "2007_3"]


@pytest.mark.parametrize("listed", [False, True])
def test_voc_trainaug_prefers_vocs_own_masks(tmp_path, listed):
    voc_tree(tmp_path)
    if listed:
        (tmp_path / "ImageSets/Segmentation/trainaug.txt").write_text("2007_1\n2007_2\n2008_4\n")
    source = create_source("voc2012", root=str(tmp_path), split="trainaug")
    assert [pair.id for pair in source.pairs] == ["2007_1", "2007_2", "2008_4"]
    assert np.array_equal(source.read(0)["labels"], ids(0, 1, 20, 255))
    assert np.array_equal(source.read(2)["labels"], ids(0, 9, 255))


def test_voc_names_what_is_missing(tmp_path):
    voc_tree(tmp_path)
    (tmp_path / "SegmentationClass/2007_3.png").unlink()
    with pytest.raises(UserError, match=r"val\.txt, line 1: '2007_3' has no mask"):
        create_source("voc2012", root=str(tmp_path), split="val")
    with pytest.raises(UserError, match="nor VOCdevkit/VOC2012"):
        create_source("voc2012", root=str(tmp_path / "ImageSets"), split="val")


def test_voc_photos_are_those_of_the_main_lists(tmp_path):
    voc_tree(tmp_path / "VOC2012")
    Image.new("L", (8, 6), 90).save(tmp_path / "VOC2012/JPEGImages/2008_9.jpg")
    lists = tmp_path / "VOC2012/ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("2008_5\n2008_9\n2007_1\n")
    source = create_source("voc2012_photos", root=str(tmp_path), split="val")
    assert [source.read(i)["id"] for i in range(len(source))] == ["2008_5", "2007_1"]
    assert (
        "labels" not in source.read(0) and source.info.name == "voc2012_photos" and list(source.left_out) == ["2008_9"]
    )
    assert len(create_source("voc2012_photos", root=str(tmp_path), split="val", gray="keep")) == 3
    with pytest.raises(UserError, match="did you mean 'train'"):
        create_source("voc2012_photos", root=str(tmp_path), split="training")
    with pytest.raises(UserError, match="ImageSets/Main/train.txt cannot be read"):
        create_source("voc2012_photos", root=str(tmp_path), split="train")


@pytest.mark.parametrize(("protocol", "expected"), [(60, (0, 1, 59, 255)), (59, (255, 0, 58, 255))])
def test_pascal_context_protocols(tmp_path, protocol, expected):
    root = tmp_path / "VOC2010"
    image(root / "JPEGImages/2008_000002.jpg")
    mask(root / "SegmentationClassContext/2008_000002.png", ids(0, 1, 59, 255), palette=True)
    (root / "ImageSets/SegmentationContext").mkdir(parents=True)
    (root / "ImageSets/SegmentationContext/train.txt").write_text("2008_000002\n")
    source = create_source("pascal_context", root=str(tmp_path), split="train", protocol=protocol)
    assert np.array_equal(source.read(0)["labels"], ids(*expected))
    assert source.info.classes == PASCAL_CONTEXT_CLASSES[60 - protocol :]
    assert len(source.info.palette) == protocol and source.info.palette[-1] == (0x1F, 0, 0xFF)
    with pytest.raises(UserError, match="protocol=33"):
        create_source("pascal_context", root=str(tmp_path), split="train", protocol=33)


# --- instances ------------------------------------------------------------------------------------------------------


def test_instances_make_the_labels(tmp_path):
    for i in range(2):
        image(tmp_path / f"train/images/{i}.png")
        mask(tmp_path / f"train/instances/{i}.png", ids(0, 1, 300, 65_535, dtype=np.uint16))
    source = create_source("instance_folder", root=str(tmp_path), split="train", classes=("background", "nucleus"))
    example = source.read(1)
    assert np.array_equal(example["labels"], ids(0, 1, 1, 255))
    assert np.array_equal(example["instances"], ids(0, 1, 300, CROWD, dtype=np.uint16))
    assert example["instances"].dtype == np.uint16 and source.info.name == tmp_path.name


def test_instances_with_class_masks(tmp_path):
    for i in range(2):
        image(tmp_path / f"train/images/{i}.png")
        mask(tmp_path / f"train/instances/{i}.png", ids(0, 1, 2))
        mask(tmp_path / f"train/semantic/{i}.png", ids(0, 2, 1))
    options = {"root": str(tmp_path), "split": "train", "semantic": "semantic", "classes": ("none", "cat", "dog")}
    example = create_source("instance_folder", **options).read(0)
    assert np.array_equal(example["labels"], ids(0, 2, 1)) and np.array_equal(example["instances"], ids(0, 1, 2))
    (tmp_path / "train/instances/1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png has no mask"):
        create_source("instance_folder", **options)


def test_stretched_contrast_is_a_fact_of_the_set(tmp_path):
    for i in range(2):
        path = tmp_path / f"train/images/{i}.png"
        image(path)
        dark = read_image(path) // 5
        Image.fromarray(dark).save(path)
        mask(tmp_path / f"train/instances/{i}.png", ids(0, 1))
    options = {"root": str(tmp_path), "split": "train"}
    source = create_source("instance_folder", **options, stretch=[0.0, 100.0])
    read = source.read(1)["image"]
    assert (read.reshape(-1, 3).min(0) == 0).all() and (read.reshape(-1, 3).max(0) == 255).all()
    assert np.array_equal(read, stretch_contrast(dark, (0.0, 100.0)))
    assert np.array_equal(create_source("instance_folder", **options).read(1)["image"], dark)
    values = source.info.to_json()
    assert DataInfo.from_json(json.loads(json.dumps(values))) == source.info and source.info.stretch == (0.0, 100.0)
    del values["stretch"]  # what earlier versions wrote
    assert DataInfo.from_json(values).stretch == ()
    for wrong in ((5.0,), (99.0, 1.0), (0.0, 101.0)):
        with pytest.raises(UserError, match="two percentiles"):
            create_source("instance_folder", **options, stretch=wrong)


@pytest.mark.reference
def test_real_nuclei(reference_data):
    sizes = {"train": 160, "val": 30, "test": 30}
    for split, count in sizes.items():
        source = create_source("instance_folder", root=str(reference_data / "data/nuclei"), split=split)
        assert len(source) == count
        pixels = objects = 0
        for i in range(count):
            example = source.read(i)
            assert example["image"].shape[:2] == example["labels"].shape == source.size(i)
            assert np.array_equal(example["labels"], example["instances"] > 0)
            pixels += example["labels"].mean() / count
            objects += example["instances"].max() / count
        assert 0.08 < pixels < 0.2 and 15 < objects < 60, (split, pixels, objects)


@pytest.mark.reference
def test_real_coco(reference_data):
    names = ("background", *(str(i) for i in range(1, 81)))
    root = str(reference_data / "data/coco_cc")
    source = create_source("instance_folder", root=root, split="val", semantic="semantic", classes=names)
    seen = set()
    for i in range(len(source)):
        example = source.read(i)
        seen |= set(np.unique(example["labels"]).tolist())
        assert example["instances"].max() <= CROWD
    assert len(source) == 26 and max(seen) <= 80 and len(seen) > 30
    paired = create_source("paired_folder", images=f"{root}/val/images", labels=f"{root}/val/semantic", classes=names)
    assert np.array_equal(paired.read(3)["labels"], source.read(3)["labels"])
