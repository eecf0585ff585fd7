"""How pictures come to the size of a feature network: modes by name, because each gives other features.

On the same pictures and weights "tf1" and "pytorch_fid" differ by about one percent of the features, and a filter with
or without antialiasing moves an FID by several points. Nothing is rounded to whole values on the way.
"""

import numpy as np
from PIL import Image

from jax_densevit.errors import check_name

# What each mode's own users take from 0..255 to the FID network's -1..1: (x - first) / second.
SCALES = {
    "tf1": (128.0, 128.0),  # the TensorFlow graph of 2015, TTUR, TF-GAN, torch-fidelity, guided-diffusion
    "pytorch_fid": (127.5, 127.5),
    "clean": (128.0, 128.0),  # clean-fid
    "torchmetrics": (128.0, 128.0),  # 1.9 and later
}


def resize_picture(image: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Resizes one picture.

    Args:
      image: uint8 `[H, W, 3]`.
      size: (height, width) of the result.
      mode: a name of `SCALES`. "tf1" is bilinear without antialiasing, sample i at `i * H / height`; "pytorch_fid" the
        same with samples at the middle of pixels; "clean" Pillow's bicubic with antialiasing, cut to 0..255;
        "torchmetrics" bilinear with antialiasing.

    Returns:
      float32 `[height, width, 3]`, still 0..255.

    Raises:
      UserError: an unknown mode.
    """
    check_name("way to resize pictures for a feature network", mode, SCALES)
    if mode in ("clean", "torchmetrics"):
        method = Image.Resampling.BICUBIC if mode == "clean" else Image.Resampling.BILINEAR
        channels = [Image.fromarray(image[..., i].astype(np.float32)) for i in range(3)]
        resized = [np.asarray(channel.resize(size[::-1], method)) for channel in channels]
        return np.clip(np.stack(resized, -1), 0, 255)
    where = _top_left if mode == "tf1" else _middle
    x = image.astype(np.float32)
    for axis in (0, 1):
        x = _interpolate(x, axis, where(x.shape[axis], size[axis]))
    return x


def _top_left(given: int, length: int) -> np.ndarray:
    return np.arange(length) * (given / length)


def _middle(given: int, length: int) -> np.ndarray:
    return np.maximum((np.arange(length) + 0.5) * (given / length) - 0.5, 0)


def _interpolate(x: np.ndarray, axis: int, position: np.ndarray) -> np.ndarray:
    low = np.minimum(position.astype(np.int64), x.shape[axis] - 1)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    share = (position - low).astype(np.float32).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    below = x.take(low, axis)
    return below + (x.take(high, axis) - below) * share
