"""The records of sets of TensorFlow Datasets by random access: ArrayRecord as it is, TFRecord through an index."""

import struct
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_densevit.errors import UserError, did_you_mean


class TfdsRecords:
    """The examples of a split, whose images stay encoded.

    A set that is not on disk yet is downloaded and prepared as TFDS does it.

    Args:
      owner: the source, for messages.
      dataset: the TFDS name, with its config and version where wanted.
      split: a TFDS split, slices too.
      data_dir: where prepared sets are kept; empty takes TFDS's default.
      manual_dir: where files lie that TFDS cannot download; empty takes `<data_dir>/downloads/manual`.
      images: the features that are images, not to be decoded.
      others: further features that must be there.

    Attributes:
      features: of the set, by name.

    Raises:
      UserError: an unknown set, split or feature, a set that cannot be prepared, damaged files.
    """

    def __init__(
        self,
        owner: str,
        dataset: str,
        split: str,
        data_dir: str,
        manual_dir: str,
        images: Sequence[str],
        others: Sequence[str] = (),
    ):
        self.dataset = dataset
        builder = _prepared_builder(dataset, data_dir, manual_dir)
        self.features: Mapping[str, Any] = builder.info.features
        for feature in (*images, *others):
            if feature not in self.features:
                raise UserError(
                    f"{owner}: {dataset!r} has no feature {feature!r}{did_you_mean(feature, self.features)}"
                )
        try:
            part = builder.info.splits[split]
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{owner}: {dataset!r} has no split {split!r}{did_you_mean(split, builder.info.splits)}"
            ) from error
        self._records = _open_records(builder, part.file_instructions, split)
        self._skip = _skip_decoding(*images)

    def __len__(self) -> int:
        return len(self._records)

    def name_of(self, index: int) -> str:
        """Where example `index` lies, for messages."""
        return self._records.name_of(index)

    def read(self, index: int) -> dict[str, Any]:
        """Example `index` by feature; :class:`UserError` where its record is damaged."""
        try:
            return self.features.deserialize_example_np(self._records.read(index), decoders=self._skip)
        except Exception as error:  # protobuf, array_record and the file system each have their own
            raise UserError(
                f"{self.name_of(index)}: the record is damaged ({error}); prepare {self.dataset!r} again."
            ) from error


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


def _open_records(builder, instructions, split: str) -> _TFRecords | _ArrayRecords:
    kind = builder.info.file_format.value
    if kind not in ("tfrecord", "array_record"):
        raise UserError(f"tfds: {builder.data_path} holds {kind} files; prepare it as array_record or tfrecord.")
    records = (_TFRecords if kind == "tfrecord" else _ArrayRecords)(instructions)
    if not len(records):
        raise UserError(f"tfds: split {split!r} of {builder.data_path} has no example.")
    return records


def _skip_decoding(*features: str) -> dict:
    import tensorflow_datasets as tfds

    return {feature: tfds.decode.SkipDecoding() for feature in features}


def _prepared_builder(dataset: str, data_dir: str, manual_dir: str):
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
