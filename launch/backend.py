"""What every place to train at can do. The babysitter and the commands know this and nothing else."""

import abc
import dataclasses
import enum
import shlex

from launch.shell import Shell


class Machines(enum.Enum):
    """What the cloud says about the machines."""

    ABSENT = "absent"  # there are none
    WAITING = "waiting"  # asked for, being made or being removed
    READY = "ready"
    LOST = "lost"  # preempted, suspended or failed: only a new request brings them back
    UNKNOWN = "unknown"  # no answer, or one this program does not know: nothing may be deleted


class State(enum.Enum):
    """What the training does."""

    BARE = "bare"  # the machines are not set up
    IDLE = "idle"  # set up, nothing was started
    WAITING = "waiting"  # in the queue of a scheduler
    RUNNING = "running"
    ENDING = "ending"  # some processes have ended well, others still run
    BROKEN = "broken"  # a process is dead and others still wait for it
    DONE = "done"  # exit code 0 everywhere
    STOPPED = "stopped"  # 75: stopped with the state saved
    HALTED = "halted"  # ended because somebody said `stop`
    KILLED = "killed"  # a process ended by a signal, or without a word
    FAILED = "failed"  # an error of the program
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Job:
    """The state of a training.

    Attributes:
      detail: a line for people.
      step: of the newest checkpoint; None: none is known.
      age: seconds since it was written; None: not known.
    """

    state: State
    detail: str = ""
    step: int | None = None
    age: int | None = None


class Backend(abc.ABC):
    """A place to train at.

    Attributes:
      self_restarting: a scheduler starts the training again by itself after a preemption.
    """

    self_restarting = False

    def __init__(self, settings: dict[str, str], shell: Shell):
        self.settings, self.shell = settings, shell

    def cost(self) -> str:
        """What `create` will cost, for a person; empty where it costs nothing."""
        return ""

    @abc.abstractmethod
    def create(self) -> None:
        """Asks for the machines; they may come much later."""

    @abc.abstractmethod
    def machines(self) -> Machines:
        """What the machines are doing. Never raises for an answer it does not understand: that is `UNKNOWN`."""

    @abc.abstractmethod
    def setup(self) -> None:
        """Brings code, packages and the workdir's file system to the machines; doing it twice is harmless."""

    @abc.abstractmethod
    def run(self) -> None:
        """Starts training, detached."""

    @abc.abstractmethod
    def job(self) -> Job:
        """What the training is doing."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Lets the training save and end; the babysitter will not start it again."""

    def kill(self) -> None:
        """Ends at once what is left of a training one of whose processes is dead."""
        raise NotImplementedError("only a backend that restarts trainings itself can do without")

    @abc.abstractmethod
    def logs(self, lines: int) -> str:
        """The end of what the processes printed."""

    @abc.abstractmethod
    def ssh(self) -> int:
        """A shell on the first machine; its exit code."""

    @abc.abstractmethod
    def delete(self) -> None:
        """Gives the machines back; no error where there are none. The workdir stays."""


def train_words(settings: dict[str, str], workdir: str, compile_cache: str) -> list[str]:
    """The words of the training command after `python`, quoted for a shell; the paths are shell words already."""
    arguments = [f"--config={settings['CONFIG']}", *shlex.split(settings["ARGS"])]
    quoted = [shlex.quote(argument) for argument in arguments]
    return ["-m", "jax_densevit.train", *quoted, f"--workdir={workdir}", f"--compile_cache={compile_cache}"]


def chips(settings: dict[str, str]) -> int | None:
    """How many chips the settings ask for; None when their names do not say it.

    `v5litepod-N` and `v6e-N` count chips, older types and v5p count their cores, two on a chip.
    """
    if "TOPOLOGY" in settings:
        count = 1
        for side in settings["TOPOLOGY"].split("x"):
            if not side.isdecimal():
                return None
            count *= int(side)
        return count
    kind, _, number = settings["TYPE"].rpartition("-")
    if not number.isdecimal():
        return None
    return int(number) * int(settings["SLICES"]) // (2 if kind in ("v2", "v3", "v4", "v5p") else 1)


def cost_of_chips(settings: dict[str, str]) -> str:
    """`16 chips, 2.70 each an hour: 43.20 an hour, 1036.80 a day`, as far as the settings say."""
    count = chips(settings)
    kind = settings.get("TYPE") or settings.get("MACHINE") or settings.get("ACCELERATOR")
    what = f"{kind} in {settings['ZONE']}: {'an unknown number of' if count is None else count} chips"
    try:
        price = float(settings["PRICE_PER_CHIP_HOUR"])
    except ValueError:
        return (
            f"{what}. PRICE_PER_CHIP_HOUR is not set: https://cloud.google.com/tpu/pricing has today's price. "
            "Costs run until `delete`."
        )
    if count is None:
        return f"{what}, {price:.2f} each an hour, until `delete`."
    hour = price * count
    return f"{what}, {price:.2f} each an hour: {hour:,.2f} an hour, {24 * hour:,.2f} a day, until `delete`."
