"""COCO's instances and panoptic segments, from files and from TFDS, on home-made trees; masks against pycocotools."""

import io
import json
import warnings

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as oracle

from jax_densevit.data.class_names import COCO_PALETTE, COCO_STUFF, COCO_THINGS
from jax_densevit.data.outlines import annotated_mask
from jax_densevit.data.source import CROWD
from jax_densevit.data.sources.registry import create_source
from jax_densevit.errors import UserError

SIZE = (9, 12)
CATEGORIES = [
    {"id": 7, "name": "dog", "isthing": 1, "color": [9, 8, 7]},
    {"id": 3, "name": "cat", "isthing": 1, "color": [1, 2, 3]},
    {"id": 90, "name": "grass", "isthing": 0, "color": [0, 200, 0]},
]


def block(top, left, height, width):
    mask = np.zeros(SIZE, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def runs(mask):
    flat = mask.ravel(order="F").astype(int)
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)).save(path)


def written(path, content):
    path.write_text(json.dumps(content))
    return str(path)


# --- masks ----------------------------------------------------------------------------------------------------------


def test_masks_are_those_of_pycocotools():
    rng = np.random.default_rng(3)
    for _ in range(20):
        size = tuple(rng.integers(20, 40, 2).tolist())
        mask = rng.random(size) < rng.uniform(0.02, 0.98)
        packed = oracle.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        for counts in (packed, runs(mask)["counts"]):
            np.testing.assert_array_equal(annotated_mask({"size": list(size), "counts": counts}, size), mask)
        polygons = [rng.uniform(-3, 45, 2 * n).tolist() for n in (3, 6)]
        encoded = oracle.merge(oracle.frPyObjects(polygons, *size))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # its array knows nothing of NumPy 2's copy=
            expected = oracle.decode(encoded).astype(bool)
        np.testing.assert_array_equal(annotated_mask(polygons, size), expected)
    assert not annotated_mask([], SIZE).any()


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ({"size": [9, 11], "counts": [99]}, "not of"),
        ({"size": [9, 12], "counts": [107]}, "do not add up"),
        ({"size": [9, 12], "counts": [200, -92]}, "do not add up"),
        ({"size": [9, 12], "counts": "\x01"}, "no string"),
        ({"size": [9, 12], "counts": "o" * 40}, "no string"),
        ([[1.0, 2.0, 3.0, 4.0]], "no list of three"),
        ([[1.0, 2.0, 3.0, 4.0, 1e9, 5.0]], "near the image"),
        ([[1.0, 2.0, 3.0, 4.0, float("nan"), 5.0]], "near the image"),
    ],
)
def test_masks_that_are_none(segmentation, words):
    with pytest.raises(ValueError, match=words):
        annotated_mask(segmentation, SIZE)


# --- instances ------------------------------------------------------------------------------------------------------


def instances_tree(tmp_path):
    """Image 5 has a crowd of cats, a large dog and a small cat before it, image 8 nothing."""
    picture(tmp_path / "images/five.png")
    picture(tmp_path / "images/eight.png")
    objects = [(3, block(2, 2, 2, 2), 0), (3, block(0, 0, 9, 9), 1), (7, block(1, 1, 5, 6), 0)]
    annotations = [
        {"id": i, "image_id": 5, "category_id": c, "iscrowd": crowd, "area": int(m.sum()), "segmentation": runs(m)}
        for i, (c, m, crowd) in enumerate(objects)
    ]
    images = [{"id": 8, "file_name": "eight.png"}, {"id": 5, "file_name": "five.png"}]
    return {"categories": CATEGORIES[:2], "images": images, "annotations": annotations}


