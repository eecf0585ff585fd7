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
from PIL import Image

from jax_densevit.data.order import scalar_hash
from jax_densevit.data.source import IGNORE, MAPS, Example, padding_of

TRIES = 10  # crops that are judged before the next one is taken as it comes
_CROP = 0x63726F70
_CACHE_LINE = 64  # bytes
Arrays = dict[str, np.ndarray]


def uniforms(seed: tuple[int, int]) -> Iterator[float]:
    """An endless stream of uniform numbers in [0, 1) from an example's seed."""
    start = scalar_hash(_CROP, *seed)
    for draw in itertools.count():
        yield (scalar_hash(draw, start=start) >> 11) * 2.0**-53


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


def pad(array: np.ndarray, size: tuple[int, int], value, out: np.ndarray | None = None) -> np.ndarray:
    """Pads [h, w] or [h, w, C] at the bottom and on the right to `size` with `value` (a number, or one per channel).

    The result is written into `out`, if given; otherwise it is an array of its own.
    """
    height, width = array.shape[:2]
    if out is None:
        out = np.empty((*size, *array.shape[2:]), array.dtype)
    out[:height, :width] = array
    out[:height, width:] = value
    if height < size[0]:
        out[height] = value
        out[height + 1 :] = out[height]  # whole rows are copied many times faster than pixels
    return out


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

    def __call__(self, example: Example, seed: tuple[int, int], out: Arrays | None = None) -> Arrays:
        """Crops `example` with the randomness of `seed` (two integers, see :func:`order.augmentation_seed`).

        Args:
          example: what a source reads.
          seed: the example's seed.
          out: arrays to write the results into, by name; those it lacks are made and entered.

        Returns:
          `out`: "labels" and other maps (if the example has them), cropped and padded; "size" int32 [2], the height
          and width that are not padding; and "image": the crop, padded, if nothing was to be resized, otherwise the
          pixels that :func:`resample` needs, float32, with "box" float32 [4]: the row and column of the first sample
          and of the last, as fractions of the way from the first pixel's centre to the last one's.
        """
        out = {} if out is None else out
        image = example["image"]
        draws = uniforms(seed)
        ratio = self.ratio[0] + next(draws) * (self.ratio[1] - self.ratio[0])
        size = scaled = image.shape[:2]
        if self.box != (0, 0):
            scaled = scaled_size(size, self.box, ratio)
        window, labels = self._window(scaled, example.get("labels"), draws)
        y, x, height, width = window
        _enter(out, "size", (height, width), np.int32)
        if labels is not None:
            out["labels"] = pad(labels, self.crop, self.ignore, out.get("labels"))
        for name in MAPS:
            if name in example and name != "labels":
                seen = nearest(example[name], scaled, window)
                out[name] = pad(seen, self.crop, padding_of(name, self.ignore), out.get(name))
        if self.box == (0, 0):
            out["image"] = pad(image[y : y + height, x : x + width], self.crop, self.fill, out.get("image"))
            return out
        rows, first_row, last_row = _touched(y, height, size[0], scaled[0])
        columns, first_column, last_column = _touched(x, width, size[1], scaled[1])
        out["image"] = _to_interpolate(image, rows, columns)
        _enter(out, "box", (first_row, first_column, last_row, last_column), np.float32)
        return out

    def _window(self, scaled: tuple[int, int], labels: np.ndarray | None, draws: Iterator[float]):
        """Draws (y, x, height, width) of the crop in the resized image; and the labels in it, or None."""
        height, width = min(scaled[0], self.crop[0]), min(scaled[1], self.crop[1])
        free = scaled[0] - height, scaled[1] - width
        for tries in itertools.count():
            window = int(next(draws) * (free[0] + 1)), int(next(draws) * (free[1] + 1)), height, width
            seen = None if labels is None else nearest(labels, scaled, window)
            if self.max_class_ratio >= 1 or seen is None or free == (0, 0) or tries == TRIES:
                return window, seen
            # Pillow counts in half the time of NumPy, which would widen every pixel to 64 bits first.
            counts = np.array(Image.fromarray(seen).histogram())
            counts[self.ignore] = 0
            if (counts > 0).sum() > 1 and counts.max() < self.max_class_ratio * counts.sum():
                return window, seen


