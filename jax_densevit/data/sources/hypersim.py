"""Hypersim (Roberts et al., ICCV 2021): rendered rooms with NYU40 labels, from the HDF5 files of Apple's release.

The images of the release are linear radiance. Its clipped previews lose everything brighter than white and look dark
elsewhere, so the tone map of the authors' own tool is applied to the HDF5 files, unless previews are asked for.
"""

import csv
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jax_densevit.data.class_names import NYU40_CLASSES, NYU40_PALETTE
from jax_densevit.data.files import read_list
from jax_densevit.data.folder_source import check_resize, resized
from jax_densevit.data.images import image_size, read_image
from jax_densevit.data.label_maps import LabelMap
from jax_densevit.data.raw import RawExample, RawSource, is_inspecting
from jax_densevit.data.source import DataInfo, Example
from jax_densevit.data.sources.registry import register_source
from jax_densevit.errors import UserError, check_name

_LOG = logging.getLogger(__name__)
INFO = DataInfo("hypersim", NYU40_CLASSES, NYU40_PALETTE)
SPLITS = ("train", "val", "test")
SPLIT_LIST = "metadata_images_split_scene_v1.csv"  # of the repository apple/ml-hypersim, evermotion_dataset/analysis
_COLUMNS = ("scene_name", "camera_name", "frame_id", "included_in_public_release", "split_partition_name")
# What each kind of image is read from, below images/scene_<camera>_.
IMAGES = {
    "tonemapped": ("final_hdf5/frame.{frame}.color.hdf5", "geometry_hdf5/frame.{frame}.render_entity_id.hdf5"),
    "tonemap_preview": ("final_preview/frame.{frame}.tonemap.jpg",),
    "color_preview": ("final_preview/frame.{frame}.color.jpg",),
}
SEMANTIC = "geometry_hdf5/frame.{frame}.semantic.hdf5"


