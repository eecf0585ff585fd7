"""The middle of every example of a source: evaluation at the size of the training crops, the same pixels every time."""

from jax_densevit.data.source import Example
from jax_densevit.data.view import View


class CentreCrop(View):
    """A source seen through a window of (height, width) `window` in the middle of every image.

    Where an image is smaller, its side stays as it is: nothing is padded or stretched. What is left over is cut equally
    on both sides, an odd pixel at the bottom or on the right.
    """

    option = "centre_crop"

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of example `index` in the window."""
        height, width = self.source.size(index)
        return min(height, self.window[0]), min(width, self.window[1])

    def read(self, index: int) -> Example:
        """The middle of example `index`; errors are the source's."""
        example = self.source.read(index)
        height, width = example["image"].shape[:2]
        y, x = max(0, height - self.window[0]) // 2, max(0, width - self.window[1]) // 2
        rows, columns = slice(y, y + self.window[0]), slice(x, x + self.window[1])
        return {name: value if name == "id" else value[rows, columns] for name, value in example.items()}
