"""PASCAL VOC 2012 and Pascal Context from the folders of the VOC development kit."""

from pathlib import Path

from jax_densevit.data.class_names import (
    PASCAL_CONTEXT_CLASSES,
    PASCAL_CONTEXT_PALETTE,
    VOC2012_CLASSES,
    VOC2012_PALETTE,
)
from jax_densevit.data.files import Pair, Pairing, list_images, pair_by_list, read_list
from jax_densevit.data.folder_source import FolderSource
from jax_densevit.data.label_maps import LabelMap
from jax_densevit.data.source import DataInfo
from jax_densevit.data.sources.photo_folder import PhotoFolder
from jax_densevit.data.sources.registry import register_source
from jax_densevit.errors import UserError, check_name, did_you_mean

VOC2012 = DataInfo("voc2012", VOC2012_CLASSES, VOC2012_PALETTE)
PHOTOS = DataInfo("voc2012_photos", mean=(0.5,) * 3, std=(0.5,) * 3)
VOC2012_SPLITS = ("train", "val", "trainval", "trainaug")


def _year(root: str, year: str) -> Path:
    """The folder VOC<year>: `root` itself, in it, or in its VOCdevkit."""
    for folder in (Path(root), Path(root, year), Path(root, "VOCdevkit", year)):
        if (folder / "JPEGImages").is_dir():
            return folder
    raise UserError(f"{root} is not {year}: neither it, {year} nor VOCdevkit/{year} in it has a folder JPEGImages.")


@register_source("voc2012", lambda: VOC2012)
def voc2012(root: str, split: str) -> FolderSource:
    """PASCAL VOC 2012 segmentation, 21 classes, object borders ignored: 1,464 train, 1,449 val, 10,582 trainaug.

    Args:
      root: the folder VOC2012, VOCdevkit, or the one above.
      split: "train", "val", "trainval", or "trainaug", train extended by the masks of SBD (Hariharan et al., 2011)
        in `SegmentationClassAug`; an image that has a mask of VOC's own keeps it.
    """
    if split not in VOC2012_SPLITS:
        raise UserError(f"voc2012: there is no split {split!r}{did_you_mean(split, VOC2012_SPLITS)}")
    folder = _year(root, "VOC2012")
    lists = folder / "ImageSets/Segmentation"
    images, masks = list_images(folder / "JPEGImages"), list_images(folder / "SegmentationClass")
    if split == "trainaug":
        masks = {**list_images(folder / "SegmentationClassAug"), **masks}
        whole = lists / "trainaug.txt"
        names = [whole] if whole.is_file() else [lists / "train.txt", lists / "aug.txt"]
        stems = list(dict.fromkeys(line for path in names for _, line in read_list(path)))
        problems = tuple(
            f"{stem!r} of {whole.name} has no image or no mask"
            for stem in stems
            if stem not in images or stem not in masks
        )
        pairs = tuple(Pair(stem, images[stem], masks[stem]) for stem in stems if stem in images and stem in masks)
        pairing = Pairing(pairs, problems)
    else:
        pairing = pair_by_list(lists / f"{split}.txt", images, masks)
    label_map = LabelMap(VOC2012_CLASSES, ignore=(255, (224, 224, 192)), palette=VOC2012_PALETTE)
    return FolderSource(VOC2012, pairing, label_map)


@register_source("voc2012_photos", lambda: PHOTOS)
def voc2012_photos(root: str, split: str, gray: str = "leave_out") -> PhotoFolder:
    """The photographs of PASCAL VOC 2012's main lists, without labels, for colorization: 5,717 train, 5,823 val.

    Args:
      root: the folder VOC2012, VOCdevkit, or the one above.
      split: "train", "val" or "trainval".
      gray: what becomes of gray photographs, see :class:`~jax_densevit.data.sources.photo_folder.PhotoFolder`.
    """
    check_name("split of voc2012_photos", split, ("train", "val", "trainval"))
    folder = _year(root, "VOC2012")
    photos = str(folder / "JPEGImages")
    return PhotoFolder(photos, list_file=str(folder / f"ImageSets/Main/{split}.txt"), gray=gray, name="voc2012_photos")


def pascal_context_info(protocol: int = 60) -> DataInfo:
    """The facts about Pascal Context with its background as a class (60) or without (59)."""
    if protocol not in (59, 60):
        raise UserError(f"pascal_context: protocol={protocol!r} must be 60 (with background) or 59 (without).")
    first = 60 - protocol
    return DataInfo(f"pascal_context_{protocol}", PASCAL_CONTEXT_CLASSES[first:], PASCAL_CONTEXT_PALETTE[first:])


@register_source("pascal_context", pascal_context_info)
def pascal_context(root: str, split: str, protocol: int = 60) -> FolderSource:
    """Pascal Context on the images of VOC 2010: 4,998 train, 5,105 val.

    Masks are the PNG files of `SegmentationClassContext`, 0 = background and 1..59, made from `trainval_merged.json`.

    Args:
      root: the folder VOC2010, VOCdevkit, or the one above.
      split: "train" or "val".
      protocol: 60 counts background as a class (SETR's published numbers); 59 ignores it. The two differ by several
        points of mIoU.
    """
    if split not in ("train", "val"):
        raise UserError(f"pascal_context: there is no split {split!r}{did_you_mean(split, ('train', 'val'))}")
    info = pascal_context_info(protocol)
    folder = _year(root, "VOC2010")
    pairing = pair_by_list(
        folder / f"ImageSets/SegmentationContext/{split}.txt",
        list_images(folder / "JPEGImages"),
        list_images(folder / "SegmentationClassContext"),
    )
    return FolderSource(info, pairing, LabelMap(info.classes, reduce_zero_label=protocol == 59, ignore=255))
