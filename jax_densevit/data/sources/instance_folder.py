"""Images with one object number per pixel: `<root>/<split>/images` beside `<root>/<split>/instances`."""

from pathlib import Path

import numpy as np

from jax_densevit.data.files import list_images, pair_by_name, with_instances
from jax_densevit.data.folder_source import FolderSource
from jax_densevit.data.label_maps import LabelMap
from jax_densevit.data.source import CROWD, IMAGENET_MEAN, IMAGENET_STD, DataInfo
from jax_densevit.data.sources.registry import register_source


def _facts(
    root: str,
    classes: tuple[str, ...] = ("background", "object"),
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    stretch: tuple[float, ...] = (),
) -> DataInfo:
    return DataInfo(Path(root).name, tuple(classes), mean=tuple(mean), std=tuple(std), stretch=tuple(stretch))


@register_source("instance_folder", _facts)
def instance_folder(
    root: str,
    split: str,
    classes: tuple[str, ...] = ("background", "object"),
    semantic: str = "",
    ignore_instance: int = 65_535,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
    stretch: tuple[float, ...] = (),
) -> FolderSource:
    """Images and instance masks (8 or 16-bit PNG, 0 none, 1..N objects), the layout of the nuclei of DSB 2018.

    Args:
      root, split: files are in `<root>/<split>/images` and `<root>/<split>/instances`, paired by name.
      classes: class names in label order; without `semantic` two: what 0 is, and what every object is.
      semantic: name of the folder beside `instances` with masks of class ids; empty makes the labels from the
        instances: 0 where there is none, 1 where there is one.
      ignore_instance: the number that marks crowds, see `data.source.CROWD`; without `semantic` ignored as a label.
      mean, std: normalisation of images in [0, 1].
      stretch: percentiles (low, high) of every image and channel that become black and white, e.g. (0.1, 99.9) where
        exposure and stain differ from picture to picture; empty leaves images as they are.
    """
    folder = Path(root, split)
    images, instances = list_images(folder / "images"), list_images(folder / "instances")
    if semantic:
        label_map = LabelMap(classes, ignore=255)
        labelled = pair_by_name(images, list_images(folder / semantic))
    else:
        label_map = LabelMap(classes, threshold=1, ignore=ignore_instance)
        labelled = pair_by_name(images, instances)
    info = _facts(root, label_map.classes, mean, std, stretch)

    def numbers(instances: np.ndarray) -> np.ndarray:
        return np.where(instances == ignore_instance, np.uint16(CROWD), instances)

    return FolderSource(info, with_instances(labelled, images, instances), label_map, numbers=numbers)
