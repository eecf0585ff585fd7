"""Files in folders: which are images, and which image belongs to which mask."""

import dataclasses
import os
import unicodedata
from pathlib import Path

from jax_densevit.errors import UserError

# Suffixes that count as images when a folder is listed (in any case); what a file really is, Pillow decides on reading.
IMAGE_SUFFIXES = frozenset(".png .jpg .jpeg .jpe .bmp .gif .tif .tiff .webp .ppm .pgm .pnm .tga .jp2 .avif".split())


@dataclasses.dataclass(frozen=True)
class Pair:
    """One example on disk: its name in the set, its image, and its mask or masks."""

    id: str
    image: Path
    labels: Path | None = None
    instances: Path | None = None


def list_images(folder: str | os.PathLike, suffix: str = "") -> dict[str, Path]:
    """The image files below `folder` by name, sorted.

    Args:
      folder: searched with its subfolders; hidden files and folders (".DS_Store", "._x.png") are passed over.
      suffix: the end of the file names that count, e.g. "_leftImg8bit.png" (compared without regard to case); empty
        takes every known image suffix.

    Returns:
      {relative path without the suffix, "/" between folders, Unicode NFC: path}.

    Raises:
      UserError: no such folder, or two files of one name ("a.png" and "a.jpg").
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}{_nearby(folder)}")
    found: dict[str, Path] = {}
    visited = set()
    for where, subfolders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in visited:  # a link back up: every file would come again under another name
            subfolders.clear()
            continue
        visited.add(real)
        # A folder named like an image is listed, so that whoever reads it hears about it.
        named = [name for name in subfolders if _stem(name, suffix) is not None]
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name not in named)
        for name in sorted([*files, *named]):
            stem = None if name.startswith(".") else _stem(name, suffix)
            if stem is None:
                continue
            relative = os.path.relpath(os.path.join(where, stem), folder).replace(os.sep, "/")
            key = unicodedata.normalize("NFC", relative)
            path = Path(where, name)
            if key in found:
                raise UserError(
                    f"{found[key]} and {path} have the same name, so it is unclear which one is meant; remove one, or "
                    "say which suffix counts."
                )
            found[key] = path
    return dict(sorted(found.items()))


@dataclasses.dataclass(frozen=True)
class Pairing:
    """What was found: the pairs, and one sentence for every image without a mask, mask without an image, bad line."""

    pairs: tuple[Pair, ...]
    problems: tuple[str, ...] = ()


def pair_by_name(images: dict[str, Path], labels: dict[str, Path]) -> Pairing:
    """Pairs images and masks of the same name (the keys, as :func:`list_images` gives them)."""
    problems = []
    for have, other, what, missing in ((images, labels, "image", "mask"), (labels, images, "mask", "image")):
        lowered = {key.lower(): path for key, path in other.items()}
        for key in have.keys() - other.keys():
            twin = lowered.get(key.lower())
            hint = f" ({twin} differs in upper and lower case)" if twin else ""
            problems.append(f"the {what} {have[key]} has no {missing} of the same name{hint}")
    pairs = tuple(Pair(key, path, labels[key]) for key, path in images.items() if key in labels)
    return Pairing(pairs, tuple(sorted(problems)))


def with_instances(pairing: Pairing, images: dict[str, Path], instances: dict[str, Path]) -> Pairing:
    """A pairing of `images` whose pairs get the files of object numbers of the same name too."""
    pairs = tuple(
        dataclasses.replace(pair, instances=instances[pair.id]) for pair in pairing.pairs if pair.id in instances
    )
    return Pairing(pairs, tuple(dict.fromkeys((*pairing.problems, *pair_by_name(images, instances).problems))))


def pair_by_list(path: str | os.PathLike, images: dict[str, Path], labels: dict[str, Path]) -> Pairing:
    """Pairs what a list file names: per line one name that an image and a mask share, or an image and a mask.

    In the second form the two are separated by a tab, a comma or white space, and given as paths relative to the list,
    as absolute paths, or as paths whose ending names exactly one of the `images` and one of the `labels`.
    """
    pairs, problems, seen = [], [], {}
    by_name: tuple[dict, dict] = ({}, {})
    for files, named in zip((images, labels), by_name, strict=True):
        for file in files.values():
            parts = Path(unicodedata.normalize("NFC", str(file))).parts
            named.setdefault(parts[-1], []).append((parts, file))
    for number, line in read_list(path):
        where = f"{path}, line {number}"
        if line in images or line in labels:
            pair = Pair(line, images.get(line), labels.get(line))
            if pair.image is None or pair.labels is None:
                problems.append(f"{where}: {line!r} has no {'image' if pair.image is None else 'mask'}")
                continue
        else:
            fields = next((line.split(mark) for mark in "\t," if line.count(mark) == 1), line.split())
            if len(fields) != 2:
                what = "neither an image nor a mask" if len(fields) == 1 else "neither one name nor two files"
                problems.append(f"{where}: {line!r} is {what}")
                continue
            beside = Path(path).parent
            found = [_named(field.strip(), beside, named) for field, named in zip(fields, by_name, strict=True)]
            if None in found:
                what = ("image", "mask")[found.index(None)]
                problems.append(f"{where}: the {what} {fields[found.index(None)].strip()!r} is not there")
                continue
            pair = Pair(os.path.splitext(fields[0].strip())[0].lstrip("./"), *found)
        if pair.id in seen:
            problems.append(f"{where}: {pair.id!r} is also in line {seen[pair.id]}")
            continue
        seen[pair.id] = number
        pairs.append(pair)
    return Pairing(tuple(pairs), tuple(problems))


def _named(text: str, beside: Path, among: dict[str, list[tuple[tuple[str, ...], Path]]]) -> Path | None:
    """The file that a field of a list means (see :func:`pair_by_list`); `among`: (parts, path) by last part."""
    for path in (beside / text, Path(text)):
        if path.is_file():
            return path
    # Lists often carry the folders of the machine they were written on: the longest ending that fits decides.
    parts = Path(text).parts
    candidates = among.get(parts[-1], [])
    for start in range(len(parts)):
        fitting = [path for own, path in candidates if own[start - len(parts) :] == parts[start:]]
        if fitting:
            return fitting[0] if len(fitting) == 1 else None
    return None


def read_list(path: str | os.PathLike) -> list[tuple[int, str]]:
    """The lines of a list file as (line number, text); empty lines and lines that begin with "#" are passed over."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file in UTF-8; save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"The list {path} cannot be read: {error.strerror}{_nearby(Path(path))}") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1)]
    lines = [
        (number, unicodedata.normalize("NFC", line)) for number, line in lines if line and not line.startswith("#")
    ]
    if not lines:
        raise UserError(f"The list {path} is empty; write one name per line.")
    return lines


def _stem(name: str, suffix: str) -> str | None:
    """`name` without its image suffix, or None where it has none."""
    if suffix:
        return name[: -len(suffix)] if name.lower().endswith(suffix.lower()) and len(name) > len(suffix) else None
    stem, dot = os.path.splitext(name)
    return stem if dot.lower() in IMAGE_SUFFIXES else None


def _nearby(path: Path) -> str:
    """The end of a sentence: what the parent folder has, or the part of the path that exists."""
    parent = path.parent
    if parent.is_dir():
        names = sorted(entry.name for entry in os.scandir(parent) if not entry.name.startswith("."))
        shown = ", ".join([*names[:8], "..."] if len(names) > 8 else names)
        return f"; {parent} has {shown or 'nothing in it'}."
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    return f"; of this path only {parent} exists."
