"""Any folder of photographs, without labels: for colorization, where the picture itself is the truth.

Gray photographs are found by their pixels and left out: a model that learns from them learns to leave pictures gray.
Looking at them costs one decoding of every file when the source is built (3 ms of one core for a photo of 500x375).
"""

import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jax_densevit.data.files import list_images, read_list
from jax_densevit.data.gray import is_gray
from jax_densevit.data.images import image_size, read_image
from jax_densevit.data.pipeline import default_threads
from jax_densevit.data.source import DataInfo, Example
from jax_densevit.data.sources.registry import register_source
from jax_densevit.errors import UserError, check_name

_LOG = logging.getLogger(__name__)
SPLITS = ("train", "val", "test")
GRAY = ("leave_out", "keep")


def photo_facts(
    root: str, name: str = "", mean: tuple[float, ...] = (0.5,) * 3, std: tuple[float, ...] = (0.5,) * 3
) -> DataInfo:
    """What is known about photographs below a folder: how they are normalised."""
    return DataInfo(name or Path(root).resolve().name, mean=tuple(mean), std=tuple(std))


@register_source("photo_folder", photo_facts)
class PhotoFolder:
    """Photographs of any size below a folder, in the order of their names.

    Args:
      root: the folder, searched with its subfolders.
      split: "train", "val", "test", or "" for everything. With a `list_file` it is not needed. A root that has
        subfolders of these names is split by them; any other is split by a hash of each photo's name, so that a photo
        stays in its split when others come or go.
      list_file: a text file that picks and orders photos: one path a line below the root, with or without suffix.
      val_share, test_share: of the photos, where they are split by hash.
      gray: "leave_out" leaves out gray photographs and logs how many; "keep" does not look.
      suffix: the end of the file names that count, where two files differ only in it (a.jpg, a.png).
      name: the data set's name; empty takes the folder's.
      mean, std: normalisation of images in [0, 1].

    Attributes:
      paths: {name: file} of the photos.
      left_out: {name: file} of the gray ones.

    Raises:
      UserError: no folder, list or photo, or a split that the root does not have.
    """

    def __init__(
        self,
        root: str,
        split: str = "",
        list_file: str = "",
        val_share: float = 0.1,
        test_share: float = 0.1,
        gray: str = "leave_out",
        suffix: str = "",
        name: str = "",
        mean: tuple[float, ...] = (0.5,) * 3,
        std: tuple[float, ...] = (0.5,) * 3,
    ):
        check_name("choice for gray photographs", gray, GRAY)
        if split:
            check_name("split of photo_folder", split, SPLITS)
        if min(val_share, test_share) < 0 or val_share + test_share >= 1:
            raise UserError(f"val_share={val_share} and test_share={test_share} must leave something to train on.")
        self.info = photo_facts(root, name, mean, std)
        found = list_images(root, suffix)
        if list_file:
            found = _listed(list_file, found)
        elif split:
            found = _split(Path(root), split, found, val_share, test_share)
        if not found:
            raise UserError(f"{root} has no photo{f' for the split {split!r}' if split else ''}: check root and split.")
        grays = _gray_ones(found) if gray == "leave_out" else set()
        self.left_out = {name: path for name, path in found.items() if name in grays}
        self.paths = {name: path for name, path in found.items() if name not in grays}
        if not self.paths:
            raise UserError(f"All {len(found)} photos of {root} are gray: nothing to learn colors from.")
        if grays:
            where = f"{self.info.name}{f' ({split})' if split else ''}"
            _LOG.warning("%s: %d of %d photos are gray and left out.", where, len(grays), len(found))
        self._files = list(self.paths.items())

    def __len__(self) -> int:
        return len(self._files)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of photo `index` as displayed, from the file's header."""
        return image_size(self._files[index][1])

    def read(self, index: int) -> Example:
        """Photo `index`, upright; :class:`UserError` naming the file when it cannot be read."""
        name, path = self._files[index]
        return {"image": read_image(path), "id": name}


def _listed(list_file: str, found: dict[str, Path]) -> dict[str, Path]:
    chosen = {}
    for number, line in read_list(list_file):
        name = line if line in found else os.path.splitext(line)[0].removeprefix("./")
        if name not in found:
            raise UserError(f"{list_file}, line {number}: there is no photo {line!r} below the root.")
        chosen[name] = found[name]
    return chosen


def _split(root: Path, split: str, found: dict[str, Path], val: float, test: float) -> dict[str, Path]:
    folders = [name for name in SPLITS if (root / name).is_dir()]
    if folders:
        if split not in folders:
            raise UserError(f"{root} is split into {' and '.join(folders)}; it has no folder {split!r}.")
        return {name: path for name, path in found.items() if name.startswith(f"{split}/")}

    def share_of(name: str) -> str:
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "big") / 2**64
        return "val" if place < val else "test" if place < val + test else "train"

    return {name: path for name, path in found.items() if share_of(name) == split}


def _gray_ones(found: dict[str, Path]) -> set[str]:
    def look(item: tuple[str, Path]) -> bool:
        try:
            return is_gray(read_image(item[1]))
        except UserError:  # unreadable: whoever reads it decides what that means (data.on_bad)
            return False

    with ThreadPoolExecutor(default_threads()) as pool:
        return {item[0] for item, gray in zip(found.items(), pool.map(look, found.items()), strict=True) if gray}
