"""Colors photographs with ColTran:

    python -m jax_densevit.colorize --colorizer DIR --color_upsampler DIR --spatial_upsampler DIR \\
        --input FILE_OR_FOLDER --output FOLDER --num_samples 3

The workdirs are those of training or of imported weights. Upsamplers may be left out, from the end: colors are coarser
then. For every photo, gray or in color (made gray first), there are as many colored ones as asked for, as PNG at its
own size and under its own name, and a JSON that says how they were made. Sub-folders are kept. A photo keeps its
lightness to the pixel; what the models give is color.

The colors of a photo depend on the seed, its file name and the number of the sample, not on the photos beside it.
Exit codes: 0 all photos colored, 2 some were unreadable (each is named), 1 nothing could be done.
"""

import argparse
import collections
import dataclasses
import itertools
import unicodedata
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jax_densevit.console import progress_bar, run_command
from jax_densevit.data.gray import is_gray
from jax_densevit.errors import UserError
from jax_densevit.experiment import load
from jax_densevit.metrics.image import colorfulness
from jax_densevit.models.coltran.sampling import METHODS, STATISTICS, SYMBOLS, picture_keys
from jax_densevit.predict import SOME_SKIPPED, check_outputs, find_images, name_outputs, read_ahead
from jax_densevit.tasks import color_pictures, pictures
from jax_densevit.tasks.coltran_pipeline import Pipeline, Stage, paint
from jax_densevit.writing import write_json, write_picture

