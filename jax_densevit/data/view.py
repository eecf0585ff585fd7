"""A source seen in another way: what its kinds share."""

from collections.abc import Sequence

from jax_densevit.data.source import Source
from jax_densevit.errors import UserError


class View:
    """Another source's examples in windows of (height, width) `window`; attributes it lacks are those of the source.

    Raises:
      UserError: a window that is not two positive numbers; `option` is what a config calls it.
    """

    option = ""

    def __init__(self, source: Source, window: Sequence[int]):
        self.source, self.window, self.info = source, tuple(window), source.info
        if len(self.window) != 2 or min(self.window) < 1:
            raise UserError(f"{self.option}={self.window} must be (height, width), both positive.")

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str):
        return getattr(self.__dict__["source"], name)
