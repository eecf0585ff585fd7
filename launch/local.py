"""Several processes on this machine, for trying out: they find each other over loopback and compute on the CPU."""

import shlex
import socket
import sys
from pathlib import Path

from jax_densevit.errors import UserError
from launch.backend import Machines
from launch.hosts import Hosts

ROOT = Path(__file__).resolve().parents[1]


class Local(Hosts):
    """N processes with one CPU device each; every process is a "host" with a folder `hosts/I` in the workdir."""

    code = shlex.quote(str(ROOT))
    log_copies = "-"
    # In program order: programs from the compile cache otherwise run collectives in any order (jax 0.10.2, CPU).
    python = "env JAX_PLATFORMS=cpu XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false " + shlex.quote(
        sys.executable
    )

    @property
    def runs(self) -> str:
        """The folder of all workdirs."""
        return shlex.quote(str(Path(self.settings["RUNS"]).absolute()))

    @property
    def job_folder(self) -> str:
        """In the workdir, numbered."""
        return f'{self.workdir}/hosts/"$DENSEVIT_PROCESS"'

    @property
    def distributed(self) -> str:
        """Three flags; the port is a free one, another at every start."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        count = self.settings["PROCESSES"]
        return f'--coordinator=127.0.0.1:{port} --num_processes={count} --process_id="$DENSEVIT_PROCESS"'

    def reach(self, script: str) -> list[tuple[str, ...]]:
        """One shell a process."""
        return [
            ("env", f"DENSEVIT_PROCESS={number}", "bash", "-c", script)
            for number in range(int(self.settings["PROCESSES"]))
        ]

    def create(self) -> None:
        """Nothing: the machine is here."""

    def machines(self) -> Machines:
        """Always ready."""
        return Machines.READY

    def setup(self) -> None:
        """Nothing: the package that runs this is used."""

    def delete(self) -> None:
        """Nothing: `stop` ends the processes, the workdir stays."""

    def ssh(self) -> int:
        """There is nowhere to go."""
        raise UserError("The backend is local: this machine has a shell already.")
