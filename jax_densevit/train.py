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
import os
import sys
import traceback
from collections.abc import Sequence

import jax

from jax_densevit.configuration import read_config, split_overrides
from jax_densevit.console import run_command
from jax_densevit.errors import UserError
from jax_densevit.experiment import build
from jax_densevit.planning import device_counts, dry_run, virtual_devices
from jax_densevit.training.checkpoint import local_folder
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
    parser.add_argument("--distributed", action="store_true", help="several processes, found out from the cluster")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="several processes: where process 0 listens")
    parser.add_argument("--num_processes", type=int, help="how many processes there are")
    parser.add_argument("--process_id", type=int, help="which of them this is, from 0")
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
    config = read_config(arguments.config, overrides)
    if counts:
        dry_run(config, counts)
        return 0
    if not _connect(arguments):
        return _run(config, arguments)
    try:
        return _run(config, arguments)
    except BaseException as error:
        # At a normal exit JAX would wait minutes for processes that wait for this one.
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _run(config, arguments: argparse.Namespace) -> int:
    if arguments.dry_run:
        dry_run(config)
        return 0
    return train(build(config), arguments.workdir, quiet=arguments.quiet, strict=arguments.strict)


def _connect(arguments: argparse.Namespace) -> bool:
    """Joins the other processes, if there are any; whether it did."""
    three = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    if not arguments.distributed and three == (None, None, None):
        return False
    if not arguments.distributed and None in three:
        raise UserError("--coordinator, --num_processes and --process_id belong together; give all three.")
    try:
        jax.distributed.initialize(*three, initialization_timeout=120)
    except (RuntimeError, ValueError) as error:
        cause = str(error).splitlines()[0]
        raise UserError(
            f"The processes did not find each other: {cause}. Were all of them started, with the same coordinator?"
        ) from error
    return True


def run() -> None:
    """The console entry point."""
    run_command(main)


if __name__ == "__main__":
    run()
