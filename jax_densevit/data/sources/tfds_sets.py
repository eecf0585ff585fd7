"""Sets of TensorFlow Datasets with one image and one label map per example."""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from jax_densevit.data.class_names import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, default_palette
from jax_densevit.data.images import EncodedImage, image_size, read_image, read_labels
from jax_densevit.data.label_maps import CITYSCAPES_TRAIN_IDS, LabelMap
from jax_densevit.data.raw import RawExample, RawSource
from jax_densevit.data.source import DataInfo
from jax_densevit.data.sources.registry import register_source
from jax_densevit.data.tfds_records import TfdsRecords
from jax_densevit.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Preset:
    """Where a data set keeps its images and masks, and what the masks mean."""

    image: str
    labels: str
    classes: tuple[str, ...]
    meaning: Mapping
    id: str = ""
    palette: tuple = ()


# The trimap of Oxford-IIIT Pet: 1 pet, 2 background, 3 border. Cityscapes comes as labelIds.
_CITYSCAPES = _Preset(
    "image_left",
    "segmentation_label",
    CITYSCAPES_CLASSES,
    {"id_map": CITYSCAPES_TRAIN_IDS, "other": 255},
    "image_id",
    CITYSCAPES_PALETTE,
)
_PRESETS = {
    "cityscapes": _CITYSCAPES,  # its first config
    "cityscapes/semantic_segmentation": _CITYSCAPES,
    "cityscapes/semantic_segmentation_extra": _CITYSCAPES,
    "oxford_iiit_pet": _Preset(
        "image", "segmentation_mask", ("pet", "background", "border"), {"id_map": {1: 0, 2: 1, 3: 2}}, "file_name"
    ),
}


@register_source("tfds")
class TfdsSource(RawSource):
    """A set of TensorFlow Datasets with one image and one label map per example.

    Known sets need only their name and split: `oxford_iiit_pet` (pet, background, border) and
    `cityscapes/semantic_segmentation` (19 classes). Others state their features and classes. A set that is not on disk
    yet is downloaded and prepared as TFDS does it; Cityscapes wants its two zip files in `manual_dir`.

    Random access: ArrayRecord files have it; for TFRecord files the position of every record is found once, by hopping
    over the records' headers. Images are decoded by :mod:`jax_densevit.data.images` like all others.

    Args:
      dataset: the TFDS name, with its config and version where wanted: "cityscapes/semantic_segmentation".
      split: a TFDS split, slices too: "train", "train[:90%]", "test".
      data_dir: where prepared sets are kept; empty takes TFDS's default.
      manual_dir: where files lie that TFDS cannot download; empty takes `<data_dir>/downloads/manual`.
      image, labels: names of the two features.
      classes: class names in label order.
      id_map, other, ignore, reduce_zero_label, threshold, palette: what the values in the masks mean, see
        :class:`~jax_densevit.data.label_maps.LabelMap`.

    Raises:
      UserError: an unknown set, split or feature, a set that cannot be prepared, damaged files.
    """

    def __init__(
        self,
        dataset: str,
        split: str,
        data_dir: str = "",
        manual_dir: str = "",
        image: str = "",
        labels: str = "",
        classes: Iterable[str] = (),
        id_map: Mapping | None = None,
        other: int | None = None,
        ignore: int | Iterable | None = None,
        reduce_zero_label: bool = False,
        threshold: int = 0,
        palette: Iterable = (),
    ):
        preset = _PRESETS.get(dataset.partition(":")[0])
        if preset is None and not (image and labels and classes):
            raise UserError(
                f"tfds: say where {dataset!r} keeps its images and masks with image=, labels= and classes= "
                f"(known without: {', '.join(_PRESETS)})."
            )
        own = bool(classes or id_map or ignore is not None or reduce_zero_label or threshold)
        meaning = {
            "id_map": id_map,
            "other": other,
            "ignore": ignore,
            "reduce_zero_label": reduce_zero_label,
            "threshold": threshold,
        }
        chosen = meaning if own or preset is None else preset.meaning
        label_map = LabelMap(classes or preset.classes, palette=palette, **chosen)
        self._image, self._labels, self._id = (
            image or preset.image,
            labels or preset.labels,
            preset.id if preset else "",
        )
        self.split = split
        self._records = TfdsRecords("tfds", dataset, split, data_dir, manual_dir, (self._image, self._labels))
        palette = label_map.palette or (preset.palette if preset and not own else ())
        info = DataInfo(
            dataset.partition(":")[0], label_map.classes, palette or default_palette(len(label_map.classes))
        )
        super().__init__(info, label_map)
        self.probe()

    def __len__(self) -> int:
        return len(self._records)

    def name_of(self, index: int) -> str:
        """Where example `index` lies, for messages."""
        return f"{self._records.name_of(index)} ({self._labels})"

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of image `index`, from the header of the encoded image."""
        return image_size(self._encoded(index)[0])

    def raw_labels(self, index: int) -> np.ndarray:
        """The values of the mask of example `index`."""
        return read_labels(self._encoded(index)[1])

    def raw(self, index: int) -> RawExample:
        """Example `index`, decoded but not interpreted."""
        image, labels, name = self._encoded(index)
        return RawExample(name, read_image(image), read_labels(labels), None, str(image), str(labels))

    def _encoded(self, index: int) -> tuple[EncodedImage, EncodedImage, str]:
        where, example = self._records.name_of(index), self._records.read(index)
        image, labels = example[self._image], example[self._labels]
        name = example.get(self._id, b"")
        name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
        return (
            EncodedImage(f"{where} ({self._image})", image),
            EncodedImage(f"{where} ({self._labels})", labels),
            name or f"{self.split}-{index:06d}",
        )
