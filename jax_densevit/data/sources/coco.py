"""COCO's annotation files: instances as polygons and run lengths, panoptic segments as PNG with JSON, or from TFDS."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from jax_densevit.data.class_names import COCO_PALETTE, COCO_STUFF, COCO_THINGS, default_palette
from jax_densevit.data.images import EncodedImage, image_size, read_image, read_labels
from jax_densevit.data.outlines import annotated_mask
from jax_densevit.data.source import CROWD, IGNORE, DataInfo, Example
from jax_densevit.data.sources.registry import register_source
from jax_densevit.data.tfds_records import TfdsRecords
from jax_densevit.errors import UserError, check_name

PANOPTIC_INFO = DataInfo("coco_panoptic", COCO_THINGS + COCO_STUFF, COCO_PALETTE, things=COCO_THINGS)
_FREE = 65_536 - CROWD  # numbers for crowds


class _Annotations:
    """An annotation file: its categories and images, and the annotations of each image.

    Attributes:
      categories: dicts, in the order of their ids. images: dicts, in the order of their ids.
      of_image: lists of annotations by id of the image.
    """

    def __init__(self, path: str, what: str):
        try:
            content = json.loads(Path(path).read_bytes())
            self.categories = sorted(content["categories"], key=lambda category: category["id"])
            self.images = sorted(content["images"], key=lambda image: image["id"])
            self.names = tuple(str(category["name"]) for category in self.categories)
            self.label_of = {category["id"]: label for label, category in enumerate(self.categories)}
            self.of_image: dict[int, list[dict]] = {image["id"]: [] for image in self.images}
            for annotation in content["annotations"]:
                self.of_image[annotation["image_id"]].append(annotation)
            outside = [
                i["file_name"] for i in self.images if Path(i["file_name"]).is_absolute() or ".." in i["file_name"]
            ]
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; name the annotation file.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} is no file of COCO's {what} annotations ({type(error).__name__}: {error}); fetch it again."
            ) from error
        if not self.images or not 0 < len(self.categories) < IGNORE:
            raise UserError(f"{path} has {len(self.images)} images and {len(self.categories)} categories.")
        if outside:
            raise UserError(f"{path} names an image outside of its folder: {outside[0]!r}.")


class _CocoFolder:
    """What both kinds of folders share: which image, and which annotations, by index."""

    def __init__(self, images: str, annotations: str, what: str):
        self.annotations = _Annotations(annotations, what)
        self.folder, self.path = Path(images), annotations
        if not self.folder.is_dir():
            raise UserError(f"There is no folder {images}: fetch COCO's images, or correct `images`.")

    def __len__(self) -> int:
        return len(self.annotations.images)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of image `index` as displayed, from its header."""
        return image_size(self._image(index))

    def _image(self, index: int) -> Path:
        return self.folder / self.annotations.images[index]["file_name"]

    def _of(self, index: int) -> list[dict]:
        return self.annotations.of_image[self.annotations.images[index]["id"]]