def test_instances(tmp_path):
    content = instances_tree(tmp_path)
    options = {"images": str(tmp_path / "images"), "annotations": written(tmp_path / "some.json", content)}
    source = create_source("coco_instances", **options)
    assert source.info.classes == ("background", "cat", "dog") and source.info.things == ("cat", "dog")
    assert len(source) == 2 and source.size(0) == SIZE
    example = source.read(0)
    labels, numbers = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint16)
    for mask, label, number in (
        (block(0, 0, 9, 9), 1, CROWD),
        (block(1, 1, 5, 6), 2, 1),
        (block(2, 2, 2, 2), 1, 2),
    ):
        labels[mask], numbers[mask] = label, number
    np.testing.assert_array_equal(example["labels"], labels)
    np.testing.assert_array_equal(example["instances"], numbers)
    assert example["id"] == "five" and example["labels"].dtype == np.uint8 and numbers.dtype == np.uint16
    assert not source.read(1)["labels"].any() and not source.read(1)["instances"].any()
    assert len(create_source("coco_instances", **options, empty="leave_out")) == 1
    content["annotations"][2]["segmentation"] = [[0, 0, 1, 1]]
    broken = create_source(
        "coco_instances", images=options["images"], annotations=written(tmp_path / "b.json", content)
    )
    with pytest.raises(UserError, match=r"b\.json: annotation 2 of five\.png has no usable mask"):
        broken.read(0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": [{"id": 5, "file_name": "../five.png"}], "annotations": []}, "outside of its folder"),
        ({"images": []}, "KeyError|0 images"),
        ({"categories": 5}, "no file of COCO's instance annotations"),
        ({"annotations": [{"image_id": 6}]}, "no file of COCO's instance annotations"),
    ],
)
def test_files_that_are_none(tmp_path, change, words):
    content = {**instances_tree(tmp_path), **change}
    with pytest.raises(UserError, match=words):
        path = written(tmp_path / "some.json", content)
        create_source("coco_instances", images=str(tmp_path / "images"), annotations=path)
    for path, message in (
        (tmp_path / "none.json", "cannot be read"),
        (tmp_path / "images/five.png", "no file of COCO"),
    ):
        with pytest.raises(UserError, match=message):
            create_source("coco_instances", images=str(tmp_path / "images"), annotations=str(path))
    path = written(tmp_path / "some.json", instances_tree(tmp_path))
    with pytest.raises(UserError, match="no folder"):
        create_source("coco_instances", images=str(tmp_path / "nowhere"), annotations=path)


# --- panoptic -------------------------------------------------------------------------------------------------------

SEGMENTS = [(70_000, 7, 0, block(0, 0, 3, 4)), (300, 90, 0, block(3, 0, 3, 12)), (5, 3, 1, block(6, 0, 2, 3))]
SEGMENTS += [(6, 3, 1, block(6, 6, 2, 3)), (258, 7, 0, block(0, 6, 2, 2))]


