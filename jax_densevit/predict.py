"""Predicts images: `python -m jax_densevit.predict --workdir DIR --input FILE_OR_FOLDER --output FOLDER`.

For every image, at its own size and under its own name: the label map as PNG, a colour overlay with a legend, and JSON.
Sub-folders are kept. Options of the task's decoding are given as flags:

    --mode slide --crop 512 --scales 0.75,1.0 --flip

Exit codes: 0 all images predicted, 2 some were unreadable (each is named), 1 nothing could be done.
"""

import argparse
import collections
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from jax_densevit.console import progress_bar, run_command, split_options
from jax_densevit.data.files import IMAGE_SUFFIXES
from jax_densevit.data.images import read_image, stretch_contrast
from jax_densevit.errors import UserError
from jax_densevit.experiment import load
from jax_densevit.tasks.rooms import cut, give_room
from jax_densevit.tasks.task import Task
from jax_densevit.training.evaluation import EXACT_SIZES

SOME_SKIPPED = 2


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("jax_densevit.predict", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--workdir", required=True, help="the folder that training wrote")
    parser.add_argument("--input", required=True, type=Path, help="an image, or a folder with images and sub-folders")
    parser.add_argument("--output", required=True, type=Path, help="a folder; it is made where it is missing")
    parser.add_argument("--step", type=int, help="which checkpoint; by default the best, or the latest without a score")
    parser.add_argument("--which", choices=("best", "ema", "params"), default="best", help="which weights of it")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are already there")
    arguments, rest = parser.parse_known_args(argv)
    loaded = load(arguments.workdir, step=arguments.step, which=arguments.which, decode=split_options(rest))
    images = find_images(arguments.input)
    stems = name_outputs(images, loaded.task.file_names)
    files = [stem.with_name(file) for stem in stems.values() for file in loaded.task.file_names(stem.name)]
    check_outputs(images, files, arguments.input, arguments.output, arguments.overwrite)
    facts = {"workdir": str(Path(arguments.workdir).resolve()), "step": loaded.step, **loaded.task.protocol()}
    stretch = loaded.info.stretch
    facts |= {"stretch": stretch} if stretch else {}
    skipped = predict(loaded.task, loaded.forward, images, stems, arguments.output, facts, stretch)
    print(f"{len(images) - len(skipped)} of {len(images)} images predicted, in {arguments.output}")
    return SOME_SKIPPED if skipped else 0


def find_images(given: Path) -> dict[Path, Path]:
    """{path relative to the input: path} of the images to predict, sorted.

    A file is taken whatever its name; of a folder, everything below it that has an image's suffix and is not hidden.
    """
    if given.is_dir():
        paths = sorted(path for path in given.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir())
        found = {path.relative_to(given): path for path in paths}
        found = {name: path for name, path in found.items() if not any(part.startswith(".") for part in name.parts)}
        if not found:
            raise UserError(f"{given} holds no image (suffixes: {', '.join(sorted(IMAGE_SUFFIXES))}).")
        return found
    if not given.exists():
        raise UserError(f"There is no file or folder {given}: check --input.")
    return {Path(given.name): given}


def name_outputs(images: dict[Path, Path], file_names: Callable[[str], Sequence[str]]) -> dict[Path, Path]:
    """{image: its relative path in the output, without suffix}; the suffix is kept where files would meet.

    `a.png` becomes `a.*`, but next to `a.jpg` both keep their suffix: `a.png.*` and `a.jpg.*`. `file_names` says which
    files are made for an image named so.
    """
    stems = {name: name.with_suffix("") for name in images}
    owners = collections.defaultdict(set)
    for name, stem in stems.items():
        for file in file_names(stem.name):
            owners[str(stem.with_name(file)).casefold()].add(name)
    meeting = {name for names in owners.values() if len(names) > 1 for name in names}
    return {name: name if name in meeting else stem for name, stem in stems.items()}


def check_outputs(images: dict[Path, Path], files: Sequence[Path], given: Path, output: Path, overwrite: bool) -> None:
    """Raises :class:`UserError` where writing `files`, relative to `output` or absolute, would feed on itself or
    destroy something.
    """
    where, inside = output.resolve(), given.resolve()
    if given.is_dir() and (where == inside or inside in where.parents):
        raise UserError(f"The output {output} lies in the input {given}: choose a folder outside it.")
    if output.exists() and not output.is_dir():
        raise UserError(f"The output {output} is a file; name a folder.")
    files = [where / file for file in files]
    for overwritten in {path.resolve() for path in images.values()} & set(files):
        raise UserError(f"The prediction would overwrite the image {overwritten}; choose another --output.")
    check_existing(files, overwrite)


def check_existing(files: Sequence[Path], overwrite: bool) -> None:
    """Raises :class:`UserError` where a file is there already, unless it may be replaced."""
    existing = [file for file in files if file.exists()]
    if existing and not overwrite:
        raise UserError(
            f"{existing[0]}{f' and {len(existing) - 1} more files are' if len(existing) > 1 else ' is'} already there; "
            "choose another --output, or say --overwrite."
        )


def predict(
    task: Task,
    forward,
    images: dict[Path, Path],
    stems: dict[Path, Path],
    output: Path,
    facts: dict,
    stretch: tuple[float, ...] = (),
) -> list[Path]:
    """Predicts and writes every image; returns those that could not be read, each named on stderr.

    The model sees images stretched between the percentiles `stretch`, as in training; overlays show them as they are.

    Raises:
      UserError: no image could be read, or a file could not be written.
    """
    skipped, written = [], collections.deque()
    with progress_bar("predict") as progress, ThreadPoolExecutor(2) as writers:
        for done, (name, image) in enumerate(read_ahead(images, skipped), start=1):
            batch = {"image": stretch_contrast(image, stretch)[None]}
            batch = give_room(batch, {}) if len(images) > EXACT_SIZES else batch
            prediction = jax.device_get(task.decode(forward, batch, full=True))
            prediction = jax.tree.map(lambda array: array[0], prediction)
            prediction = cut(prediction, batch["image"].shape[1:3], image.shape[:2])
            stem, note = output / stems[name], {"image": name.as_posix(), **facts}
            written.append(writers.submit(task.write, image, prediction, stem.parent, stem.name, note))
            while len(written) > 4:
                written.popleft().result()
            progress(done + len(skipped), len(images))
        while written:
            written.popleft().result()
    return skipped


def read_ahead(images: dict[Path, Path], skipped: list[Path]) -> Iterator[tuple[Path, np.ndarray]]:
    """Names and pixels uint8 `[H, W, 3]` in order; a few are read while others are worked on.

    Those that cannot be read are named on stderr and added to `skipped`.

    Raises:
      UserError: no image could be read.
    """

    def pixels(name: Path, read: "Future[np.ndarray]") -> list[tuple[Path, np.ndarray]]:
        try:
            return [(name, read.result())]
        except UserError as error:
            print(f"skipped: {error}", file=sys.stderr)
            skipped.append(images[name])
            return []

    with ThreadPoolExecutor(2) as readers:
        waiting: collections.deque = collections.deque()
        for name, path in images.items():
            waiting.append((name, readers.submit(read_image, path)))
            if len(waiting) > 3:
                yield from pixels(*waiting.popleft())
        for ahead in waiting:
            yield from pixels(*ahead)
    if len(skipped) == len(images):
        raise UserError("No image could be read; each is named above.")


def run() -> None:
    """The console entry point."""
    run_command(main)


if __name__ == "__main__":
    run()