def _enter(out: Arrays, name: str, values, dtype) -> None:
    """Writes a few numbers into `out[name]`, which is made if it is not there."""
    out.setdefault(name, np.empty(len(values), dtype))[...] = values


def _touched(start: int, count: int, size: int, scaled: int) -> tuple[slice, float, float]:
    """Where bilinear samples `start .. start + count` of a resized axis lie on the source axis.

    Returns:
      The source pixels that they depend on, one more at each end (beyond the image even: the edge repeats there), and
      the first and last sample's place among them, as fractions of the way from the first to the last pixel's centre.
    """
    first, last = ((place + 0.5) * size / scaled - 0.5 for place in (start, start + count - 1))
    low, high = math.floor(first) - 1, math.floor(last) + 3
    return slice(low, high), (first - low) / (high - 1 - low), (last - low) / (high - 1 - low)


def _to_interpolate(image: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """`image[rows, columns] + 1/2` in float32; the slices may begin before the image or end after it: edges repeat.

    The half makes of the interpolation's cut to uint8 a rounding; here it costs the least.
    """
    window = aligned_empty((rows.stop - rows.start, columns.stop - columns.start, 3), np.float32)
    (top, height), (left, width) = (
        (max(0, -s.start), min(s.stop, n) - max(0, s.start)) for s, n in zip((rows, columns), image.shape, strict=False)
    )
    inner = image[max(0, rows.start) : rows.stop, max(0, columns.start) : columns.stop]
    np.add(inner, np.float32(0.5), out=window[top : top + height, left : left + width])
    middle = window[top : top + height]
    middle[:, :left] = middle[:, left : left + 1]
    middle[:, left + width :] = middle[:, left + width - 1 : left + width]
    window[:top] = window[top]
    window[top + height :] = window[top + height - 1]
    return window


def aligned_empty(shape: tuple[int, ...], dtype) -> np.ndarray:
    """`np.empty` that begins on a cache line: TensorFlow and JAX take such arrays over, others they copy."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(count + _CACHE_LINE, np.uint8)
    first = -memory.ctypes.data % _CACHE_LINE
    return memory[first : first + count].view(dtype).reshape(shape)


def resample(window, box, size, crop: tuple[int, int], fill: tuple[int, int, int]):
    """The image of a :class:`RandomCrop` that resizes, as TensorFlow operations: uint8 [crop, 3].

    Args:
      window: float32 tensor [h, w, 3], the source pixels that the crop depends on, plus 1/2.
      box: float32 tensor [4]: where the first and the last sample lie, as :class:`RandomCrop` says.
      size: int32 tensor [2]: the part of the crop that is not padding.
      crop, fill: as in :class:`RandomCrop`.
    """
    import tensorflow as tf

    # Of TensorFlow's kernels that interpolate from any place at any scale, this is the fastest, on float32.
    sampled = tf.raw_ops.CropAndResize(
        image=window[None], boxes=box[None], box_ind=[0], crop_size=size, method="bilinear"
    )[0]
    sampled = tf.cast(sampled, tf.uint8)

    def padded():
        color = tf.constant(fill, tf.uint8)
        right = tf.broadcast_to(color, (size[0], crop[1] - size[1], 3))
        below = tf.broadcast_to(color, (crop[0] - size[0], crop[1], 3))
        return tf.concat([tf.concat([sampled, right], 1), below], 0)

    return tf.ensure_shape(tf.cond(tf.reduce_all(size == crop), lambda: sampled, padded), (*crop, 3))