@register_source("coco_instances")
class CocoInstances(_CocoFolder):
    """Objects of COCO's kind: images, and one JSON file with polygons or run lengths.

    The classes are "background" and the file's categories in the order of their ids. Objects are drawn into one map of
    numbers: crowds first, then large to small, so that small objects stay on top of what is behind them.

    Args:
      images: the folder of the images, such as train2017.
      annotations: the JSON file, such as annotations/instances_train2017.json.
      empty: "keep" images without any object, or "leave_out".

    Raises:
      UserError: no folder or file, or another kind of file; on reading, a mask that is none.
    """

    def __init__(self, images: str, annotations: str, empty: str = "keep"):
        super().__init__(images, annotations, "instance")
        check_name("choice for images without objects (empty)", empty, ("keep", "leave_out"))
        found = self.annotations
        if empty == "leave_out":
            found.images = [image for image in found.images if found.of_image[image["id"]]]
        classes = ("background", *found.names)
        known = found.names == COCO_THINGS
        palette = ((0, 0, 0), *COCO_PALETTE[: len(COCO_THINGS)]) if known else default_palette(len(classes))
        self.info = DataInfo("coco_instances", classes, palette, things=found.names)

    def read(self, index: int) -> Example:
        """Example `index`; numbers are 1, 2, ... in the order of drawing, crowds from `source.CROWD` on."""
        image = read_image(self._image(index))
        size = image.shape[:2]
        labels, instances = np.zeros(size, np.uint8), np.zeros(size, np.uint16)
        number = {False: 0, True: CROWD - 1}
        for crowd, label, mask in self._drawn(index, size):
            number[crowd] += 1
            labels[mask], instances[mask] = label, number[crowd]
        return {"image": image, "labels": labels, "instances": instances, "id": self._image(index).stem}

    def _drawn(self, index: int, size: tuple[int, int]) -> list[tuple[bool, int, np.ndarray]]:
        """(crowd, label, mask) of every annotation, in the order of drawing."""
        drawn = []
        for annotation in self._of(index):
            try:
                mask = annotated_mask(annotation["segmentation"], size)
                label = self.annotations.label_of[annotation["category_id"]] + 1
                drawn.append((bool(annotation.get("iscrowd", 0)), float(annotation["area"]), label, mask))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path}: annotation {annotation.get('id')} of {self._image(index).name} has no usable mask "
                    f"({error})."
                ) from error
        drawn.sort(key=lambda one: (not one[0], -one[1]))
        if len(drawn) >= _FREE:
            raise UserError(
                f"{self.path}: {self._image(index).name} has {len(drawn)} objects; {_FREE - 1} can be told."
            )
        return [(crowd, label, mask) for crowd, _, label, mask in drawn]


@register_source("coco_panoptic")
class CocoPanoptic(_CocoFolder):
    """Panoptic segments of COCO's kind: images, PNG files whose colors are segment ids, and one JSON file about them.

    The classes are the file's categories in the order of their ids.

    Args:
      images: the folder of the images, such as train2017.
      annotations: the JSON file, such as annotations/panoptic_train2017.json.
      masks: the folder of the PNG files, such as annotations/panoptic_train2017; empty takes the folder beside the JSON
        file that has its name.

    Raises:
      UserError: no folder or file, or another kind of file; on reading, a segment that the file does not know.
    """

    def __init__(self, images: str, annotations: str, masks: str = ""):
        super().__init__(images, annotations, "panoptic")
        self.masks = Path(masks) if masks else Path(annotations).with_suffix("")
        if not self.masks.is_dir():
            raise UserError(f"There is no folder {self.masks}: unpack the PNG files, or name their folder as `masks`.")
        try:
            things = tuple(c["name"] for c in self.annotations.categories if c["isthing"])
            palette = tuple(tuple(int(part) for part in c["color"]) for c in self.annotations.categories)
            lacking = [i["file_name"] for i in self.annotations.images if len(self.annotations.of_image[i["id"]]) != 1]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{annotations} does not say which categories are things ({error}).") from error
        if lacking:
            raise UserError(f"{annotations} has not one list of segments for {lacking[0]}, as a panoptic file has.")
        self.info = DataInfo("coco_panoptic", self.annotations.names, palette, things=things)
        self._things = frozenset(self.annotations.names.index(name) for name in things)

    def read(self, index: int) -> Example:
        """Example `index`; things are numbered 1, 2, ... in the order of the file, crowds from `source.CROWD` on."""
        annotation = self._of(index)[0]
        try:
            path = self.masks / Path(annotation["file_name"]).name
            segments = [
                (int(s["id"]), self.annotations.label_of[s["category_id"]], bool(s["iscrowd"]))
                for s in annotation["segments_info"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.path}: the segments of {self._image(index).name} are unusable ({error})."
            ) from error
        maps = panoptic_maps(read_labels(path), segments, self._things, str(path))
        return _checked({"image": read_image(self._image(index)), **maps, "id": path.stem}, str(path))


