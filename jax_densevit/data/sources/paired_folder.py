"""Your own images and masks: two folders with files of the same names, or a list of pairs."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from jax_densevit.data.files import list_images, pair_by_list, pair_by_name
from jax_densevit.data.folder_source import FolderSource
from jax_densevit.data.label_maps import LabelMap
from jax_densevit.data.source import IMAGENET_MEAN, IMAGENET_STD, DataInfo
from jax_densevit.data.sources.registry import register_source


def _facts(
    images: str,
    classes: Iterable[str],
    palette: Iterable = (),
    name: str = "",
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> DataInfo:
    colors = tuple(tuple(color) for color in palette)
    return DataInfo(
        name or Path(images).resolve().parent.name, tuple(classes), colors, mean=tuple(mean), std=tuple(std)
    )


@register_source("paired_folder", _facts)
def paired_folder(
    images: str,
    labels: str,
    classes: Iterable[str],
    list_file: str = "",
    image_suffix: str = "",
    label_suffix: str = "",
    id_map: Mapping | None = None,
    other: int | None = None,
    ignore: int | Iterable | None = None,
    reduce_zero_label: bool = False,
    threshold: int = 0,
    palette: Iterable = (),
    unpaired: str = "fail",
    name: str = "",
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> FolderSource:
    """Images and masks from two folders, paired by name: `images/a/b.jpg` with `labels/a/b.png`.

    Args:
      images, labels: the folders, searched with their subfolders. Masks are palette PNG (the indices are the ids), 8 or
        16-bit gray, or RGB together with `palette`.
      classes: the class names in label order.
      list_file: a text file that picks and orders examples: per line a name that image and mask share, or an image and
        a mask. Empty takes everything.
      image_suffix, label_suffix: what follows the common name, e.g. "_leftImg8bit.png" and "_labelIds.png". Empty: the
        file's own suffix.
      id_map, other, ignore, reduce_zero_label, threshold, palette: what the values in the masks mean, see
        :class:`~jax_densevit.data.label_maps.LabelMap`.
      unpaired: "fail" refuses images without a mask and masks without an image; "skip" leaves them out.
      name: the data set's name; empty takes the folder's.
      mean, std: normalisation of images in [0, 1].
    """
    label_map = LabelMap(
        classes,
        id_map=id_map,
        other=other,
        ignore=ignore,
        reduce_zero_label=reduce_zero_label,
        threshold=threshold,
        palette=palette,
    )
    found = list_images(images, image_suffix), list_images(labels, label_suffix)
    pairing = pair_by_list(list_file, *found) if list_file else pair_by_name(*found)
    info = _facts(images, label_map.classes, label_map.palette, name, mean, std)
    return FolderSource(info, pairing, label_map, unpaired=unpaired)
