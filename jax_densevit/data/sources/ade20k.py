"""ADE20K, the 150-class scene parsing set, from the folders of ADEChallengeData2016."""

from pathlib import Path

from jax_densevit.data.class_names import ADE20K_CLASSES, ADE20K_PALETTE
from jax_densevit.data.files import list_images, pair_by_name
from jax_densevit.data.folder_source import FolderSource
from jax_densevit.data.label_maps import LabelMap
from jax_densevit.data.source import DataInfo
from jax_densevit.data.sources.registry import register_source
from jax_densevit.errors import UserError, did_you_mean

INFO = DataInfo("ade20k", ADE20K_CLASSES, ADE20K_PALETTE)
FOLDERS = {"train": "training", "val": "validation"}


@register_source("ade20k", lambda: INFO)
def ade20k(root: str, split: str) -> FolderSource:
    """ADE20K, 150 classes: 20,210 train and 2,000 val images of many sizes.

    Masks hold 0 for "other" and 1..150 for the classes; labels are 0..149 with "other" ignored (reduce_zero_label).

    Args:
      root: the folder ADEChallengeData2016, with `images/` and `annotations/`.
      split: "train" or "val".
    """
    if split not in FOLDERS:
        raise UserError(f"ade20k: there is no split {split!r}{did_you_mean(split, FOLDERS)}")
    folder = FOLDERS[split]
    pairing = pair_by_name(list_images(Path(root, "images", folder)), list_images(Path(root, "annotations", folder)))
    label_map = LabelMap(ADE20K_CLASSES, reduce_zero_label=True, ignore=255)
    return FolderSource(INFO, pairing, label_map)
