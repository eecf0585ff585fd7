"""Random keep-aspect resize, class-ratio crop and padding: from an image of any size to a training crop of one size.

The chain of SETR (Zheng et al., CVPR 2021) and MMSegmentation: draw a ratio, resize the image into the box times that
ratio, redraw the crop while one class covers too much of it, pad what is missing at the bottom and on the right. The
image is interpolated (bilinear, half-pixel centres, no antialiasing, rounded to uint8), labels and instances never are:
they take the nearest pixel, half-pixel centres too, so that they stay under the image.

Everything random comes from the example's seed by our own hash. Only the part of the image that lands in the crop is
ever resampled: :class:`RandomCrop` chooses it in NumPy, :func:`resample` interpolates it in TensorFlow.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np

from jax_densevit.data.order import scalar_hash
from jax_densevit.data.source import IGNORE, Example

TRIES = 10  # crops that are judged before the next one is taken as it comes
_CROP = 0x63726F70


def uniforms(seed: tuple[int, int]) -> Iterator[float]:
    """An endless stream of uniform numbers in [0, 1) from an example's seed."""
    for draw in itertools.count():
        yield (scalar_hash(_CROP, *seed, draw) >> 11) * 2.0**-53


def scaled_size(size: tuple[int, int], box: tuple[int, int], ratio: float) -> tuple[int, int]:
    """The (height, width) into which an image is resized: as large as fits the box times `ratio`, aspect kept.

    The longer side of the box bounds the longer side of the image, whichever way it is turned. Sides of the box are
    rounded down and sides of the image to nearest, as MMCV does.
    """
    long, short = int(max(box) * ratio), int(min(box) * ratio)
    scale = min(long / max(size), short / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))


def nearest(array: np.ndarray, scaled: tuple[int, int], window: tuple[int, int, int, int]) -> np.ndarray:
    """The part `window` = (y, x, height, width) of `array` [H, W] resized to `scaled` by nearest pixel centres."""
    y, x, height, width = window
    if scaled == array.shape[:2]:
        return array[y : y + height, x : x + width]
    rows = (2 * np.arange(y, y + height) + 1) * array.shape[0] // (2 * scaled[0])
    columns = (2 * np.arange(x, x + width) + 1) * array.shape[1] // (2 * scaled[1])
    return array[rows][:, columns]


