"""SLURM: `slurm/train.sbatch` starts one process a task, and asks for the job to be queued again after 75."""

import shlex
import sys
from pathlib import Path

from launch.backend import Backend, Job, Machines, State, train_words
from launch.shell import CommandFailed

SCRIPT = Path(__file__).resolve().parent / "slurm" / "train.sbatch"
# `squeue -o %T` and `sacct -o State`; what is not here is unknown.
QUEUED = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING", "SUSPENDED", "SPECIAL_EXIT"}
RUNNING = {"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING"}
ENDED = {
    "COMPLETED": State.DONE,
    "CANCELLED": State.HALTED,
    "FAILED": State.FAILED,
    "OUT_OF_MEMORY": State.KILLED,
    "TIMEOUT": State.KILLED,
    "NODE_FAIL": State.KILLED,
    "PREEMPTED": State.KILLED,
    "BOOT_FAIL": State.KILLED,
    "DEADLINE": State.FAILED,
}


class Slurm(Backend):
    """Runs on the login node; RUNS and this checkout are on a file system that all nodes see."""

    self_restarting = True

    @property
    def workdir(self) -> Path:
        """The workdir."""
        return Path(self.settings["RUNS"]).absolute() / self.settings["RUN_ID"]

    @property
    def _number(self) -> str:
        file = self.workdir / "slurm_job"
        return file.read_text().strip() if file.is_file() else ""

    def create(self) -> None:
        """Nothing: the machines come with the job."""

    def machines(self) -> Machines:
        """Whatever the queue says is about the job."""
        return Machines.READY

    def setup(self) -> None:
        """Nothing: the job uses the Python that runs this."""

    def run(self) -> None:
        """Submits the job and notes its number."""
        settings, workdir = self.settings, self.workdir
        cache = shlex.quote(f"{settings['RUNS']}/.compile_cache")
        words = train_words(settings, shlex.quote(str(workdir)), cache)
        if not self.shell.dry_run:
            workdir.mkdir(parents=True, exist_ok=True)
            (workdir / "halted").unlink(missing_ok=True)
        answer = self.shell.read(
            "sbatch",
            "--parsable",
            f"--job-name={settings['RUN_ID']}",
            f"--nodes={settings['NODES']}",
            f"--ntasks-per-node={settings['TASKS_PER_NODE']}",
            f"--gpus-per-node={settings['GPUS_PER_NODE']}",
            f"--time={settings['TIME']}",
            f"--chdir={SCRIPT.parents[2]}",
            f"--output={workdir}/slurm.log",
            *shlex.split(settings["SBATCH_ARGS"]),
            *(str(SCRIPT), str(workdir), settings["RESTARTS"], sys.executable),
            *(shlex.split(" ".join(words)) + ["--distributed"]),
        )
        if not self.shell.dry_run:
            (workdir / "slurm_job").write_text(answer.strip().partition(";")[0] + "\n")

    def job(self) -> Job:
        """From the queue, and from the accounts when it has left the queue."""
        number, step = self._number, self._newest()
        if not number:
            return Job(State.IDLE, "no job was submitted", step)
        try:
            word = self._first(self.shell.read("squeue", "--noheader", f"--jobs={number}", "--format=%T"))
        except CommandFailed as error:
            if "Invalid job id" not in error.said:
                return Job(State.UNKNOWN, str(error), step)
            word = ""
        if word in QUEUED:
            return Job(State.WAITING, f"job {number} {word}", step)
        if word in RUNNING:
            return Job(State.RUNNING, f"job {number} {word}", step)
        if not word:
            command = (
                "sacct",
                f"--jobs={number}",
                "--allocations",
                "--noheader",
                "--parsable2",
                "--format=State,ExitCode",
            )
            try:
                word, _, code = self._first(self.shell.read(*command)).partition("|")
            except CommandFailed as error:
                return Job(State.UNKNOWN, str(error), step)
            word = word.partition(" ")[0]  # "CANCELLED by 1000"
            state = ENDED.get(word, State.UNKNOWN)
            if word == "FAILED" and code.startswith("75:"):
                state = State.HALTED if (self.workdir / "halted").exists() else State.STOPPED
            return Job(state, f"job {number} {word} {code}", step)
        return Job(ENDED.get(word, State.UNKNOWN), f"job {number} {word}", step)

    @staticmethod
    def _first(text: str) -> str:
        return text.strip().partition("\n")[0].strip()

    def _newest(self) -> int | None:
        folder = self.workdir / "checkpoints"
        steps = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
        return max(steps, default=None)

    def stop(self) -> None:
        """SIGTERM to the tasks, which save; the script sees the mark and does not ask for another turn."""
        if not self.shell.dry_run and self.workdir.is_dir():
            (self.workdir / "halted").touch()
        self.shell.run("scancel", "--signal=TERM", self._number or "JOB")

    def logs(self, lines: int) -> str:
        """The end of the job's log."""
        return self.shell.read("tail", "-n", str(lines), str(self.workdir / "slurm.log"))

    def ssh(self) -> int:
        """A shell beside the tasks."""
        return self.shell.attach("srun", f"--jobid={self._number or 'JOB'}", "--overlap", "--pty", "bash")

    def delete(self) -> None:
        """Takes the job out of the queue, running or not."""
        if self._number or self.shell.dry_run:
            self.shell.run("scancel", self._number or "JOB")
