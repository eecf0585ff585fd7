"""Sources that read mask files: what a file holds is kept apart from what it means, so that it can be checked."""

import abc
import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from jax_densevit.data.diagnosis import count_values
from jax_densevit.data.label_maps import LabelMap, gray_of
from jax_densevit.data.source import DataInfo, Example
from jax_densevit.errors import UserError

NumberRule = Callable[[np.ndarray], np.ndarray]
_inspecting = contextvars.ContextVar("inspecting", default=False)


@contextlib.contextmanager
def inspecting() -> Iterator[None]:
    """While it lasts, sources are built even where their files look wrong: the checker wants to see everything."""
    token = _inspecting.set(True)
    try:
        yield
    finally:
        _inspecting.reset(token)


def is_inspecting() -> bool:
    """Whether a source is being built for the checker."""
    return _inspecting.get()


@dataclasses.dataclass(frozen=True)
class RawExample:
    """One example as its files hold it.

    Attributes:
      id: its name in the source.
      image: uint8 [H, W, 3], upright.
      labels: the values of the mask, uint8 or uint16 [H, W], or uint8 [H, W, 3] for a mask in color.
      instances: object numbers, uint8 or uint16 [H, W], or None.
      image_name, labels_name: the files, for messages.
    """

    id: str
    image: np.ndarray
    labels: np.ndarray
    instances: np.ndarray | None
    image_name: str
    labels_name: str

    def size_mismatch(self) -> str:
        """What is wrong with the sizes, or ""."""
        size = self.image.shape[:2]
        for mask in (self.labels, self.instances):
            if mask is not None and mask.shape[:2] != size:
                other = mask.shape[:2]
                way = (
                    "the image is probably stored turned (EXIF): save image and mask upright"
                    if other == size[::-1]
                    else "pair it with its own image, or resize the mask without interpolation"
                )
                return (
                    f"{self.labels_name} is {other[0]}x{other[1]} (height x width), but its image {self.image_name} is "
                    f"{size[0]}x{size[1]}; {way}."
                )
        return ""


class RawSource(abc.ABC):
    """A source whose examples are raw files plus a :class:`LabelMap`; subclasses say how many, how big, and `raw`.

    Args:
      info: facts about the data.
      label_map: what the mask values mean.
      numbers: turns the object numbers of the files, uint16 [H, W], into those of `data.source`; None: they are.
    """

    def __init__(self, info: DataInfo, label_map: LabelMap, numbers: NumberRule | None = None):
        self.info = info
        self.label_map = label_map
        self.numbers = numbers

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def raw(self, index: int) -> RawExample:
        """Reads example `index` without interpreting its mask; UserError naming the file when it cannot."""

    def raw_labels(self, index: int) -> np.ndarray:
        """Only the mask of :meth:`raw`."""
        return self.raw(index).labels

    def read(self, index: int) -> Example:
        """Reads and decodes one example (contract of :class:`~jax_densevit.data.source.Source`)."""
        raw = self.raw(index)
        mismatch = raw.size_mismatch()
        if mismatch:
            raise UserError(mismatch)
        example = {"image": raw.image, "labels": self.label_map(raw.labels, raw.labels_name), "id": raw.id}
        if raw.instances is not None:
            instances = gray_of(raw.instances)
            if instances.ndim != 2:
                raise UserError(f"{raw.labels_name} is in color; object numbers must be 8 or 16-bit gray PNG.")
            example["instances"] = self.object_numbers(instances)
        return example

    def object_numbers(self, instances: np.ndarray) -> np.ndarray:
        """The numbers of `data.source`, uint16, of those in a file."""
        instances = instances.astype(np.uint16)
        return instances if self.numbers is None else self.numbers(instances)

    def probe(self, count: int = 8) -> None:
        """Reads a few masks over the whole set and refuses meanings that cannot fit, before anything is compiled.

        Unreadable files are left to :meth:`read`, where training may be told to skip them.
        """
        if is_inspecting():
            return
        values: dict = {}
        for index in sorted({round(i) for i in np.linspace(0, len(self) - 1, min(count, len(self)))}):
            try:
                raw = self.label_map.values(self.raw_labels(index))
            except UserError:
                continue
            self.label_map(raw, self.name_of(index))
            for value, n in count_values(raw).items():
                values[value] = values.get(value, 0) + n
        warning = self.label_map.suspicious(values)
        if warning:
            raise UserError(f"{self.info.name}: {warning}")

    @abc.abstractmethod
    def name_of(self, index: int) -> str:
        """The mask file of example `index`, for messages."""
