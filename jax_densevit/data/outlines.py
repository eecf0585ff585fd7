"""Masks out of COCO's annotation files: run lengths and polygons to pixels."""

from collections.abc import Sequence

import numpy as np

from jax_densevit.errors import UserError

_FAR = 2  # polygons may leave the image by this many of its sides; beyond, the file is not what it says


def annotated_mask(segmentation: object, size: tuple[int, int]) -> np.ndarray:
    """The mask of one COCO annotation.

    Args:
      segmentation: polygons `[[x0, y0, x1, y1, ...], ...]`, or run lengths `{"size": [H, W], "counts": ...}`, the
        counts being numbers or COCO's string.
      size: (height, width) of the image.

    Returns:
      bool [H, W], the pixels that pycocotools gives; polygons need it to be installed.

    Raises:
      UserError: no pycocotools.
      ValueError: it is no mask of an image of this size.
    """
    if isinstance(segmentation, dict):
        if tuple(segmentation["size"]) != tuple(size):
            raise ValueError(f"run lengths of {segmentation['size']}, not of {list(size)}")
        counts = segmentation["counts"]
        return _from_runs(_unpacked(counts) if isinstance(counts, str) else counts, size)
    polygons = [np.asarray(polygon, np.float64) for polygon in segmentation]
    for polygon in polygons:
        low, high = -_FAR * max(size), (1 + _FAR) * max(size)
        # pycocotools takes memory for every pixel of an edge, wherever it is, and knows no error.
        if polygon.ndim != 1 or polygon.size < 6 or polygon.size % 2 or not ((polygon > low) & (polygon < high)).all():
            raise ValueError("a polygon is no list of three or more points near the image")
    if not polygons:
        return np.zeros(size, bool)
    coco = _pycocotools()
    encoded = coco.merge(coco.frPyObjects([polygon.tolist() for polygon in polygons], *size))
    return _from_runs(_unpacked(encoded["counts"].decode()), size)


def _from_runs(counts: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """Runs down the columns, outside and inside by turns, the first outside."""
    runs = np.asarray(counts, np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError(f"run lengths do not add up to {size[0]} x {size[1]} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size, order="F")


def _unpacked(text: str) -> list[int]:
    """COCO's string: five bits a character, the lowest first, a sixth while more follow; from the fourth run on the
    difference to the run of the same kind before."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("run lengths are no string of COCO's")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def _pycocotools():
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UserError("COCO's polygons need pycocotools: pip install pycocotools.") from error
    return mask
