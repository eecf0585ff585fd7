"""Published weights to a workdir:

    python -m jax_densevit.convert --source NAME --weights FILE --config FILE --workdir DIR

The workdir is one that `evaluate`, `predict`, `export` and fine-tuning (`--config.init.workdir=DIR`) take. The config
says what the weights are of; its data need not be on this machine. Everything must fit, or nothing is written: what may
stay behind is named, for example the head when the classes are others:

    --leave_out='^decode_head/classifier'     regular expressions over our paths and the file's names

Files: .npz, .safetensors, PyTorch's .pth, .pt and .bin, TensorFlow 2's .index, Orbax's folders.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jax_densevit.configuration import read_config, split_overrides
from jax_densevit.console import run_command
from jax_densevit.errors import UserError
from jax_densevit.layers.embedding import POSITION_RULES
from jax_densevit.pretrained import SOURCES
from jax_densevit.published import check_empty, open_weights, save


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("jax_densevit.convert", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--source", required=True, metavar="NAME", help=f"one of {', '.join(SOURCES)}")
    parser.add_argument("--weights", required=True, help="the file, or folder of Orbax")
    parser.add_argument("--config", required=True, help="file.py or file.py:words; --config.a.b=value overrides")
    parser.add_argument("--workdir", required=True, help="a new folder")
    parser.add_argument("--leave_out", action="append", default=[], metavar="PATTERN", help="see above; repeatable")
    parser.add_argument("--pos_rule", choices=POSITION_RULES, help="how position tables are resized, if not as theirs")
    for name, what in (("mean", "normalisation of images in [0, 1]: 0.5, or one number per channel"), ("std", "same")):
        parser.add_argument(f"--{name}", type=_numbers, default=(), help=f"{what}; by default that of the source")
    overrides, rest = split_overrides(list(argv))
    arguments = parser.parse_args(rest)
    check_empty(arguments.workdir)
    workdir, weights = Path(arguments.workdir), Path(arguments.weights)
    if weights.is_dir() and workdir.resolve().is_relative_to(weights.resolve()):
        raise UserError(f"The workdir {workdir} lies in the weights {weights}: choose a folder outside them.")
    config = read_config(arguments.config, overrides)
    print(f"Reading {arguments.weights}", flush=True)
    found = open_weights(
        arguments.weights,
        arguments.source,
        config,
        leave_out=arguments.leave_out,
        pos_rule=arguments.pos_rule,
        mean=arguments.mean,
        std=arguments.std,
    )
    print(f"{arguments.source}: {found.report}.", flush=True)
    save(found, arguments.workdir)
    print(f"Images are normalised by mean {found.info.mean} and std {found.info.std}.")
    print(f"Wrote {arguments.workdir}")
    return 0


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def run() -> None:
    """The console entry point."""
    run_command(main)


if __name__ == "__main__":
    run()
