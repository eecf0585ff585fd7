"""The pictures of any set of TensorFlow Datasets without its labels: what colorization learns from."""

from jax_densevit.data.images import EncodedImage, image_size, read_image
from jax_densevit.data.source import DataInfo, Example
from jax_densevit.data.sources.registry import register_source
from jax_densevit.data.tfds_records import TfdsRecords


def _facts(dataset: str, mean: tuple[float, ...] = (0.5,) * 3, std: tuple[float, ...] = (0.5,) * 3) -> DataInfo:
    return DataInfo(dataset.partition(":")[0], mean=tuple(mean), std=tuple(std))


@register_source("tfds_photos", _facts)
class TfdsPhotos:
    """Pictures of a set of TensorFlow Datasets by random access, in the order of its files.

    Slices of a split never overlap, "train[:-10000]" and "train[-10000:]": the order is fixed, and training shuffles by
    index. A set that is not on disk yet is prepared as TFDS does it; ImageNet wants its tar files in `manual_dir`.

    Args:
      dataset: the TFDS name, with its config and version where wanted: "imagenet2012", "cifar10".
      split: a TFDS split, slices too.
      data_dir: where prepared sets are kept; empty takes TFDS's default.
      manual_dir: where files lie that TFDS cannot download; empty takes `<data_dir>/downloads/manual`.
      image: name of the feature; id: of one that names examples, such as "file_name"; empty takes one of the usual
        names, where there is one.
      mean, std: normalisation of images in [0, 1].

    Raises:
      UserError: an unknown set, split or feature, a set that cannot be prepared, damaged files.
    """

    def __init__(
        self,
        dataset: str,
        split: str,
        data_dir: str = "",
        manual_dir: str = "",
        image: str = "image",
        id: str = "",
        mean: tuple[float, ...] = (0.5,) * 3,
        std: tuple[float, ...] = (0.5,) * 3,
    ):
        self.split, self._image = split, image
        others = (id,) if id else ()
        self._records = TfdsRecords("tfds_photos", dataset, split, data_dir, manual_dir, (image,), others)
        names = ("file_name", "id", "image/filename")
        self._id = id or next((name for name in names if name in self._records.features), "")
        self.info = _facts(dataset, mean, std)

    def __len__(self) -> int:
        return len(self._records)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of picture `index`, from the header of the encoded image."""
        return image_size(self._encoded(index)[0])

    def read(self, index: int) -> Example:
        """Picture `index`, uint8 RGB."""
        encoded, name = self._encoded(index)
        return {"image": read_image(encoded), "id": name}

    def _encoded(self, index: int) -> tuple[EncodedImage, str]:
        where, example = self._records.name_of(index), self._records.read(index)
        name = example.get(self._id, b"")
        name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
        return EncodedImage(f"{where} ({self._image})", example[self._image]), name or f"{self.split}-{index:06d}"
