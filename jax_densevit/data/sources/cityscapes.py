"""Cityscapes from its folders: `leftImg8bit/<split>/<city>/` and `gtFine/<split>/<city>/` (or gtCoarse)."""

from pathlib import Path

import numpy as np

from jax_densevit.data.class_names import (
    CITYSCAPES_ALL_CLASSES,
    CITYSCAPES_ALL_PALETTE,
    CITYSCAPES_CLASSES,
    CITYSCAPES_PALETTE,
    CITYSCAPES_THINGS,
)
from jax_densevit.data.files import list_images, pair_by_name, with_instances
from jax_densevit.data.folder_source import FolderSource
from jax_densevit.data.label_maps import CITYSCAPES_TRAIN_IDS, LabelMap
from jax_densevit.data.source import CROWD, DataInfo
from jax_densevit.data.sources.registry import register_source
from jax_densevit.errors import UserError, did_you_mean

SPLITS = ("train", "val", "train_extra")
IDS = ("auto", "labelIds", "labelTrainIds")
_FIRST_THING = 24  # "person", of the label ids; all after it are things


def cityscapes_label_map(ids: str) -> LabelMap:
    """The 19 evaluated classes from "labelIds" (0..33) or "labelTrainIds" (0..18); everything else is ignored."""
    if ids == "labelIds":
        return LabelMap(CITYSCAPES_CLASSES, id_map=CITYSCAPES_TRAIN_IDS, other=255, palette=CITYSCAPES_PALETTE)
    return LabelMap(CITYSCAPES_CLASSES, ignore=255, palette=CITYSCAPES_PALETTE)


def cityscapes_info(all_classes: bool = False) -> DataInfo:
    """The facts about Cityscapes with its 19 evaluated classes, or with all of its ids."""
    if all_classes:
        things = CITYSCAPES_ALL_CLASSES[_FIRST_THING:]
        return DataInfo("cityscapes", CITYSCAPES_ALL_CLASSES, CITYSCAPES_ALL_PALETTE, things=things)
    return DataInfo("cityscapes", CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, things=CITYSCAPES_THINGS)


def cityscapes_numbers(instances: np.ndarray) -> np.ndarray:
    """Object numbers of "instanceIds" files: 1000 * label id + k is object k; a thing's bare label id is a group."""
    bare = np.where(instances >= _FIRST_THING, CROWD + instances, 0)
    return np.where(instances < 1000, bare, instances).astype(np.uint16)


@register_source("cityscapes", cityscapes_info)
def cityscapes(
    root: str,
    split: str,
    ids: str = "auto",
    coarse: bool = False,
    size: tuple[int, int] = (0, 0),
    all_classes: bool = False,
    instances: bool = False,
) -> FolderSource:
    """Cityscapes, 19 classes: 2,975 train, 500 val fine annotations of 1024x2048 (19,998 coarse in train_extra).

    Args:
      root: the folder that holds `leftImg8bit` and `gtFine` (or `gtCoarse`).
      split: "train", "val", or with `coarse` also "train_extra"; the test annotations are not public.
      ids: which masks to read: "labelIds" (as downloaded), "labelTrainIds" (written by cityscapesScripts), or "auto",
        the latter where the split has them. Both give the same labels.
      coarse: read gtCoarse instead of gtFine.
      size: (height, width) to which images and labels are resized, aspect not kept, as small studies do: (256, 256) for
        ViTSeg, (140, 280) for Seq2Seg. `prepare` saves reading the large files every time.
      all_classes: learn and score all 34 label ids as they are in the "labelIds" files, also those that the benchmark
        leaves out ("unlabeled", "ego vehicle", ...), as Seq2Seg's report does; scores do not compare with others then.
      instances: also read the object numbers, from the files "instanceIds". Groups that were not told apart are crowds.
    """
    if split == "test":
        raise UserError("cityscapes: the annotations of the test split are not public; evaluate on split='val'.")
    if split not in SPLITS or (split == "train_extra" and not coarse):
        known = SPLITS if coarse else SPLITS[:2]
        raise UserError(f"cityscapes: there is no split {split!r}{did_you_mean(split, known)}")
    if ids not in IDS:
        raise UserError(f"cityscapes: ids={ids!r} is unknown{did_you_mean(ids, IDS)}")
    if all_classes and ids == "labelTrainIds":
        raise UserError("cityscapes: all_classes=True needs the files with ids='labelIds'; leave ids out.")
    kind = "gtCoarse" if coarse else "gtFine"
    images = list_images(Path(root, "leftImg8bit", split), "_leftImg8bit.png")
    folder = Path(root, kind, split)
    if all_classes:
        ids = "labelIds"
    elif ids == "auto":
        ids = "labelTrainIds" if list_images(folder, f"_{kind}_labelTrainIds.png") else "labelIds"
    pairing = pair_by_name(images, list_images(folder, f"_{kind}_{ids}.png"))
    if instances:
        pairing = with_instances(pairing, images, list_images(folder, f"_{kind}_instanceIds.png"))
    if all_classes:
        labels = LabelMap(CITYSCAPES_ALL_CLASSES, ignore=255, palette=CITYSCAPES_ALL_PALETTE)
    else:
        labels = cityscapes_label_map(ids)
    return FolderSource(cityscapes_info(all_classes), pairing, labels, numbers=cityscapes_numbers, resize=size)
