"""Prepares a data set once at a fixed size: memory-mapped arrays that train without decoding and without TensorFlow.

python -m jax_densevit.prepare --config=configs/own_folder.py --split=train --size=256x256 --output=prepared/train

Then name the folder in the config: `config.data.train = {"name": "arrays", "folder": "prepared/train"}`.
"""

import argparse
import re

from jax_densevit.configuration import read_config, split_overrides
from jax_densevit.console import progress_bar, run_command
from jax_densevit.data.pipeline import default_threads
from jax_densevit.data.sources import create_source
from jax_densevit.data.sources.arrays import FITS, write_arrays
from jax_densevit.errors import UserError, did_you_mean


def main(argv: list[str]) -> int:
    """Runs the command with its arguments (without the program's name); returns the exit code."""
    parser = argparse.ArgumentParser(prog="jax_densevit.prepare", description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="the config that names the data")
    parser.add_argument("--split", default="train", help="'train' for config.data.train, or the name of an evaluator")
    parser.add_argument("--size", default="", metavar="HxW", help="size of all examples; left out: as they are")
    parser.add_argument("--fit", choices=FITS, default="pad", help="fit the whole image in and pad, or cover and crop")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the folder to write; it must not exist")
    overrides, rest = split_overrides(argv)
    options = parser.parse_args(rest)
    size = None
    if options.size:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", options.size)
        if not match:
            raise UserError(f"--size={options.size} is not HEIGHTxWIDTH; write e.g. --size=256x256.")
        size = int(match[1]), int(match[2])
    config = read_config(options.config, overrides)
    if options.split != "train" and options.split not in config.eval:
        raise UserError(
            f"The config has no evaluator {options.split!r}{did_you_mean(options.split, ['train', *config.eval])}"
        )
    data = config.data.train if options.split == "train" else config.eval[options.split].data
    source = create_source(**data.to_dict())
    with progress_bar("preparing") as progress:
        folder = write_arrays(
            source,
            options.output,
            size,
            fit=options.fit,
            threads=config.data.threads or default_threads(),
            progress=lambda done: progress(done, len(source)),
        )
    print(
        f"{len(source)} examples are in {folder}: train on them with data.train = name 'arrays', folder {str(folder)!r}"
    )
    return 0


def run() -> None:
    """The console entry point."""
    run_command(main)


if __name__ == "__main__":
    run()
