"""Sets of TensorFlow Datasets by random access: ArrayRecord as it is, TFRecord through an index of its records."""

import dataclasses
import struct
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from jax_densevit.data.class_names import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, default_palette
from jax_densevit.data.images import EncodedImage, image_size, read_image, read_labels
from jax_densevit.data.label_maps import CITYSCAPES_TRAIN_IDS, LabelMap
from jax_densevit.data.raw import RawExample, RawSource
from jax_densevit.data.source import DataInfo
from jax_densevit.data.sources.registry import register_source
from jax_densevit.errors import UserError, did_you_mean


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
        self._image = image or preset.image
        self._labels = labels or preset.labels
        self._id = preset.id if preset else ""
        self.dataset, self.split = dataset, split
        builder = prepared_builder(dataset, data_dir, manual_dir)
        features = builder.info.features
        for feature in (self._image, self._labels):
            if feature not in features:
                raise UserError(f"tfds: {dataset!r} has no feature {feature!r}{did_you_mean(feature, features)}")
        try:
            part = builder.info.splits[split]
        except (KeyError, ValueError) as error:
            raise UserError(
                f"tfds: {dataset!r} has no split {split!r}{did_you_mean(split, builder.info.splits)}"
            ) from error
        self._records = open_records(builder, part.file_instructions, split)
        self._features = features
        self._skip = skip_decoding(self._image, self._labels)
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
        where = self._records.name_of(index)
        try:
            record = self._records.read(index)
            example = self._features.deserialize_example_np(record, decoders=self._skip)
            image, labels = example[self._image], example[self._labels]
        except Exception as error:  # protobuf, array_record and the file system each have their own
            raise UserError(f"{where}: the record is damaged ({error}); prepare {self.dataset!r} again.") from error
        name = example.get(self._id, b"")
        name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
        return (
            EncodedImage(f"{where} ({self._image})", image),
            EncodedImage(f"{where} ({self._labels})", labels),
            name or f"{self.split}-{index:06d}",
        )


class _TFRecords:
    """Random access to TFRecord files: length (8 bytes), its CRC (4), the record, its CRC (4), and so on."""

    def __init__(self, instructions):
        self._places: list[tuple[str, int, int]] = []
        for instruction in instructions:
            path = Path(instruction.filename)
            found = []
            try:
                end = path.stat().st_size
                with path.open("rb") as file:
                    position = 0
                    while position < end:
                        file.seek(position)
                        length = struct.unpack("<Q", file.read(8))[0]
                        if position + 16 + length > end:
                            raise UserError(f"{path}: record {len(found)} is cut off; prepare the data set again.")
                        found.append((str(path), position + 12, length))
                        position += 16 + length
            except (OSError, struct.error) as error:
                raise UserError(f"{path} cannot be read as TFRecord ({error}); prepare the data set again.") from error
            self._places += found[instruction.skip : instruction.skip + instruction.take]

    def __len__(self) -> int:
        return len(self._places)

    def name_of(self, index: int) -> str:
        path, position, _ = self._places[index]
        return f"{path} at byte {position}"

    def read(self, index: int) -> bytes:
        path, position, length = self._places[index]
        with open(path, "rb") as file:
            file.seek(position)
            return file.read(length)


class _ArrayRecords:
    """Random access to ArrayRecord files through the `array_record` package."""

    def __init__(self, instructions):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._source = ArrayRecordDataSource(list(instructions))
        self._lock = threading.Lock()  # its readers are opened lazily
        self._names = [(Path(i.filename), i.skip, i.take) for i in instructions]

    def __len__(self) -> int:
        return len(self._source)

    def name_of(self, index: int) -> str:
        for path, skip, take in self._names:
            if index < take:
                return f"{path} record {skip + index}"
            index -= take
        raise IndexError(index)

    def read(self, index: int) -> bytes:
        with self._lock:
            return self._source[index]


def open_records(builder, instructions, split: str) -> _TFRecords | _ArrayRecords:
    kind = builder.info.file_format.value
    if kind not in ("tfrecord", "array_record"):
        raise UserError(f"tfds: {builder.data_path} holds {kind} files; prepare it as array_record or tfrecord.")
    records = (_TFRecords if kind == "tfrecord" else _ArrayRecords)(instructions)
    if not len(records):
        raise UserError(f"tfds: split {split!r} of {builder.data_path} has no example.")
    return records


def skip_decoding(*features: str) -> dict:
    import tensorflow_datasets as tfds

    return {feature: tfds.decode.SkipDecoding() for feature in features}


def prepared_builder(dataset: str, data_dir: str, manual_dir: str):
    """The builder of a set whose files are on disk, after preparing them if need be."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(dataset, data_dir=data_dir or None)
    except tfds.core.registered.DatasetNotFoundError as error:
        name = dataset.partition("/")[0].partition(":")[0]
        raise UserError(
            f"TensorFlow Datasets has no set {dataset!r}{did_you_mean(name, tfds.list_builders())}"
        ) from error
    except (ValueError, AssertionError) as error:
        raise UserError(f"TensorFlow Datasets cannot open {dataset!r}: {_first_line(error)}") from error
    if not builder.info.splits:
        try:
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(manual_dir=manual_dir or None),
            )
        except Exception as error:  # anything from a refused connection to a missing zip file
            raise UserError(
                f"TensorFlow Datasets cannot prepare {dataset!r}: {_first_line(error)} "
                "Files it cannot download belong into manual_dir."
            ) from error
    return builder


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0] if lines else type(error).__name__}"
