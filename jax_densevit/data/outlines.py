"""Masks out of COCO's annotation files: run lengths and polygons to pixels."""

import numpy as np

from jax_densevit.data.run_lengths import mask_of_runs
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
        return mask_of_runs(segmentation["counts"], size)
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
    return mask_of_runs(encoded["counts"].decode(), size)


def _pycocotools():
    try:
        from pycocotools import mask
    except ImportError as error:
        raise UserError("COCO's polygons need pycocotools: pip install pycocotools.") from error
    return mask
