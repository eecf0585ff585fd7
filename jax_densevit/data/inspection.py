"""Reads every example of a source and says what is in it and what is wrong with it."""

import collections
import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from jax_densevit.data.diagnosis import Value, count_values, describe, explain_unknown, looks_soft
from jax_densevit.data.folder_source import JPEG_ADVICE, FolderSource
from jax_densevit.data.label_maps import UNKNOWN
from jax_densevit.data.raw import RawSource
from jax_densevit.data.source import CROWD, DataInfo, Source
from jax_densevit.errors import UserError

SHOWN = 5  # files named per finding; the JSON has all


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something to know: an "error" stops or spoils training, a "warning" may be meant.

    Attributes:
      kind: a short word for machines, e.g. "size_mismatch".
      severity: "error" or "warning".
      message: what is wrong and the option that would fix it.
      files: the files concerned.
    """

    kind: str
    severity: str
    message: str
    files: tuple[str, ...] = ()


@dataclasses.dataclass
class Inspection:
    """What a source holds.

    Attributes:
      info: the source's facts.
      examples: how many it has. read: how many could be read.
      sizes: images per (height, width).
      values: pixels per value found in the masks (before they are mapped).
      labels: the label of each of these values (255 ignored, 254 unknown).
      class_pixels, class_files: per class, pixels and files that have it.
      ignored: ignored pixels.
      objects: instances per example, if the source has them.
      findings: what is wrong.
      digests: digest of every image's pixels -> its file, to find the same picture in two sets.
    """

    info: DataInfo
    examples: int = 0
    read: int = 0
    sizes: dict[tuple[int, int], int] = dataclasses.field(default_factory=collections.Counter)
    values: dict[Value, int] = dataclasses.field(default_factory=collections.Counter)
    labels: dict[Value, int] = dataclasses.field(default_factory=dict)
    class_pixels: list[int] = dataclasses.field(default_factory=list)
    class_files: list[int] = dataclasses.field(default_factory=list)
    ignored: int = 0
    objects: list[int] = dataclasses.field(default_factory=list)
    findings: list[Finding] = dataclasses.field(default_factory=list)
    digests: dict[bytes, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict:
        """A JSON-ready dict."""
        return {
            "name": self.info.name,
            "examples": self.examples,
            "read": self.read,
            "sizes": {f"{h}x{w}": n for (h, w), n in sorted(self.sizes.items())},
            "ids": {str(value): {"pixels": n, "label": self.labels[value]} for value, n in sorted(self.values.items())},
            "classes": [
                {"label": label, "name": name, "pixels": pixels, "files": files}
                for label, (name, pixels, files) in enumerate(
                    zip(self.info.classes, self.class_pixels, self.class_files, strict=True)
                )
            ],
            "ignored_pixels": self.ignored,
            "objects": {"mean": float(np.mean(self.objects)), "max": max(self.objects)} if self.objects else None,
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }


@dataclasses.dataclass
class _Seen:
    """What one example showed."""

    file: str
    error: str = ""
    mismatch: str = ""
    size: tuple[int, int] = (0, 0)
    counts: dict[Value, int] = dataclasses.field(default_factory=dict)
    objects: int | None = None
    digest: bytes = b""
    gray_rgb: bool = False
    jpeg: bool = False
    colors: dict[int, tuple[int, int, int]] = dataclasses.field(default_factory=dict)  # of a palette PNG's used ids


def inspect(
    source: Source,
    *,
    limit: int = 0,
    threads: int = 1,
    crop: tuple[int, int] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Inspection:
    """Reads every example (or the first `limit`) and reports; nothing that a file holds makes it stop.

    Args:
      source: best built inside :func:`~jax_densevit.data.raw.inspecting`, so that what is wrong with its files does
        not keep it from being built.
      crop: the training crop (height, width), to be held against the sizes; None for a set that is only evaluated.
      progress: called with the number of examples done.
    """
    result = Inspection(source.info, examples=len(source))
    count = len(result.info.classes)
    result.class_pixels, result.class_files = [0] * count, [0] * count
    problems = _Problems()
    for sentence in getattr(source, "problems", ()):
        problems.add("unpaired", sentence)
    total = min(limit, len(source)) if limit else len(source)
    label_of = source.label_map.label_of if isinstance(source, RawSource) else lambda value: value
    palettes: dict[int, tuple[tuple[int, int, int], str]] = {}
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for done, seen in enumerate(pool.map(lambda index: _look(source, index), range(total)), start=1):
            progress(done)
            if seen.error:
                problems.add("unreadable", seen.error)
                continue
            result.read += 1
            result.sizes[seen.size] += 1
            if seen.mismatch:
                problems.add("size_mismatch", seen.mismatch)
            if seen.digest in result.digests:
                problems.add("duplicate", f"{seen.file} is the same picture as {result.digests[seen.digest]}")
            result.digests.setdefault(seen.digest, seen.file)
            if seen.objects is not None:
                result.objects.append(seen.objects)
            present = set()
            for value, pixels in seen.counts.items():
                label = result.labels.setdefault(value, label_of(value))
                result.values[value] += pixels
                if label < count:
                    result.class_pixels[label] += pixels
                    present.add(label)
                elif label == UNKNOWN:
                    problems.add("unknown", seen.file)
                else:
                    result.ignored += pixels
            for label in present:
                result.class_files[label] += 1
            if seen.counts and not present:
                problems.add("all_ignored", seen.file)
            if seen.gray_rgb:
                problems.add("gray_rgb", seen.file)
            if seen.jpeg:
                problems.add("jpeg", seen.file)
            if looks_soft(seen.counts):
                problems.add("soft", seen.file)
            for index, color in seen.colors.items():
                first, file = palettes.setdefault(index, (color, seen.file))
                if first != color:
                    problems.add("palette", f"{index} is {first} in {file} but {color} in {seen.file}")
            if seen.colors:
                problems.add("indexed", seen.file)
    result.findings = _findings(result, problems, source, crop)
    return result


def overlap(train: Inspection, name: str, other: Inspection) -> Finding | None:
    """A warning when pictures of the training set are also in the evaluation set `name`."""
    shared = [file for digest, file in other.digests.items() if digest in train.digests]
    if not shared:
        return None
    return Finding(
        "leak",
        "warning",
        f"{len(shared)} of {other.read} pictures of {name} are also in the training set, so its scores say little; "
        "split the files so that they are apart.",
        tuple(shared),
    )


class _Problems(collections.defaultdict):
    """Sentences or files by kind, in the order found, each once."""

    def __init__(self):
        super().__init__(dict)

    def add(self, kind: str, text: str) -> None:
        self[kind][text] = None


def _look(source: Source, index: int) -> _Seen:
    """Reads one example; a UserError becomes part of the answer."""
    if not isinstance(source, RawSource):
        try:
            example = source.read(index)
        except UserError as error:
            return _Seen("", error=str(error))
        seen = _Seen(example["id"], size=example["image"].shape[:2], digest=_digest(example["image"]))
        labels, instances = example.get("labels"), example.get("instances")
    else:
        try:
            raw = source.raw(index)
        except UserError as error:
            return _Seen(source.name_of(index), error=str(error))
        seen = _Seen(raw.labels_name, size=raw.image.shape[:2], digest=_digest(raw.image))
        seen.mismatch = raw.size_mismatch()
        labels, instances = source.label_map.values(raw.labels), raw.instances
        if instances is not None:
            instances = source.object_numbers(instances)
        seen.gray_rgb = raw.labels.ndim == 3 and labels.ndim == 2
        if isinstance(source, FolderSource):
            _look_at_format(seen, source.pairs[index].labels, labels)
    if labels is not None:
        seen.counts = count_values(labels)
    if instances is not None:
        numbers = np.unique(instances)
        seen.objects = int(np.count_nonzero((numbers > 0) & (numbers < CROWD)))
    return seen


def _look_at_format(seen: _Seen, path, labels: np.ndarray) -> None:
    """Adds what the file's kind tells: JPEG, or a palette and the colors of the indices in use."""
    # The file has just been read, so only its vanishing in between could fail here.
    with contextlib.suppress(OSError), Image.open(path) as image:
        seen.jpeg = image.format in ("JPEG", "MPO")
        if image.mode == "P":
            colors = np.array(image.getpalette("RGB"), np.int64).reshape(-1, 3)
            used = [int(i) for i in np.unique(labels) if i < len(colors)]
            seen.colors = {i: tuple(colors[i].tolist()) for i in used}


