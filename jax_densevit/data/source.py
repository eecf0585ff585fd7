"""The contract of a data source: a length, random-access reads, and facts about the data."""

import dataclasses
from typing import Protocol

import numpy as np

# Normalisation constants of ImageNet, on images in [0, 1], RGB.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IGNORE = 255
CROWD = 60_000


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What a model or a person must know about a data set. It is stored in every checkpoint.

    Attributes:
      name: the data set's name.
      classes: class names by label; the length is the number of classes.
      palette: one RGB triple (0..255) per class.
      ignore: the label value that is neither learned nor scored.
      mean, std: per-channel normalisation of images in [0, 1].
      stretch: (low, high) percentiles between which the contrast of every image is stretched when its file is read,
        here and in prediction (:func:`~jax_densevit.data.images.stretch_contrast`); empty = images as they are.
      things: names of the classes whose objects are numbered; the others are stuff. Empty = nobody said.
    """

    name: str
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    ignore: int = IGNORE
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    stretch: tuple[float, ...] = ()
    things: tuple[str, ...] = ()

    def to_json(self) -> dict:
        """A JSON-ready dict; :meth:`from_json` inverts it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "DataInfo":
        """The inverse of :meth:`to_json`."""
        values = dict(values)
        for key in ("classes", "mean", "std", "stretch", "things"):
            values[key] = tuple(values.get(key, ()))  # sets of earlier versions lack the last two
        values["palette"] = tuple(tuple(color) for color in values["palette"])
        return cls(**values)


# One example, as `read` returns it:
#   "image"      uint8 [H, W, 3], upright
#   "labels"     uint8 [H, W], class ids, 255 = ignore (absent in sources without labels)
#   "instances"  uint16 [H, W], object numbers (only in sources that have instances), see below
#   "amodal"     uint16 [H, W], bit n - 1 is set where object n is, seen or hidden (only in sources that know, of at
#                most 16 objects); "instances" then say who is seen. An object of which nothing is seen has no class.
#   "id"         str, unique in the source: the file name, or a generated name
#
# Objects. A pixel's class is its label, always; its number says which object of that class it is:
#   1 .. CROWD - 1   one object per number, of the class that most of its pixels have; numbers need not be adjacent
#   CROWD ..         crowds: groups of objects that nobody told apart, of the class that their labels say
#   0                no object: background, all pixels of a class of stuff (which are one segment), and pixels of things
#                    that nobody numbered, which are a crowd as well
# Where the label is 255 nothing is known, whatever the number: neither learned nor scored, of any class.
Example = dict[str, np.ndarray | str]

# The maps [H, W] among them, which follow the image's geometry and are never interpolated.
MAPS = {"labels": np.uint8, "instances": np.uint16, "amodal": np.uint16}


def padding_of(name: str, ignore: int) -> int:
    """The value of the map `name` beside an image, where `ignore` is the ignored label."""
    return ignore if name == "labels" else 0


def is_crowd(instances):
    """Which pixels of a class of things belong to a crowd: integers `[..., H, W]` of NumPy or JAX -> bool."""
    return (instances == 0) | (instances >= CROWD)


class Source(Protocol):
    """Random access to examples. `read(i)` is a pure function of `i`: safe from several threads, any order."""

    info: DataInfo

    def __len__(self) -> int: ...

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of example `index`, upright, without decoding the pixels."""
        ...

    def read(self, index: int) -> Example:
        """Reads and decodes one example; :class:`~jax_densevit.errors.UserError` naming the file when it cannot."""
        ...
