"""The real photographs that come with scikit-image and scikit-learn: something to train on without a download.

Seven scenes: an astronaut, a cup, a rocket, a motorcycle (by two lenses), a flower, a cat, a palace. They are few:
enough to see that a model learns and to try a config, not to judge a model. What the packages have from a microscope, a
telescope and the inside of an eye is left out: its colors are those of nothing else.
"""

import functools
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image

from jax_densevit.data.images import image_size, read_image
from jax_densevit.data.source import DataInfo, Example
from jax_densevit.data.sources.registry import register_source
from jax_densevit.errors import UserError, check_name

# Where each photo lies. Only files that are in the packages themselves; scikit-image would download the others.
SKIMAGE, SKLEARN = ("skimage", "data"), ("sklearn", "datasets", "images")
PLACES = {
    "astronaut": (*SKIMAGE, "astronaut.png"),
    "coffee": (*SKIMAGE, "coffee.png"),
    "flower": (*SKLEARN, "flower.jpg"),
    "motorcycle_left": (*SKIMAGE, "motorcycle_left.png"),
    "motorcycle_right": (*SKIMAGE, "motorcycle_right.png"),
    "rocket": (*SKIMAGE, "rocket.jpg"),
    "chelsea": (*SKIMAGE, "chelsea.png"),
    "china": (*SKLEARN, "china.jpg"),
}
# By photo, and both eyes of the motorcycle's stereo pair on one side. What is held out is what people photograph.
_HELD_OUT = {"val": ("chelsea",), "test": ("china",)}
SPLITS = {"train": tuple(name for name in PLACES if (name,) not in _HELD_OUT.values()), **_HELD_OUT}


@register_source("sample_photos")
class SamplePhotos:
    """Photographs in color, of many sizes, without labels: train on random crops (`data.crop`).

    Args:
      split: "train" (six photos), "val" (the cat) or "test" (the palace).
      side: above 0, photos are shrunk until their longer side has so many pixels; none is enlarged.
      mean, std: normalisation of images in [0, 1].

    Raises:
      UserError: no such split, or a package without its photos.
    """

    def __init__(
        self,
        split: str = "train",
        side: int = 0,
        mean: tuple[float, ...] = (0.5,) * 3,
        std: tuple[float, ...] = (0.5,) * 3,
    ):
        check_name("split of sample_photos", split, SPLITS)
        if side < 0:
            raise UserError(f"sample_photos: side={side} must be a number of pixels, or 0 for the photos' own size.")
        self.side = side
        self.info = DataInfo("sample_photos", mean=tuple(mean), std=tuple(std))
        self.names = SPLITS[split]

    def __len__(self) -> int:
        return len(self.names)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of photo `index`."""
        return _shrunk(image_size(_path(self.names[index])), self.side)

    def read(self, index: int) -> Example:
        """A copy of photo `index`."""
        name = self.names[index]
        return {"image": _read(name, self.side).copy(), "id": name}


@functools.cache
def _path(name: str) -> Path:
    package, *parts = PLACES[name]
    found = importlib.util.find_spec(package)  # which does not import it: that would take a second
    path = Path(found.submodule_search_locations[0], *parts) if found else None
    if path is None or not path.is_file():
        project = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
        raise UserError(f"sample_photos needs {project} with its file {parts[-1]}: pip install --upgrade {project}.")
    return path


@functools.cache
def _read(name: str, side: int) -> np.ndarray:
    """Decoded once: the six photos for training are 5 MB."""
    image = read_image(_path(name))
    height, width = _shrunk(image.shape[:2], side)
    if (height, width) == image.shape[:2]:
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def _shrunk(size: tuple[int, int], side: int) -> tuple[int, int]:
    if not side or max(size) <= side:
        return size
    return tuple(max(1, round(length * side / max(size))) for length in size)
