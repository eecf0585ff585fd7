"""Machines with a shell: the same scripts start, watch and stop one training process on each."""

import abc
import dataclasses
import re
import shlex
from concurrent.futures import ThreadPoolExecutor

from launch.backend import Backend, Job, State, train_words
from launch.shell import CommandFailed

STOP_SECONDS = 600  # how long a process may take to save before `stop` kills it
HOST = re.compile(r"densevit-host (\S+) (\w+) ?(\d*)\s*$", re.MULTILINE)
STEP = re.compile(r"densevit-step (\d+) (\d+)\s*$", re.MULTILINE)


class Hosts(Backend):
    """A backend whose machines run `launch/host/job.sh`.

    Subclasses say how to reach the machines and how many there are.
    """

    # Shell words, expanded on the host: the code, Python, this run's folder of small files, and the workdir.
    code = '"$HOME"/densevit/code'
    python = '"$HOME"/densevit/venv/bin/python'
    distributed = "--distributed"

    @property
    def runs(self) -> str:
        """The folder of all workdirs, as a shell word."""
        return '"$HOME"/bucket/runs'

    @property
    def workdir(self) -> str:
        """The workdir, as a shell word."""
        return f"{self.runs}/{shlex.quote(self.settings['RUN_ID'])}"

    @property
    def job_folder(self) -> str:
        """Where a host keeps process number, exit code and log of the run, as a shell word."""
        return f'"$HOME"/densevit/jobs/{shlex.quote(self.settings["RUN_ID"])}'

    @property
    def log_copies(self) -> str:
        """Where copies of the hosts' logs go that outlive the machines, as a shell word; "-": nowhere."""
        return f"{self.workdir}/hosts"

    @abc.abstractmethod
    def reach(self, script: str) -> list[tuple[str, ...]]:
        """The commands that run a shell script on all hosts."""

    def everywhere(self, script: str, tries: int = 1) -> None:
        """Runs a script on all hosts at once; what they print goes to the screen."""
        self._at_once(lambda command: self.shell.run(*command, tries=tries), script)

    def ask(self, script: str) -> str:
        """What a script prints on all hosts."""
        return "\n".join(self._at_once(lambda command: self.shell.read(*command), script))

    def _at_once(self, call, script: str) -> list:
        commands = self.reach(script)
        with ThreadPoolExecutor(1 if self.shell.dry_run else 32) as pool:
            return list(pool.map(call, commands))

    def host_script(self, verb: str, *words: str) -> str:
        """A script that calls `job.sh VERB FOLDER WORDS...`."""
        return " ".join(["bash", f"{self.code}/launch/host/job.sh", verb, self.job_folder, *words])

    def run(self) -> None:
        """Starts one training process on every host."""
        command = [self.python, *train_words(self.settings, self.workdir, f"{self.runs}/.compile_cache")]
        self.everywhere(self.host_script("start", self.log_copies, *command, self.distributed))

    def job(self) -> Job:
        """From what every host says about its process."""
        script = f"if [ -d {self.code} ]; then {self.host_script('status', self.workdir)}; else "
        try:
            answer = self.ask(script + 'echo "densevit-host $(hostname) bare"; fi')
        except CommandFailed as error:
            return Job(State.UNKNOWN, str(error))
        hosts = [(name, word, int(code or 0)) for name, word, code in HOST.findall(answer)]
        step, age = max(((int(step), int(age)) for step, age in STEP.findall(answer)), default=(None, None))
        return dataclasses.replace(judge(hosts, step), age=age)

    def stop(self) -> None:
        """SIGTERM to every process; JAX makes all of them save the same step."""
        self.everywhere(self.host_script("stop", str(STOP_SECONDS)))

    def kill(self) -> None:
        """SIGKILL: processes that wait for a dead one cannot save any more, and checkpoints are whole or not there."""
        self.everywhere(self.host_script("kill"))

    def logs(self, lines: int) -> str:
        """The end of every host's log."""
        return self.ask(self.host_script("logs", str(lines)))


def judge(hosts: list[tuple[str, str, int]], step: int | None) -> Job:
    """The state of a training from (host, word, exit code) of its processes.

    A word is bare, none, running, exited, halted or died. The exit codes keep the contract: 0 done, 75 saved and to be
    run again, more than 127 ended by a signal, anything else an error.
    """
    words = {word for _, word, _ in hosts}
    detail = ", ".join(
        f"{name} {word}{f' {code}' if word in ('exited', 'halted') else ''}" for name, word, code in hosts
    )
    if not hosts or not words <= {"bare", "none", "running", "exited", "halted", "died"}:
        return Job(State.UNKNOWN, detail or "no host answered", step)
    for word, state in (("bare", State.BARE), ("none", State.IDLE), ("running", State.RUNNING)):
        if words == {word}:
            return Job(state, detail, step)
    if "bare" in words:
        return Job(State.BARE, detail, step)
    ended = {code for _, word, code in hosts if word in ("exited", "halted")}
    well = "died" not in words and "none" not in words and ended <= {0, 75}
    if "running" in words:
        return Job(State.ENDING if well else State.BROKEN, detail, step)
    if well:
        state = State.DONE if ended == {0} else State.HALTED if "halted" in words else State.STOPPED
        return Job(state, detail, step)
    if "halted" in words:
        return Job(State.HALTED, detail, step)
    killed = words & {"died", "none"} or any(code > 127 for code in ended)
    return Job(State.KILLED if killed else State.FAILED, detail, step)
