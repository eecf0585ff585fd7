"""A SHA-256 manifest of every file of a checkpoint: what Orbax does not check, we do.

Orbax 0.12 restores a data file with a flipped bit without a word. The manifest is written while the folder still has a
temporary name, after every file was forced to disk, so a checkpoint under its final name always has one.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from jax_densevit.writing import whole_file

NAME = "manifest.json"
_BLOCK = 1 << 22


def write_manifest(folder: Path) -> None:
    """Hashes every file below `folder` and writes `folder/manifest.json`; files, manifest and folder reach the disk."""
    paths = _files(folder)
    with ThreadPoolExecutor(max_workers=4) as pool:
        digests = list(pool.map(lambda path: _digest(path, sync=True), paths))
    files = {
        path.relative_to(folder).as_posix(): {"size": size, "sha256": digest}
        for path, (size, digest) in zip(paths, digests, strict=True)
    }
    write_text(folder / NAME, json.dumps({"files": files, "sha256": _own_digest(files)}, indent=1) + "\n")


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, naming the file; None when every byte is as it was written."""
    path = folder / NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"]
        if manifest["sha256"] != _own_digest(files):
            return f"{path} does not match its own checksum"
    except FileNotFoundError:
        return f"{path} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} cannot be read ({type(error).__name__})"

    def check(item: tuple[str, dict]) -> str | None:
        name, expected = item
        try:
            size, digest = _digest(folder / name)
        except FileNotFoundError:
            return f"{folder / name} is missing"
        except OSError as error:
            return f"{folder / name} cannot be read ({error.strerror})"
        if size != expected["size"]:
            return f"{folder / name} has {size} bytes instead of {expected['size']}"
        if digest != expected["sha256"]:
            return f"{folder / name} does not match its SHA-256 checksum"
        return None

    with ThreadPoolExecutor(max_workers=4) as pool:
        return next((damage for damage in pool.map(check, sorted(files.items())) if damage), None)


def write_text(path: Path, text: str) -> None:
    """Writes a small file so that after a power cut it holds its old content or all of the new."""
    with whole_file(path) as part:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Forces a folder's own entries (names, renames) to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)


def _digest(path: Path, sync: bool = False) -> tuple[int, str]:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return size, digest.hexdigest()


def _own_digest(files: dict) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