STAGES = ("colorizer", "color_upsampler", "spatial_upsampler")
SHEET = 24  # photos on a sheet: more are too long to look at


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code."""
    arguments = _parser().parse_args(argv)
    if min(arguments.num_samples, arguments.batch_size) < 1 or arguments.seed < 0:
        raise UserError("--num_samples and --batch_size must be at least 1, --seed at least 0.")
    if arguments.sheet and arguments.sheet.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"--sheet={arguments.sheet} must be the name of a PNG or JPEG file.")
    stages, told = {}, {}
    for name in STAGES:
        if workdir := getattr(arguments, name):
            stages[name], told[name] = _stage(name, workdir)
    pipeline = Pipeline(
        *(stages.get(name) for name in STAGES),
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        statistics=arguments.statistics,
        method=arguments.method,
    )
    job = Job(
        pipeline,
        arguments.output,
        seed=arguments.seed,
        samples=arguments.num_samples if arguments.temperature > 0 else 1,  # without chance all are the same
        crop=arguments.crop,
        raw=arguments.raw,
        facts={
            **{name: getattr(arguments, name) for name in ("seed", "temperature", "top_k", "method", "statistics")},
            "seen": "the middle" if arguments.crop else "all of it, squeezed to the proportions of the models",
            "lightness": "CIELAB, of the input",
            "chroma": f"of the {[*stages][-1]}, {pipeline.size[0]} x {pipeline.size[1]} pixels",
            "stages": told,
        },
    )
    images = find_images(arguments.input)
    stems = name_outputs(images, job.file_names)
    files = [stem.with_name(file) for stem in stems.values() for file in job.file_names(stem.name)]
    files += [arguments.sheet.resolve()] if arguments.sheet else []
    check_outputs(images, files, arguments.input, arguments.output, arguments.overwrite)
    skipped, colored = job.run(images, stems, arguments.batch_size, SHEET if arguments.sheet else 0)
    if arguments.sheet:
        columns = ["gray", *(f"sample {i + 1}" for i in range(job.samples))]
        columns += [] if all(photo.gray for photo in colored) else ["truth"]
        write_picture(arguments.sheet, pictures.page(columns, [photo.line for photo in colored if photo.line]))
    grays = sum(photo.gray for photo in colored)
    print(
        f"{len(colored)} of {len(images)} photos colored ({grays} gray ones, {len(colored) - grays} in color made gray "
        f"first), in {arguments.output}"
    )
    return SOME_SKIPPED if skipped else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("jax_densevit.colorize", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--colorizer", required=True, metavar="DIR", help="workdir of the first stage")
    add("--color_upsampler", metavar="DIR", help="workdir of the second stage")
    add("--spatial_upsampler", metavar="DIR", help="workdir of the third stage")
    add("--input", required=True, type=Path, help="a photo, or a folder with photos and sub-folders")
    add("--output", required=True, type=Path, help="a folder; it is made where it is missing")
    add("--num_samples", type=int, default=3, help="colored pictures of each photo")
    add("--seed", type=int, default=0, help="another seed, other colors")
    add("--temperature", type=float, default=1.0, help="below 1 likelier colors, often paler; 0 the likeliest alone")
    add("--top_k", type=int, default=SYMBOLS, help="of so many likeliest colors one is drawn")
    add("--method", choices=METHODS[:-1], default="cached", help='"jacobi": the same in fewer, larger steps')
    add("--statistics", choices=STATISTICS, default="exact", help='"official": as published pictures were sampled')
    add("--crop", action="store_true", help="only the middle, in the models' proportions, as they were trained")
    add("--raw", action="store_true", help="write the last stage's own small pictures too")
    add("--sheet", type=Path, metavar="FILE", help=f"a picture of the first {SHEET} photos, samples side by side")
    add("--batch_size", type=int, default=4, help="photos whose samples are drawn together")
    add("--overwrite", action="store_true", help="replace files that are already there")
    return parser


def _stage(name: str, workdir: str) -> tuple[Stage, dict[str, Any]]:
    """A stage from its workdir, and what is told about it."""
    loaded = load(workdir)
    found, expected = loaded.config.task.name, f"coltran_{name}"
    if found != expected:
        raise UserError(f"{workdir} holds a model for the task {found!r}, but --{name} needs one for {expected!r}.")
    # On a CPU half precision is not faster but slower.
    model = loaded.model.clone(dtype=jnp.float32) if jax.default_backend() == "cpu" else loaded.model
    told = {"workdir": str(Path(workdir).resolve()), "step": loaded.step}
    return Stage(loaded.task, model, loaded.variables["params"]), told


@dataclasses.dataclass(frozen=True)
class Colored:
    """What is remembered of a photo: whether it was gray, and its row of the sheet, if it has one."""

    gray: bool
    line: tuple[list[Image.Image], str] | None


@dataclasses.dataclass(frozen=True)
class Job:
    """How photos are colored and written.

    Attributes:
      pipeline: the stages.
      output: folder.
      seed: of all noise; samples: pictures of each photo.
      crop: only the middle of each photo; raw: the last stage's own pictures too.
      facts: what every JSON says.
    """

    pipeline: Pipeline
    output: Path
    seed: int
    samples: int
    crop: bool
    raw: bool
    facts: dict[str, Any]

    def file_names(self, stem: str) -> tuple[str, ...]:
        """The files of one photo: samples, JSON, the models' own pictures; a single sample has no number."""
        numbered = [stem] if self.samples == 1 else [f"{stem}_{i + 1}" for i in range(self.samples)]
        raw = [f"{name}_raw.png" for name in numbered] if self.raw else []
        return *(f"{name}.png" for name in numbered), f"{stem}.json", *raw

    def run(
        self, images: dict[Path, Path], stems: dict[Path, Path], batch_size: int, sheet: int
    ) -> tuple[list[Path], list[Colored]]:
        """Colors all photos; returns those that could not be read, each named on stderr, and facts about the others.

        Raises:
          UserError: no photo could be read, or a file could not be written.
        """
        size = -(-len(images) // -(-len(images) // batch_size))  # batches of about one size: one is compiled
        skipped: list[Path] = []
        writing: collections.deque[Future[Colored]] = collections.deque()
        colored: list[Colored] = []
        photos = read_ahead(images, skipped)
        with progress_bar("colorize") as progress, ThreadPoolExecutor(2) as writers:
            progress(0, len(images) * self.samples)
            done = 0
            while batch := list(itertools.islice(photos, size)):
                batch = [(name, self.pipeline.middle(image) if self.crop else image) for name, image in batch]
                looks = [self.pipeline.look(image) for _, image in batch]
                filled = [*range(len(batch)), *[len(batch) - 1] * (size - len(batch))]
                keys = picture_keys(self.seed, np.array([example_id(batch[i][0]) for i in filled]), self.samples)
                symbols, passes = self.pipeline.sample(np.stack([looks[i][0] for i in filled]), keys)
                for i, (name, image) in enumerate(batch):
                    finished = []
                    for sample in range(self.samples):
                        finished.append(self.pipeline.finish(symbols[i, sample], looks[i]))
                        done += 1
                        progress(done + len(skipped) * self.samples, len(images) * self.samples)
                    with_line = len(colored) + len(writing) < sheet
                    job = (name, stems[name], image, finished, passes[i], with_line)
                    writing.append(writers.submit(self.write, *job))
                    while len(writing) > 2:
                        colored.append(writing.popleft().result())
            colored += [job.result() for job in writing]
        return skipped, colored

    def write(
        self,
        name: Path,
        stem: Path,
        image: np.ndarray,
        finished: Sequence[np.ndarray],
        passes: np.ndarray,
        with_line: bool,
    ) -> Colored:
        """Paints and writes the samples of one photo, then its JSON.

        Args:
          name, stem: of the photo, and of its files, relative to input and output.
          image: uint8 `[H, W, 3]`; finished: the last stage's pictures; passes: of their rows.
          with_line: whether there is a row for the sheet.
        """
        files, folder = self.file_names(stem.name), self.output / stem.parent
        gray, facts, painted = is_gray(image), [], {}
        for i, picture in enumerate(finished):
            painted[f"sample {i + 1}"] = pixels = paint(image, picture)
            write_picture(folder / files[i], Image.fromarray(pixels))
            if self.raw:
                write_picture(folder / files[len(finished) + 1 + i], Image.fromarray(picture))
            steps = {"passes_per_row": float(passes[i].mean())}
            facts.append({"file": files[i], "colorfulness": colorfulness(pixels), **steps})
        size = {"height": image.shape[0], "width": image.shape[1]}
        told = {"image": name.as_posix(), "input": "gray" if gray else "color, made gray first", **size}
        write_json(folder / f"{stem.name}.json", {**told, **self.facts, "samples": facts})
        if not with_line:
            return Colored(gray, None)
        row = {"name": name.as_posix(), "gray": paint(image, np.zeros_like(finished[0]))[..., 0], **painted}
        return Colored(gray, color_pictures.line(row if gray else {**row, "truth": image}))


def example_id(name: Path) -> int:
    """A photo's number for its noise: from its file's name, without folders, so that it keeps its colors elsewhere."""
    return zlib.crc32(unicodedata.normalize("NFC", name.name).encode())


def run() -> None:
    """The console entry point."""
    run_command(main)


if __name__ == "__main__":
    run()
