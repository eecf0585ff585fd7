"""Commands that several processes run together, one per host: their flags, and how they find each other.

Every process runs the same command; either `--distributed`, where the cluster says who is who (TPU slices, SLURM, Open
MPI), or `--coordinator HOST:PORT --num_processes N --process_id I` on each.
"""

import argparse
import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator

import jax

from jax_densevit.errors import UserError

# What JAX says, among much else, when a process that it waits for is not there any more.
_LOST = re.compile(r"Connection (closed|reset) by peer|Gloo [\w-]+ failed|[Cc]oordination service|heartbeat")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that :func:`together` reads."""
    parser.add_argument("--distributed", action="store_true", help="several processes, found out from the cluster")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="several processes: where process 0 listens")
    parser.add_argument("--num_processes", type=int, help="how many processes there are")
    parser.add_argument("--process_id", type=int, help="which of them this is, from 0")


@contextlib.contextmanager
def together(arguments: argparse.Namespace) -> Iterator[None]:
    """Joins the other processes, if there are any, for what is done within.

    A process that has joined and meets an error leaves at once with exit code 1, its message printed: at a normal exit
    JAX would wait minutes for processes that wait for this one.

    Raises:
      UserError: flags that do not belong together; processes that do not find each other.
    """
    if not _connect(arguments):
        yield
        return
    try:
        yield
    except BaseException as error:
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
        elif isinstance(error, jax.errors.JaxRuntimeError) and (lost := _LOST.search(str(error))):
            print(f"error: Another process ended or cannot be reached ({lost[0]}): see its log.", file=sys.stderr)
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


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