def pad(array: np.ndarray, size: tuple[int, int], value) -> np.ndarray:
    """Pads [h, w] or [h, w, C] at the bottom and on the right to `size` with `value` (a number, or one per channel)."""
    height, width = array.shape[:2]
    if (height, width) == size:
        return np.ascontiguousarray(array)
    padded = np.empty((*size, *array.shape[2:]), array.dtype)
    padded[:height, :width] = array
    padded[height:] = value
    padded[:height, width:] = value
    return padded


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Turns one example of any size into a training crop; the parts are described in the module's docstring.

    Attributes:
      crop: (height, width) of the result.
      box: the resize box (two sides, any order); (0, 0) leaves sizes alone.
      ratio: (low, high) of the uniform factor on the box.
      max_class_ratio: a crop is drawn again (10 times at most) while it shows fewer than two classes, or one class
        covers this share or more of its labelled pixels; 1 takes the first crop.
      fill: RGB of the padding; the data's mean colour, which normalises to 0.
      ignore: the label of the padding.
    """

    crop: tuple[int, int]
    box: tuple[int, int] = (0, 0)
    ratio: tuple[float, float] = (1.0, 1.0)
    max_class_ratio: float = 1.0
    fill: tuple[int, int, int] = (0, 0, 0)
    ignore: int = IGNORE

    def __call__(self, example: Example, seed: tuple[int, int]) -> dict[str, np.ndarray]:
        """Crops `example` with the randomness of `seed` (two integers, see :func:`order.augmentation_seed`).

        Returns:
          "labels" and "instances" (if the example has them), cropped and padded; "size" int32 [2], the height and width
          that are not padding; and "image": the crop, padded, if nothing was to be resized, otherwise the pixels that
          :func:`resample` needs, with "box" float32 [4]: the row and column of the first sample and of the last, as
          fractions of the way from the first pixel's centre to the last one's.
        """
        image = example["image"]
        draws = uniforms(seed)
        ratio = self.ratio[0] + next(draws) * (self.ratio[1] - self.ratio[0])
        size = scaled = image.shape[:2]
        if self.box != (0, 0):
            scaled = scaled_size(size, self.box, ratio)
        window = self._window(scaled, example.get("labels"), draws)
        y, x, height, width = window
        result = {"size": np.array((height, width), np.int32)}
        for name, value in (("labels", self.ignore), ("instances", 0)):
            if name in example:
                result[name] = pad(nearest(example[name], scaled, window), self.crop, value)
        if self.box == (0, 0):
            result["image"] = pad(image[y : y + height, x : x + width], self.crop, self.fill)
            return result
        rows, first_row, last_row = _touched(y, height, size[0], scaled[0])
        columns, first_column, last_column = _touched(x, width, size[1], scaled[1])
        result["image"] = _with_edges(image, rows, columns)
        result["box"] = np.array((first_row, first_column, last_row, last_column), np.float32)
        return result

    def _window(self, scaled: tuple[int, int], labels, draws: Iterator[float]) -> tuple[int, int, int, int]:
        height, width = min(scaled[0], self.crop[0]), min(scaled[1], self.crop[1])
        free = scaled[0] - height, scaled[1] - width
        for tries in itertools.count():
            window = int(next(draws) * (free[0] + 1)), int(next(draws) * (free[1] + 1)), height, width
            if self.max_class_ratio >= 1 or labels is None or free == (0, 0) or tries == TRIES:
                return window
            counts = np.bincount(nearest(labels, scaled, window).ravel(), minlength=256)
            counts[self.ignore] = 0
            if (counts > 0).sum() > 1 and counts.max() < self.max_class_ratio * counts.sum():
                return window


def _touched(start: int, count: int, size: int, scaled: int) -> tuple[slice, float, float]:
    """Where bilinear samples `start .. start + count` of a resized axis lie on the source axis.

    Returns:
      The source pixels that they depend on, one more at each end (beyond the image even: the edge repeats there), and
      the first and last sample's place among them, as fractions of the way from the first to the last pixel's centre.
    """
    first, last = ((place + 0.5) * size / scaled - 0.5 for place in (start, start + count - 1))
    low, high = math.floor(first) - 1, math.floor(last) + 3
    return slice(low, high), (first - low) / (high - 1 - low), (last - low) / (high - 1 - low)


def _with_edges(image: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """`image[rows, columns]` where the slices may begin before the image or end after it: its edge repeats there."""
    inner = image[max(0, rows.start) : rows.stop, max(0, columns.start) : columns.stop]
    beyond = [(max(0, -s.start), max(0, s.stop - n)) for s, n in zip((rows, columns), image.shape, strict=False)]
    return np.pad(inner, (*beyond, (0, 0)), mode="edge") if np.any(beyond) else np.ascontiguousarray(inner)


def resample(image, box, size, crop: tuple[int, int], fill: tuple[int, int, int]):
    """The image of a :class:`RandomCrop` that resizes, as TensorFlow operations: uint8 [crop, 3].

    Args:
      image: uint8 tensor [h, w, 3], the source pixels that the crop depends on.
      box: float32 tensor [4]: where the first and the last sample lie, as :class:`RandomCrop` says.
      size: int32 tensor [2]: the part of the crop that is not padding.
      crop, fill: as in :class:`RandomCrop`.
    """
    import tensorflow as tf

    # Of TensorFlow's kernels that interpolate from any place at any scale, this is the fastest, on float32.
    sampled = tf.raw_ops.CropAndResize(
        image=tf.cast(image, tf.float32)[None], boxes=box[None], box_ind=[0], crop_size=size, method="bilinear"
    )[0]
    sampled = tf.cast(tf.round(sampled), tf.uint8)
    color = tf.constant(fill, tf.uint8)
    right = tf.broadcast_to(color, (size[0], crop[1] - size[1], 3))
    below = tf.broadcast_to(color, (crop[0] - size[0], crop[1], 3))
    return tf.ensure_shape(tf.concat([tf.concat([sampled, right], 1), below], 0), (*crop, 3))