def _digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16, key=str(image.shape).encode()).digest()


def _findings(result: Inspection, problems: _Problems, source: Source, crop) -> list[Finding]:
    """The findings, errors first."""
    errors, warnings = [], []

    def error(kind: str, message: str, files: Iterable[str] = ()):
        errors.append(Finding(kind, "error", message, tuple(files)))

    def warn(kind: str, message: str, files: Iterable[str] = ()):
        warnings.append(Finding(kind, "warning", message, tuple(files)))

    if not result.examples:
        error("empty", "There is no example; look at the folders and lists that the source names.")
    label_map = source.label_map if isinstance(source, RawSource) else None
    if bad := problems["unpaired"]:
        error(
            "unpaired",
            f"{_count(bad, 'file')} without a partner: add or rename, state image_suffix and label_suffix, or set "
            "unpaired='skip' where the source has that option.",
            bad,
        )
    if bad := problems["unreadable"]:
        error("unreadable", f"{_count(bad, 'unreadable file')}: replace them, or train with data.on_bad='skip'.", bad)
    if bad := problems["size_mismatch"]:
        error("size_mismatch", f"{_count(bad, 'mask')} of another size than the image.", bad)
    jpeg = problems["jpeg"] if label_map is not None and not label_map.threshold else {}
    if jpeg:
        error("jpeg_masks", f"{_count(jpeg, 'mask')} in JPEG, {JPEG_ADVICE}", jpeg)
    # What compression did to the values is no finding of its own.
    if (bad := problems["unknown"]) and not jpeg:
        unknown = {value: n for value, n in result.values.items() if result.labels[value] == UNKNOWN}
        advice = explain_unknown(result.values, unknown, len(result.info.classes))
        error(
            "unknown_ids",
            f"{describe(unknown, sum(result.values.values()))} in {_count(bad, 'mask')} belong to no class; {advice}",
            bad,
        )
    soft = problems["soft"]
    if soft and not jpeg and label_map is not None and label_map.threshold in (0, 1):
        error(
            "soft_masks",
            f"{_count(soft, 'mask')} with soft edges (anti-aliased or resized with interpolation): for two classes set "
            "threshold=128, otherwise save hard-edged masks.",
            soft,
        )
    if bad := problems["palette"]:
        error(
            "palettes_differ",
            "palette masks are read as indices, but their palettes differ, so an index means different things: save "
            "the masks as RGB and give palette=, or with one common palette.",
            bad,
        )
    if label_map is not None and not jpeg and (sentence := label_map.suspicious(result.values)):
        error("binary_masks", sentence)
    if crop is not None and tuple(crop) == (0, 0) and len(result.sizes) > 1:
        error("sizes", f"images have {len(result.sizes)} sizes, but data.crop=(0, 0) takes them whole: set data.crop.")
    never = [name for name, files in zip(result.info.classes, result.class_files, strict=True) if not files]
    if never and result.values:
        shown = ", ".join(never[:12]) + (f" and {len(never) - 12} more" if len(never) > 12 else "")
        warn("never_seen", f"no pixel of {_count(never, 'class', 'classes')}: {shown}.")
    if bad := problems["all_ignored"]:
        warn("all_ignored", f"nothing to learn from {_count(bad, 'mask')}: all pixels are ignored.", bad)
    if bad := problems["duplicate"]:
        warn("duplicate", f"{_count(bad, 'picture')} twice in the set.", bad)
    if bad := getattr(source, "left_out", {}):
        verb = "is" if len(bad) == 1 else "are"
        warn(
            "gray",
            f"{_count(bad, 'gray photo')} {verb} left out: nothing to learn colors from.",
            map(str, bad.values()),
        )
    if bad := problems["gray_rgb"]:
        warn("gray_rgb", f"{_count(bad, 'mask')} saved as RGB with equal channels; one channel is read as ids.", bad)
    indexed = problems["indexed"]
    if indexed and label_map is not None and label_map.palette and not problems["palette"]:
        wrong = {i: c for i, c in _used_colors(source, indexed).items() if i < len(label_map.palette)}
        wrong = {i: c for i, c in wrong.items() if c != label_map.palette[i]}
        if wrong:
            index, color = next(iter(wrong.items()))
            warn(
                "palette_order",
                f"masks are palette PNG and read as indices, but index {index} is colored {color} while palette= has "
                f"{label_map.palette[index]} there; if the colors are right, save the masks as RGB.",
            )
    return errors + warnings


def _used_colors(source: FolderSource, files: Iterable[str]) -> dict[int, tuple[int, int, int]]:
    """The colors of the palette of the first of the files."""
    with Image.open(next(iter(files))) as image:
        colors = np.array(image.getpalette("RGB")).reshape(-1, 3)
        used = np.unique(np.asarray(image))
    return {int(i): tuple(colors[i].tolist()) for i in used if i < len(colors)}


def _count(items, one: str, many: str = "") -> str:
    return f"{len(items)} {one if len(items) == 1 else many or one + 's'}"
