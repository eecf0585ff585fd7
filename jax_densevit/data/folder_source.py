"""A source over pairs of image and mask files; every set of files on disk becomes one of these."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

from jax_densevit.data.class_names import default_palette
from jax_densevit.data.crops import nearest
from jax_densevit.data.files import Pairing
from jax_densevit.data.images import image_size, read_image, read_labels, stretch_contrast
from jax_densevit.data.label_maps import LabelMap
from jax_densevit.data.raw import NumberRule, RawExample, RawSource, is_inspecting
from jax_densevit.data.source import MAPS, DataInfo, Example
from jax_densevit.errors import UserError

JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe")
JPEG_ADVICE = "which changes ids: save masks as PNG, or for two classes set threshold=128."


class FolderSource(RawSource):
    """Examples from image and mask files.

    Args:
      info: facts about the data; an empty palette is filled in.
      pairing: the files, and what is wrong with them.
      label_map: what the mask values mean.
      unpaired: "fail" refuses a pairing with problems, "skip" goes on with the pairs there are.
      numbers: see :class:`~jax_densevit.data.raw.RawSource`.
      resize: (height, width) to which every example is resized, aspect not kept; (0, 0) leaves sizes alone.

    Attributes:
      pairs: the files of every example. problems: what :class:`Pairing` found.

    Raises:
      UserError: problems (unless skipped), no pair at all, a mask in JPEG, or masks whose values cannot be meant.
    """

    def __init__(
        self,
        info: DataInfo,
        pairing: Pairing,
        label_map: LabelMap,
        *,
        unpaired: str = "fail",
        numbers: NumberRule | None = None,
        resize: tuple[int, int] = (0, 0),
    ):
        if unpaired not in ("fail", "skip"):
            raise UserError(f"{info.name}: unpaired={unpaired!r} must be 'fail' or 'skip'.")
        if not info.palette:
            info = dataclasses.replace(info, palette=default_palette(len(info.classes)))
        if info.stretch and (len(info.stretch) != 2 or not 0 <= info.stretch[0] < info.stretch[1] <= 100):
            raise UserError(f"{info.name}: stretch {info.stretch} must be two percentiles, low and high, or empty.")
        super().__init__(info, label_map, numbers)
        self.resize = check_resize(info.name, resize)
        self.pairs, self.problems = pairing.pairs, pairing.problems if unpaired == "fail" else ()
        if self.problems and not is_inspecting():
            more = f" (and {len(self.problems) - 1} more such problems)" if len(self.problems) > 1 else ""
            raise UserError(
                f"{info.name}: {self.problems[0]}{more}; `python -m jax_densevit.check_data` lists all. Add or rename "
                "the files, or set unpaired='skip' where the source has that option."
            )
        if not self.pairs and not is_inspecting():
            raise UserError(f"{info.name}: there is no image with a mask.")
        lossy = [pair.labels for pair in self.pairs if pair.labels.suffix.lower() in JPEG_SUFFIXES]
        if lossy and not label_map.threshold and not is_inspecting():
            raise UserError(f"{lossy[0]} is a mask in JPEG, {JPEG_ADVICE}")
        self.probe()

    def __len__(self) -> int:
        return len(self.pairs)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of image `index` as displayed, from the file's header; or that to which all are resized."""
        return self.resize if all(self.resize) else image_size(self.pairs[index].image)

    def read(self, index: int) -> Example:
        """Reads and decodes one example, stretches its contrast and resizes it where asked."""
        example = super().read(index)
        example["image"] = stretch_contrast(example["image"], self.info.stretch)
        return resized(example, self.resize) if all(self.resize) else example

    def name_of(self, index: int) -> str:
        """The mask file of example `index`."""
        return str(self.pairs[index].labels)

    def raw_labels(self, index: int) -> np.ndarray:
        """The values in the mask file of example `index`."""
        return read_labels(self.pairs[index].labels)

    def raw(self, index: int) -> RawExample:
        """The files of example `index`, decoded but not interpreted."""
        pair = self.pairs[index]
        labels = read_labels(pair.labels)
        instances = None
        if pair.instances is not None:
            instances = labels if pair.instances == pair.labels else read_labels(pair.instances)
        return RawExample(pair.id, read_image(pair.image), labels, instances, str(pair.image), str(pair.labels))


def check_resize(name: str, size: Sequence[int]) -> tuple[int, int]:
    """`size` as a tuple; UserError for the source `name` unless it is (height, width), or (0, 0) for "as it is"."""
    size = tuple(size)
    if len(size) != 2 or min(size) < 0 or (any(size) and not all(size)):
        raise UserError(f"{name}: the size {size} must be (height, width) in pixels, or (0, 0).")
    return size


def resized(example: Example, size: tuple[int, int]) -> Example:
    """An example at exactly (height, width) `size`: the image by Pillow's antialiased bilinear filter, the rest by
    nearest pixel centres.
    """
    pixels = Image.fromarray(example["image"]).resize(size[::-1], Image.Resampling.BILINEAR)
    other = {name: nearest(example[name], size, (0, 0, *size)) for name in MAPS if name in example}
    return {**example, "image": np.array(pixels), **other}
