"""What most tasks do alike: files per picture, no charts, no trivial answers to compare with."""

import abc
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from jax_densevit.errors import UserError
from jax_densevit.writing import write_json, write_picture


class Answers(abc.ABC):
    """To inherit from; a task says what is in its files.

    Attributes:
      suffixes: the ends of the files' names, in the order of :meth:`files`.
    """

    suffixes: ClassVar[tuple[str, ...]] = (".png", ".json")

    @abc.abstractmethod
    def files(
        self, image: np.ndarray, prediction: dict[str, np.ndarray], facts: dict[str, Any]
    ) -> tuple[Image.Image | dict[str, Any], ...]:
        """What `predict` promises for one image, per suffix a picture or what a JSON says.

        Args:
          image: uint8 `[H, W, 3]`.
          prediction: of this one image, as the task's `decode` returns it.
          facts: what else the JSON shall say.
        """

    def file_names(self, stem: str) -> tuple[str, ...]:
        """The names of the files that :meth:`write` makes."""
        return tuple(stem + suffix for suffix in self.suffixes)

    def write(
        self,
        image: np.ndarray,
        prediction: dict[str, np.ndarray],
        folder: Path,
        stem: str,
        facts: dict[str, Any] | None = None,
    ) -> list[Path]:
        """Writes what :meth:`files` says to `folder`, each file whole or not at all."""
        paths = [Path(folder) / name for name in self.file_names(stem)]
        for path, content in zip(paths, self.files(image, prediction, facts or {}), strict=True):
            (write_json if isinstance(content, dict) else write_picture)(path, content)
        return paths

    def baselines(self, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
        """None."""
        return {}

    def charts(self, results: dict[str, dict[str, Any]]) -> dict[str, Image.Image]:
        """None."""
        return {}


def number(value: float | None) -> float:
    """A score for a summary: NaN for None."""
    return math.nan if value is None else float(value)


def size_or_none(task: Any, name: str, sides: str = "(height, width)") -> None:
    """Makes a pair of the field `name`; `UserError` unless it is two numbers of pixels, or (0, 0)."""
    value = getattr(task, name)
    value = tuple(value) if isinstance(value, list | tuple) else (value,)
    if len(value) != 2 or min(value) < 0 or all(value) != any(value):
        raise UserError(f"task.{name} {value} must be {sides} in pixels, or (0, 0).")
    object.__setattr__(task, name, value)