@register_source("hypersim", lambda: INFO)
class Hypersim(RawSource):
    """Hypersim, 40 classes of NYU40, pixels without one ignored: 59,543 train, 7,386 val and 7,690 test frames.

    Args:
      root: the folder of the scenes `ai_001_001`, ...
      split: "train", "val" or "test" of the scene split that comes with the set.
      image: "tonemapped" (the HDF5 files, tone-mapped as the authors do), "tonemap_preview" (their JPEG of the same),
        or "color_preview" (radiance clipped at 1, as linear values: what the study trained on).
      size: (height, width) to which images and labels are resized; (0, 0) leaves 768x1024. The study's crops of
        512x512 at half size are crops of 256x256 with (384, 512).
      missing: "fail" refuses a folder that lacks files of the split, "skip" goes on with the frames that are there
        and logs how many are not: a part of the set gives other scores than the whole.
      split_list: the file metadata_images_split_scene_v1.csv; empty takes it from `root`.

    Attributes:
      frames: (scene, camera, frame) of every example. left_out: how many frames of the split are not there.

    Raises:
      UserError: no h5py, no folder or list, an unknown name, missing or damaged files.
    """

    def __init__(
        self,
        root: str,
        split: str,
        image: str = "tonemapped",
        size: tuple[int, int] = (0, 0),
        missing: str = "fail",
        split_list: str = "",
    ):
        check_name("split of hypersim", split, SPLITS)
        check_name("image of hypersim", image, IMAGES)
        check_name("choice for missing frames", missing, ("fail", "skip"))
        _h5py()
        super().__init__(
            INFO,
            LabelMap(NYU40_CLASSES, reduce_zero_label=True, ignore=255),
        )
        self.root, self.resize, self._files = Path(root), check_resize("hypersim", size), IMAGES[image]
        if not self.root.is_dir():
            raise UserError(f"There is no folder {self.root}: download Hypersim, or correct root.")
        wanted = list(_frames_of(Path(split_list) if split_list else self.root / SPLIT_LIST, split))
        absent = self._absent(wanted)
        self.left_out = len(absent)
        self.frames = [frame for frame in wanted if frame not in absent]
        if absent and (missing == "fail" or not self.frames) and not is_inspecting():
            scenes = {frame[0] for frame in wanted} - {frame[0] for frame in self.frames}
            first = next(iter(absent.values()))
            way = "or set missing='skip' to go on with the rest" if self.frames else "or correct root"
            raise UserError(
                f"hypersim: {len(absent):,} of the {len(wanted):,} frames of {split!r} are not below {self.root} "
                f"({len(scenes)} scenes wholly), the first for want of {first}; fetch them, {way}."
            )
        if absent:
            _LOG.warning("hypersim (%s): %d of %d frames are not there and left out.", split, len(absent), len(wanted))
        self.probe()

    def __len__(self) -> int:
        return len(self.frames)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of example `index`, from the header of its image."""
        if all(self.resize):
            return self.resize
        path = self._paths(self.frames[index])[0]
        return image_size(path) if path.suffix == ".jpg" else _read(path, shape_only=True)[:2]

    def name_of(self, index: int) -> str:
        """The file of the labels of example `index`."""
        return str(self._paths(self.frames[index])[-1])

    def raw_labels(self, index: int) -> np.ndarray:
        """NYU40 ids of example `index`, uint16 [H, W]; 0, which the set does not use, where it has -1 ("no class")."""
        labels = _read(self._paths(self.frames[index])[-1])
        return np.where(labels == -1, 0, labels).astype(np.uint16)

    def raw(self, index: int) -> RawExample:
        """The files of example `index`, the image ready to look at."""
        *images, semantic = self._paths(self.frames[index])
        picture = read_image(images[0]) if images[0].suffix == ".jpg" else tone_mapped(*map(_read, images))
        name = "/".join(self.frames[index])
        return RawExample(name, picture, self.raw_labels(index), None, str(images[0]), str(semantic))

    def read(self, index: int) -> Example:
        """Reads one example, and resizes it where asked."""
        example = super().read(index)
        return resized(example, self.resize) if all(self.resize) else example

    def _paths(self, frame: tuple[str, str, str]) -> list[Path]:
        """The files of a frame: what its image is made of, then its labels."""
        scene, camera, number = frame
        start = f"{scene}/images/scene_{camera}_"
        return [self.root / (start + file.format(frame=number)) for file in (*self._files, SEMANTIC)]

    def _absent(self, frames: list[tuple[str, str, str]]) -> dict[tuple[str, str, str], Path]:
        """The frames that are not there, each with the first of its files that is not."""
        names = functools.lru_cache(maxsize=16)(_names_in)  # a folder's frames follow one another
        absent = {}
        for frame in frames:
            path = next((path for path in self._paths(frame) if path.name not in names(path.parent)), None)
            if path is not None:
                absent[frame] = path
        return absent


def tone_mapped(radiance: np.ndarray, entities: np.ndarray) -> np.ndarray:
    """The tone map of Hypersim's own tool: the 90th percentile of brightness becomes 0.8 of white.

    Args:
      radiance: float16 [H, W, 3], linear RGB. Values that are no number count as black.
      entities: int [H, W]; -1 where nothing was hit, which does not count for the percentile.

    Returns:
      uint8 [H, W, 3]: (scale * radiance)^(1/2.2) clipped to [0, 1].
    """
    radiance = np.ascontiguousarray(radiance, np.float16)
    seen = np.nan_to_num(radiance[entities != -1].astype(np.float32), nan=0.0, posinf=65504)
    scale = 1.0
    if len(seen):
        brightness = np.percentile(seen @ np.array((0.3, 0.59, 0.11), np.float32), 90)
        scale = 0.8**2.2 / brightness if brightness >= 1e-4 else 0.0
    # All values that float16 has, mapped once: twelve times fewer powers than a frame has values.
    values = np.nan_to_num(np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64), nan=0.0)
    table = (255 * np.clip(scale * values, 0, 1) ** (1 / 2.2) + 0.5).astype(np.uint8)
    return table[radiance.view(np.uint16)]


def _frames_of(path: Path, split: str) -> Iterator[tuple[str, str, str]]:
    """(scene, camera, four digits of the frame) of the published frames of a split, in the order of the list."""
    rows = csv.DictReader(line for _, line in read_list(path))
    if not set(_COLUMNS) <= set(rows.fieldnames or ()):
        raise UserError(f"{path} lacks the columns {', '.join(_COLUMNS)}: it is not Hypersim's {SPLIT_LIST}.")
    for row in rows:
        if row["included_in_public_release"] == "True" and row["split_partition_name"] == split:
            yield row["scene_name"], row["camera_name"], f"{int(row['frame_id']):04d}"


def _read(path: Path, shape_only: bool = False):
    """The one dataset of an HDF5 file of the release, or its shape."""
    try:
        with _h5py().File(path, "r") as file:
            return file["dataset"].shape if shape_only else file["dataset"][...]
    except (OSError, KeyError) as error:
        raise UserError(f"{path}: no readable HDF5 file with a `dataset` ({error}); fetch it again.") from error


def _names_in(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()


def _h5py():
    try:
        import h5py
    except ImportError as error:
        raise UserError("hypersim needs h5py to read HDF5 files: pip install h5py.") from error
    return h5py
