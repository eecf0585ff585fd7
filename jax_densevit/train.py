"""Trains a model from a config: `python -m jax_densevit.train --config=configs/quickstart.py --workdir=DIR`.

The same command again goes on where the run stopped. Fields of the config are overridden by flags:

    --config=configs/own_folder.py:setr         an argument for the config file, after a colon
    --config.optimizer.learning_rate=3e-4       any field, by its path

Several processes (one per host) run the same command and share the workdir; either `--distributed`, where the cluster
says who is who (TPU slices, SLURM, Open MPI), or `--coordinator HOST:PORT --num_processes N --process_id I` on each.

Exit codes: 0 training is done; 75 stopped by SIGTERM or Ctrl-C with the state saved, run the same command again; 1 an
error, said in one sentence.
"""

import argparse
from collections.abc import Sequence

import jax

from jax_densevit.configuration import read_config, split_overrides
from jax_densevit.console import run_command
from jax_densevit.errors import UserError
from jax_densevit.experiment import build
from jax_densevit.hosts import add_flags, together
from jax_densevit.planning import device_counts, dry_run, virtual_devices
from jax_densevit.training.allocator import keep_freed_memory, limit_arenas
from jax_densevit.training.stored import local_folder
from jax_densevit.training.trainer import train


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("jax_densevit.train", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", required=True, metavar="FILE[:ARGUMENT]", help="a Python file with get_config()")
    parser.add_argument("--workdir", help="where checkpoints, logs and evaluations go")
    parser.add_argument("--dry_run", action="store_true", help="print what would be trained, compile it, and leave")
    parser.add_argument(
        "--devices", metavar="N[,N...]", help="of --dry_run: plan for so many devices, none of them here"
    )
    parser.add_argument("--quiet", action="store_true", help="no lines and no progress bar")
    parser.add_argument("--strict", action="store_true", help="stop at a damaged checkpoint, do not use the one before")
    parser.add_argument("--compile_cache", metavar="DIR", help="keep compiled programs here: a restart starts sooner")
    parser.add_argument(
        "--keep_memory", action="store_true", help="on CPUs: faster steps, up to three times the memory"
    )
    add_flags(parser)
    overrides, rest = split_overrides(list(argv))
    arguments = parser.parse_args(rest)
    if arguments.workdir is None and not arguments.dry_run:
        raise UserError("--workdir is missing: name the folder where checkpoints, logs and evaluations shall go.")
    if arguments.devices and not arguments.dry_run:
        raise UserError("--devices belongs to --dry_run: a training takes the devices that are there.")
    counts = device_counts(arguments.devices)
    if counts and (code := virtual_devices(max(counts), argv)) is not None:
        return code
    if arguments.compile_cache:
        jax.config.update("jax_compilation_cache_dir", str(local_folder(arguments.compile_cache)))
    limit_arenas()
    if arguments.keep_memory and not keep_freed_memory():
        raise UserError(
            "--keep_memory is for JAX on CPUs alone, on Linux with glibc (JAX_PLATFORMS=cpu says so to JAX)."
        )
    config = read_config(arguments.config, overrides)
    if counts:
        dry_run(config, counts)
        return 0
    with together(arguments):
        return _run(config, arguments)


def _run(config, arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        dry_run(config)
        return 0
    return train(build(config), arguments.workdir, quiet=arguments.quiet, strict=arguments.strict)


def run() -> None:
    """The console entry point."""
    run_command(main)


if __name__ == "__main__":
    run()
