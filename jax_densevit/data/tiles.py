"""Examples cut into windows side by side: evaluation of whole pictures at the size of the training crops."""

import bisect
from collections.abc import Sequence

from jax_densevit.data.source import Example, Source
from jax_densevit.data.view import View


class Tiles(View):
    """A source whose examples are the windows of (height, width) `window` of another one's, row by row.

    As many whole windows as fit are laid into the middle of each image; what is left over at its borders is not seen.
    An image that is smaller than the window is one example, its longer side cut. Names are those of the images with row
    and column of the window, from 0.
    """

    option = "tiles"

    def __init__(self, source: Source, window: Sequence[int]):
        super().__init__(source, window)
        self._first = [0]  # of every image its first window, and behind the last the end
        for index in range(len(source)):
            rows, columns = self._grid(source.size(index))
            self._first.append(self._first[-1] + rows * columns)

    def __len__(self) -> int:
        return self._first[-1]

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of example `index`."""
        height, width = self.source.size(self._place(index)[0])
        return min(height, self.window[0]), min(width, self.window[1])

    def read(self, index: int) -> Example:
        """Window `index`; errors are the source's."""
        image, number = self._place(index)
        example = self.source.read(image)
        size = example["image"].shape[:2]
        grid = self._grid(size)
        place = divmod(number, grid[1])
        cut = []
        for side, window, count, at in zip(size, self.window, grid, place, strict=True):
            start = max(0, side - count * window) // 2 + at * window
            cut.append(slice(start, start + window))
        name = f"{example['id']} {place[0]},{place[1]}"
        return {key: name if key == "id" else value[tuple(cut)] for key, value in example.items()}

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of windows."""
        return tuple(max(1, side // window) for side, window in zip(size, self.window, strict=True))

    def _place(self, index: int) -> tuple[int, int]:
        """(image, number of the window in it)."""
        image = bisect.bisect_right(self._first, index) - 1
        return image, index - self._first[image]