def colors():
    ids = sum(mask * segment for segment, _, _, mask in SEGMENTS)
    return np.stack([ids % 256, ids // 256 % 256, ids // 65_536], -1).astype(np.uint8)


def expected_maps(labels):
    """Labels by category id; numbers: two dogs, two crowds of cats, grass without one, the rest unknown."""
    label, number = np.full(SIZE, 255, np.uint8), np.zeros(SIZE, np.uint16)
    for (_, category, _, mask), one in zip(SEGMENTS, (1, 0, CROWD, CROWD + 1, 2), strict=True):
        label[mask], number[mask] = labels[category], one
    return label, number


def panoptic_tree(tmp_path):
    picture(tmp_path / "images/one.png")
    (tmp_path / "panoptic").mkdir()
    Image.fromarray(colors()).save(tmp_path / "panoptic/one.png")
    segments = [{"id": i, "category_id": c, "iscrowd": crowd} for i, c, crowd, _ in SEGMENTS]
    return {
        "categories": CATEGORIES,
        "images": [{"id": 1, "file_name": "one.png"}],
        "annotations": [{"image_id": 1, "file_name": "one.png", "segments_info": segments}],
    }


def test_panoptic(tmp_path):
    content = panoptic_tree(tmp_path)
    images = str(tmp_path / "images")
    source = create_source("coco_panoptic", images=images, annotations=written(tmp_path / "panoptic.json", content))
    assert source.info.classes == ("cat", "dog", "grass") and source.info.things == ("cat", "dog")
    assert source.info.palette == ((1, 2, 3), (9, 8, 7), (0, 200, 0)) and source.size(0) == SIZE
    example = source.read(0)
    for got, wanted in zip((example["labels"], example["instances"]), expected_maps({3: 0, 7: 1, 90: 2}), strict=True):
        np.testing.assert_array_equal(got, wanted)
        assert got.dtype == wanted.dtype
    segments = content["annotations"][0].pop("segments_info")
    content["annotations"][0]["segments_info"] = segments[1:]
    masks = str(tmp_path / "panoptic")
    other = {"images": images, "masks": masks, "annotations": written(tmp_path / "other.json", content)}
    with pytest.raises(UserError, match=r"one\.png has segment 70000, which the annotations do not have"):
        create_source("coco_panoptic", **other).read(0)
    Image.fromarray(colors()[..., 0]).save(tmp_path / "panoptic/one.png")
    with pytest.raises(UserError, match="this is gray"):
        source.read(0)
    with pytest.raises(UserError, match="name their folder as `masks`"):
        create_source("coco_panoptic", images=images, annotations=other["annotations"])
    for change, words in (
        ({"annotations": []}, "not one list of segments"),
        ({"categories": [{"id": 3, "name": "a"}]}, "things"),
    ):
        path = written(tmp_path / "third.json", {**content, **change})
        with pytest.raises(UserError, match=words):
            create_source("coco_panoptic", images=images, masks=masks, annotations=path)


def test_panoptic_from_tfds(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    tfds.disable_progress_bar()
    builder = tfds.builder("coco/2017_panoptic", data_dir=str(tmp_path))
    image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    box = tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
    labels = {3: 15, 7: 16, 90: 125}
    objects = [
        {"id": i, "area": 1, "bbox": box, "label": labels[c], "is_crowd": bool(crowd)} for i, c, crowd, _ in SEGMENTS
    ]
    jpeg = io.BytesIO()
    Image.fromarray(image).save(jpeg, "JPEG")
    names = {"image/filename": "000000000139.jpg", "image/id": 139, "panoptic_image/filename": "000000000139.png"}
    jpeg.seek(0)
    example = {"image": jpeg, "panoptic_image": colors(), "panoptic_objects": objects, **names}
    tfds.dataset_builders.store_as_tfds_dataset(
        name="coco",
        config=builder.builder_config.name,
        version=str(builder.version),
        features=builder.info.features,
        split_datasets={"validation": [(0, example)]},
        data_dir=str(tmp_path),
    )
    source = create_source("coco_panoptic_tfds", split="validation", data_dir=str(tmp_path))
    assert len(source) == 1 and source.size(0) == SIZE
    assert source.info.classes == COCO_THINGS + COCO_STUFF and source.info.things == COCO_THINGS
    assert len(source.info.palette) == len(COCO_PALETTE) == 133 and source.info.classes[125] == "grass-merged"
    read = source.read(0)
    for got, wanted in zip((read["labels"], read["instances"]), expected_maps(labels), strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert read["id"] == "000000000139" and read["image"].shape == (*SIZE, 3)
    with pytest.raises(UserError, match="no split 'val'"):
        create_source("coco_panoptic_tfds", split="val", data_dir=str(tmp_path))


# --- the real ones --------------------------------------------------------------------------------------------------


@pytest.mark.reference
@pytest.mark.parametrize("split", ["train", "val"])
def test_real_instances(reference_data, split):
    """The recorded maps number crowds and objects together in the order of drawing, and mark every crowd by 65535."""
    root = reference_data / "data/coco_cc"
    options = {"images": str(root / split / "images"), "annotations": str(root / f"instances_{split}.json")}
    source = create_source("coco_instances", **options)
    assert source.info.things == COCO_THINGS
    options = {"root": str(root), "split": split, "semantic": "semantic", "classes": source.info.classes}
    recorded = create_source("instance_folder", **options)
    by_name = {pair.id: index for index, pair in enumerate(recorded.pairs)}
    assert len(source) == len(recorded) > 20
    for index in range(len(source)):
        got = source.read(index)
        expected = recorded.read(by_name[got["id"]])
        np.testing.assert_array_equal(got["labels"], expected["labels"])
        crowds = len(_crowds(source, index))
        numbers = np.where(got["instances"] >= CROWD, CROWD, got["instances"] + crowds * (got["instances"] > 0))
        np.testing.assert_array_equal(numbers, expected["instances"])


def _crowds(source, index):
    image = source.annotations.images[index]["id"]
    return [one for one in source.annotations.of_image[image] if one["iscrowd"]]


@pytest.mark.reference
def test_real_panoptic(reference_data, tmp_path):
    """Areas per class are those in the file; its photographs are not among the data, so black ones stand for them."""
    folder = reference_data / "data/coco_panoptic_annotations"
    content = json.loads((folder / "panoptic_examples.json").read_text())
    for image in content["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(tmp_path / image["file_name"])
    source = create_source(
        "coco_panoptic", images=str(tmp_path), annotations=str(folder / "panoptic_examples.json"), masks=str(folder)
    )
    assert source.info.classes == COCO_THINGS + COCO_STUFF and source.info.things == COCO_THINGS
    assert source.info.palette == COCO_PALETTE
    crowds = 0
    for index in range(2):
        example = source.read(index)
        segments = next(a for a in content["annotations"] if example["id"] in a["file_name"])["segments_info"]
        areas = np.zeros(256, int)
        for segment in segments:
            areas[[c["id"] for c in content["categories"]].index(segment["category_id"])] += segment["area"]
        found = np.bincount(example["labels"].ravel(), minlength=256)
        np.testing.assert_array_equal(found[:133], areas[:133])
        crowds += len(np.unique(example["instances"][example["instances"] >= CROWD]))
    assert crowds == 3