@register_source("coco_panoptic_tfds", lambda: PANOPTIC_INFO)
class CocoPanopticTfds:
    """COCO's panoptic segments as TensorFlow Datasets prepares them, `coco/2017_panoptic`: 80 things, 53 of stuff.

    Args:
      split: a TFDS split, slices too: "train", "validation", "train[:90%]".
      dataset: the TFDS name, with its version where wanted.
      data_dir, manual_dir: see the source "tfds".

    Raises:
      UserError: an unknown set or split, a set that cannot be prepared, damaged files.
    """

    info = PANOPTIC_INFO

    def __init__(self, split: str, dataset: str = "coco/2017_panoptic", data_dir: str = "", manual_dir: str = ""):
        images, others = ("image", "panoptic_image"), ("panoptic_objects", "image/filename")
        self._records = TfdsRecords("coco_panoptic_tfds", dataset, split, data_dir, manual_dir, images, others)

    def __len__(self) -> int:
        return len(self._records)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of image `index`, from the header of the encoded image."""
        where, example = self._records.name_of(index), self._records.read(index)
        return image_size(EncodedImage(f"{where} (image)", example["image"]))

    def read(self, index: int) -> Example:
        """Example `index`; numbers as of :class:`CocoPanoptic`."""
        where, example = self._records.name_of(index), self._records.read(index)
        found = example["panoptic_objects"]  # a list for each feature
        columns = (np.ravel(found[name]).tolist() for name in ("id", "label", "is_crowd"))
        segments = [(one, label, bool(crowd)) for one, label, crowd in zip(*columns, strict=True)]
        mask = read_labels(EncodedImage(f"{where} (panoptic_image)", example["panoptic_image"]))
        maps = panoptic_maps(mask, segments, range(len(COCO_THINGS)), where)
        name = Path(example["image/filename"].decode(errors="replace")).stem
        return _checked({"image": read_image(EncodedImage(where, example["image"])), **maps, "id": name}, where)


def panoptic_maps(
    colors: np.ndarray, segments: Sequence[tuple[int, int, bool]], things: Iterable[int], where: str
) -> Mapping[str, np.ndarray]:
    """Labels and object numbers of a panoptic PNG.

    Args:
      colors: uint8 [H, W, 3]; the id of a segment is R + 256 G + 65536 B, that of pixels nobody annotated 0.
      segments: (id, label, crowd) of each.
      things: the labels of things.
      where: the file, for messages.

    Returns:
      "labels" and "instances", see `data.source`.

    Raises:
      UserError: a file that is not in color, or a segment that the list does not have.
    """
    if colors.ndim != 3:
        raise UserError(f"{where}: panoptic segments are PNG files in RGB, and this is gray.")
    things = frozenset(things)
    ids = colors.astype(np.int64) @ np.array([1, 256, 65_536])
    present, place = np.unique(ids, return_inverse=True)
    known: dict[int, tuple[int, int]] = {0: (IGNORE, 0)}
    number = {False: 0, True: CROWD - 1}
    for segment, label, crowd in segments:
        counted = label in things
        number[crowd] += counted
        known[segment] = (label, number[crowd] if counted else 0)
    missing = [int(one) for one in present if int(one) not in known]
    if missing or number[False] >= CROWD or number[True] > 65_535:
        what = f"segment {missing[0]}, which the annotations do not have" if missing else "too many segments"
        raise UserError(f"{where} has {what}; the two do not belong together: fetch both again.")
    table = np.array([known[int(one)] for one in present], np.uint16)[place.reshape(ids.shape)]
    return {"labels": table[..., 0].astype(np.uint8), "instances": np.ascontiguousarray(table[..., 1])}


def _checked(example: Example, where: str) -> Example:
    if example["image"].shape[:2] != example["labels"].shape:
        raise UserError(
            f"{where} is {example['labels'].shape} (height, width), its image {example['image'].shape[:2]}; "
            "they do not belong together."
        )
    return example
