"""One entry for every place to train at; docs/launch.md goes through a whole life.

python -m launch create     ask for machines (shows the costs and asks)
python -m launch setup      bring code, packages and the bucket to them
python -m launch run        start training, detached; the same RUN_ID resumes
python -m launch babysit    all of this as needed, until training is done
python -m launch status     machines, training, newest checkpoint
python -m launch logs       what the processes printed
python -m launch ssh        a shell on the first machine
python -m launch stop       let the training save and end
python -m launch delete     give the machines back

Settings come from launch.env (see launch/env.example). Exit codes of babysit: 0 done, 75 stopped by hand with the state
saved, 1 a person must look.
"""

import argparse
import sys
from collections.abc import Sequence

from jax_densevit.errors import UserError
from launch.babysit import Babysitter, Bounds
from launch.backend import Backend, Machines
from launch.gce import Gce
from launch.gke import Gke
from launch.local import Local
from launch.settings import DEFAULT_FILE, ensure_run_id, read_settings
from launch.shell import CommandFailed, Shell
from launch.slurm import Slurm
from launch.tpu_vm import TpuVm

BACKENDS = {"tpu_vm": TpuVm, "gce": Gce, "gke": Gke, "slurm": Slurm, "local": Local}
COMMANDS = ("create", "setup", "run", "babysit", "status", "logs", "ssh", "stop", "delete")


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser("launch", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--env", default=DEFAULT_FILE, metavar="FILE", help="the settings (launch.env)")
    parser.add_argument("--dry-run", action="store_true", help="print every command, run none")
    parser.add_argument("--yes", action="store_true", help="do not ask about costs, or before deleting")
    parser.add_argument("--lines", type=int, default=20, help="logs: how many of each process")
    parser.add_argument("--poll", type=float, default=Bounds.poll, help="babysit: seconds between two looks")
    parser.add_argument("--restarts", type=int, default=Bounds.restarts, help="babysit: in a row, no newer checkpoint")
    parser.add_argument("--retries", type=int, default=Bounds.retries, help="babysit: the same, after errors")
    arguments = parser.parse_args(argv)
    settings = read_settings(arguments.env)
    backend = BACKENDS[settings["BACKEND"]](settings, Shell(arguments.dry_run))
    if arguments.dry_run:
        settings["RUN_ID"] = settings["RUN_ID"] or "RUN_ID"
    elif arguments.command in ("create", "run", "babysit"):
        if ensure_run_id(settings, arguments.env):
            print(f"This run is called {settings['RUN_ID']}; {arguments.env} keeps the name.")
    elif not settings["RUN_ID"] and arguments.command not in ("setup", "ssh", "delete"):
        raise UserError(f"{arguments.env} names no RUN_ID: nothing was started with it yet.")
    return COMMAND[arguments.command](backend, arguments) or 0


def create(backend: Backend, arguments: argparse.Namespace) -> None:
    """Costs, a question, a request."""
    _agree_to_costs(backend, arguments)
    backend.create()


def delete(backend: Backend, arguments: argparse.Namespace) -> None:
    """A question, and the end of the costs."""
    _ask(arguments, f"Delete {backend.settings.get('NAME') or backend.settings['RUN_ID']}? The workdir stays.")
    backend.delete()


def babysit(backend: Backend, arguments: argparse.Namespace) -> int:
    """Until training is done; in a dry run everything that it may do, once."""
    if arguments.dry_run:
        actions = (backend.machines, backend.create, backend.setup, backend.run, backend.job, backend.delete)
        for action in actions:
            print(f"# {action.__name__}")
            action()
        return 0
    if backend.machines() is not Machines.READY:
        _agree_to_costs(backend, arguments)
    return Babysitter(backend, Bounds(arguments.poll, arguments.restarts, arguments.retries)).watch()


def status(backend: Backend, arguments: argparse.Namespace) -> None:
    """Three lines, and the end of the log."""
    machines = backend.machines()
    print(f"machines    {machines.value}")
    if machines is not Machines.READY and not arguments.dry_run:
        return
    job = backend.job()
    print(f"training    {job.state.value}: {job.detail}")
    age = "" if job.age is None else f", {job.age} s old"
    print(f"checkpoint  {'none seen' if job.step is None else f'step {job.step}{age}'}")
    try:
        print(backend.logs(3).strip())
    except CommandFailed as error:
        print(f"no log: {error}")


def _agree_to_costs(backend: Backend, arguments: argparse.Namespace) -> None:
    if cost := backend.cost():
        print(cost)
        _ask(arguments, "Create?")


def _ask(arguments: argparse.Namespace, question: str) -> None:
    if arguments.yes or arguments.dry_run:
        return
    if not sys.stdin.isatty():
        raise UserError(f"{question} There is nobody to ask; add --yes.")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("Nothing was done.")


COMMAND = {
    "create": create,
    "setup": lambda backend, arguments: backend.setup(),
    "run": lambda backend, arguments: backend.run(),
    "babysit": babysit,
    "status": status,
    "logs": lambda backend, arguments: print(backend.logs(arguments.lines).strip()),
    "ssh": lambda backend, arguments: backend.ssh(),
    "stop": lambda backend, arguments: backend.stop(),
    "delete": delete,
}


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
