"""Sets prepared once at a fixed size: memory-mapped arrays that need neither decoding nor TensorFlow.

A prepared folder holds `image.npy` uint8 [N, H, W, 3], `labels.npy` uint8 [N, H, W] and `instances.npy` uint16
[N, H, W] (where the set has them, as other maps), and `info.json` with the facts about the data and the examples' ids.
"""

import json
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from jax_densevit.data.crops import nearest, pad
from jax_densevit.data.source import MAPS, DataInfo, Example, Source, padding_of
from jax_densevit.data.sources.registry import register_source
from jax_densevit.errors import UserError

FORMAT = 1
DTYPES = {"image": np.uint8, **MAPS}
FITS = ("pad", "crop")


@register_source("arrays")
class Arrays:
    """A folder that `python -m jax_densevit.prepare` wrote.

    Args:
      folder: the prepared folder.

    Raises:
      UserError: the folder is not one, or its files are damaged.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)
        path = self.folder / "info.json"
        if not path.is_file():
            raise UserError(
                f"{self.folder} is not a prepared folder (it has no info.json); "
                "write one with `python -m jax_densevit.prepare --config=... --output=FOLDER`."
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise UserError(f"{path} has format {values['format']}, this version reads {FORMAT}: prepare it again.")
            self.info = DataInfo.from_json(values["info"])
            self._ids = values["ids"]
            height, width = values["size"]
            names = values["arrays"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); prepare the folder again.") from error
        self._size = (int(height), int(width))
        self._arrays = {}
        for name in names:
            expected = (len(self._ids), *self._size, *((3,) if name == "image" else ()))
            file = self.folder / f"{name}.npy"
            try:
                array = np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f"{file} is missing or damaged ({error}); prepare the folder again.") from error
            if array.shape != expected or array.dtype != DTYPES[name]:
                raise UserError(
                    f"{file} holds {array.dtype} {array.shape} where info.json says {expected}; prepare it again."
                )
            self._arrays[name] = array

    def __len__(self) -> int:
        return len(self._ids)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of every example."""
        return self._size

    def read(self, index: int) -> Example:
        """Copies example `index` out of the arrays."""
        return {name: np.array(array[index]) for name, array in self._arrays.items()} | {"id": self._ids[index]}


def write_arrays(
    source: Source,
    folder: str | os.PathLike,
    size: tuple[int, int] | None = None,
    *,
    fit: str = "pad",
    threads: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Prepares a set: writes it at one size into a folder that :class:`Arrays` reads.

    Images are scaled with their aspect kept, by Pillow's antialiased bilinear filter; labels and instances by nearest
    pixel centres.

    Args:
      source: the set.
      folder: where to; it must not exist. It appears when everything is written, never half.
      size: (height, width) of all examples; None = as they are, which must be one size.
      fit: "pad" scales the whole image in and fills the rest, at the bottom and on the right, with the mean colour and
        the ignore label; "crop" covers the size and cuts what protrudes, equally on both sides.
      threads: how many read at the same time.
      progress: called with the number of examples written so far.

    Returns:
      The folder.

    Raises:
      UserError: the folder exists or cannot be written, the disk is full, an example cannot be read, or, where `size`
        is None, has another size.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already; name another folder, or remove it first.")
    if not len(source):
        raise UserError(f"The data set {source.info.name!r} has no examples to prepare.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            _write(source, part, size, fit, threads, progress)
            part.chmod(0o755)  # what mkdir would have given, under the usual umask
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}).") from error
    return folder


def _write(source, folder, size, fit, threads, progress) -> None:
    ids, arrays = [], {}
    first_size = tuple(source.size(0))
    for example in _in_order(source, threads):
        if size is None and example["image"].shape[:2] != first_size:
            raise UserError(
                f"{example['id']} has size {example['image'].shape[:2]} and the first example {first_size}: "
                "give the size that all shall have."
            )
        fitted = fit_example(example, size or first_size, fit, source.info)
        names = [name for name in DTYPES if name in fitted]
        if not ids:
            for name in names:
                shape = (len(source), *fitted[name].shape)
                arrays[name] = _create(folder / f"{name}.npy", DTYPES[name], shape)
        elif names != list(arrays):
            raise UserError(f"{example['id']} has {', '.join(names)} where other examples have {', '.join(arrays)}.")
        for name, array in arrays.items():
            array[len(ids)] = fitted[name]
        ids.append(example["id"])
        if progress:
            progress(len(ids))
    for array in arrays.values():
        array.flush()
    values = {"format": FORMAT, "info": source.info.to_json(), "size": size or first_size}
    values |= {"arrays": list(arrays), "ids": ids}
    (folder / "info.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def _create(path: Path, dtype, shape) -> np.memmap:
    """A memory-mapped .npy file whose room on the disk is taken now: a full disk would kill a process that maps it."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with open(path, "r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _in_order(source: Source, threads: int) -> Iterator[Example]:
    with ThreadPoolExecutor(threads) as pool:
        pending: deque = deque()
        try:
            for index in range(len(source)):
                pending.append(pool.submit(source.read, index))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def fit_example(example: Example, size: tuple[int, int], fit: str, info: DataInfo) -> dict[str, np.ndarray]:
    """An example's arrays at exactly (height, width) `size`; `fit` as in :func:`write_arrays`."""
    image = example["image"]
    height, width = image.shape[:2]
    if fit not in FITS:
        raise UserError(f"fit is {fit!r}; it must be one of {', '.join(FITS)}.")
    scale = (min if fit == "pad" else max)(size[0] / height, size[1] / width)
    scaled = max(1, round(height * scale)), max(1, round(width * scale))
    y, x = (max(0, scaled[0] - size[0]) // 2, max(0, scaled[1] - size[1]) // 2)
    window = (y, x, min(scaled[0], size[0]), min(scaled[1], size[1]))
    if scaled != (height, width):
        image = np.asarray(Image.fromarray(image).resize(scaled[::-1], Image.Resampling.BILINEAR))
    fill = [int(255 * m + 0.5) for m in info.mean]
    result = {"image": pad(image[y : y + window[2], x : x + window[3]], size, fill)}
    for name in MAPS:
        if name in example:
            result[name] = pad(nearest(example[name], scaled, window), size, padding_of(name, info.ignore))
    return result
