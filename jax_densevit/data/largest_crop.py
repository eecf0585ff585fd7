"""As much of a picture as a crop's proportions allow, averaged by area to the crop's size: no padding, no aliasing.

The preprocessing of ColTran (Kumar et al. 2021): the largest square, at a random place in training and in the middle in
evaluation, then the mean over the area of each new pixel, rounded to the nearest whole number. Labels and instances are
never averaged: they take the nearest pixel.
"""

import dataclasses

import numpy as np

from jax_densevit.data.crops import nearest, uniforms
from jax_densevit.data.source import MAPS, Example
from jax_densevit.data.view import View
from jax_densevit.layers.resize import largest_window, resize_area


@dataclasses.dataclass(frozen=True)
class LargestRandomCrop:
    """Turns one example of any size into a training crop; used like :class:`~jax_densevit.data.crops.RandomCrop`.

    Attributes:
      crop: (height, width) of the result.
      box: (0, 0): nothing is left for TensorFlow to resize.
    """

    crop: tuple[int, int]
    box: tuple[int, int] = dataclasses.field(default=(0, 0), init=False)

    def __call__(
        self, example: Example, seed: tuple[int, int], out: dict[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Crops `example` at a place drawn from `seed` (two integers) into `out`; "size" int32 [2] is always `crop`."""
        out, draws = {} if out is None else out, uniforms(seed)
        size = example["image"].shape[:2]
        window = largest_window(size, self.crop)
        start = tuple(int(next(draws) * (side - part + 1)) for side, part in zip(size, window, strict=True))
        for name, array in shrunk(example, start, window, self.crop).items():
            out.setdefault(name, np.empty(array.shape, array.dtype))[...] = array
        out.setdefault("size", np.empty(2, np.int32))[...] = self.crop
        return out


class LargestCentreCrop(View):
    """A source seen through the largest window of the proportions of `window` in the middle of every example, averaged
    to (height, width) `window`: evaluation at the size of the training crops.
    """

    option = "largest_crop"

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of every example."""
        return self.window

    def read(self, index: int) -> Example:
        """Example `index`; errors are the source's."""
        example = self.source.read(index)
        size = example["image"].shape[:2]
        window = largest_window(size, self.window)
        start = tuple((side - part) // 2 for side, part in zip(size, window, strict=True))
        return {**example, **shrunk(example, start, window, self.window)}


def shrunk(
    example: Example, start: tuple[int, int], window: tuple[int, int], crop: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The arrays of an example in the window of (height, width) `window` from (row, column) `start`, at size `crop`."""
    rows, columns = (slice(first, first + part) for first, part in zip(start, window, strict=True))
    arrays = {"image": resize_area(example["image"][rows, columns], crop).astype(np.uint8)}
    for name in MAPS:
        if name in example:
            arrays[name] = nearest(example[name][rows, columns], crop, (0, 0, *crop))
    return arrays
