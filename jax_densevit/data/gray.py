"""Gray photographs stored in color: a colorization model that learns from them learns to leave pictures gray."""

import numpy as np

# The largest difference between R, G and B that is still no color, and the share of pixels that may have more. A gray
# photo that went through a JPEG in color, a scanner or a faint toning stays within 14 for 99.9 % of its pixels; the
# most colorless of 590 photos in color (flowers and COCO) reaches 31 there, an airplane before a hazy sky.
SPREAD = 20
SHARE = 0.001


def is_gray(image: np.ndarray) -> bool:
    """Whether a photo is in truth gray: no more than one pixel in a thousand has channels more than 20 apart.

    A strongly toned picture (sepia, blueprint) counts as one in color, and so does a gray photo with one colored thing
    of more than a thousandth of its area.

    Args:
      image: uint8 [H, W, 3], RGB.
    """
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    return bool(np.count_nonzero(spread > SPREAD) <= SHARE * spread.size)
