"""Looks at machines and training again and again, and does what is missing, within bounds.

Machines are given up only in states that say by name that they are lost. Whatever cannot be understood is waited for.
"""

import dataclasses
import time
from collections.abc import Callable

from launch.backend import Backend, Job, Machines, State
from launch.shell import CommandFailed

DONE, FAILED, STOPPED = 0, 1, 75
LONGEST_WAIT = 1800.0
UNKNOWN_LOOKS = 60  # in a row; then a person should look


@dataclasses.dataclass
class Bounds:
    """How patient to be.

    Attributes:
      poll: seconds between two looks, and the first wait before a restart; the following ones double.
      restarts: restarts in a row after preemptions and deaths without a newer checkpoint.
      retries: the same after errors of the program, which come again most of the time.
      grace: seconds that processes may end one after another.
    """

    poll: float = 30.0
    restarts: int = 20
    retries: int = 1
    grace: float = 300.0


class Babysitter:
    """Sits by one training.

    Args:
      backend: where it runs.
      bounds: how patient to be.
      sleep, clock, say: replaced in tests.
    """

    def __init__(
        self,
        backend: Backend,
        bounds: Bounds,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = print,
    ):
        self._backend, self._bounds, self._sleep, self._clock, self._say = backend, bounds, sleep, clock, say
        self._tries = {"restarts": 0, "retries": 0}
        self._step: int | None = None
        self._unknown = 0
        self._seen = False
        self._ending_since: float | None = None
        self._last = ""

    def watch(self) -> int:
        """Until the training is done (0), was stopped by hand (75), or must be left to a person (1)."""
        while True:
            code = self._look()
            if code is not None:
                return code

    def _look(self) -> int | None:
        machines = self._backend.machines()
        if machines is Machines.UNKNOWN:
            return self._not_understood("the machines' state is unknown")
        if machines is Machines.READY:
            job = self._backend.job()
            if job.state is State.UNKNOWN:
                return self._not_understood(f"the training's state is unknown: {job.detail}")
            self._unknown = 0
            return self._training(job)
        self._unknown = 0
        if machines is Machines.WAITING:
            return self._wait("waiting for machines")
        if machines is Machines.LOST:
            self._tell("the machines are lost")
            return self._again("restarts", self._backend.delete, self._backend.create)
        return self._again("restarts", self._backend.create)

    def _training(self, job: Job) -> int | None:
        backend = self._backend
        if job.step is not None and (self._step is None or job.step > self._step):
            self._step = job.step
            self._tries = dict.fromkeys(self._tries, 0)
        where = f"{job.state.value}{'' if job.step is None else f', checkpoint {job.step}'}: {job.detail}"
        if job.state is not State.ENDING:
            self._ending_since = None
        if job.state in (State.RUNNING, State.WAITING):
            self._seen = True
            return self._wait(where)
        if job.state is State.ENDING:
            now = self._clock()
            self._ending_since = self._ending_since or now
            if now - self._ending_since < self._bounds.grace:
                return self._wait(where)
        self._tell(where)
        if job.state is State.DONE:
            return DONE
        if job.state is State.HALTED or (job.state is State.IDLE and self._seen and backend.self_restarting):
            return STOPPED  # by `stop`, after which a scheduler has nothing more of it
        self._seen = True
        if job.state is State.BARE:
            return self._again("restarts", backend.setup, backend.run)
        if job.state is State.IDLE:
            return self._again("restarts", backend.run)
        if backend.self_restarting:
            return FAILED  # the scheduler's own bounds are used up
        if job.state in (State.BROKEN, State.ENDING):
            return self._again("restarts", backend.kill, backend.run)
        return self._again("retries" if job.state is State.FAILED else "restarts", backend.run)

    def _again(self, kind: str, *actions: Callable[[], None]) -> int | None:
        """Does something that brings the training forward, later every time; gives up when it has not for too long."""
        limit, number = getattr(self._bounds, kind), self._tries[kind]
        # The first action of all is the start; after it `limit` more are allowed.
        if number > limit or (kind == "retries" and number >= limit):
            self._tell(
                f"given up: {number} {kind} in a row without a newer checkpoint. Look at `logs`; the machines stay as "
                "they are."
            )
            return FAILED
        self._tries[kind] += 1
        if number:
            seconds = min(LONGEST_WAIT, self._bounds.poll * 2 ** (number - 1))
            self._tell(f"again in {seconds:g} s")
            self._sleep(seconds)
        try:
            for action in actions:
                self._tell(f"-> {action.__name__}")
                action()
        except CommandFailed as error:
            self._tell(str(error))
        self._sleep(self._bounds.poll)
        return None

    def _not_understood(self, why: str) -> int | None:
        self._unknown += 1
        if self._unknown >= UNKNOWN_LOOKS:
            self._tell(
                f"{why}, {self._unknown} times in a row. Nothing was deleted; look yourself, then `babysit` again."
            )
            return FAILED
        return self._wait(f"{why}; waiting, nothing is deleted")

    def _wait(self, line: str) -> None:
        if line != self._last:
            self._tell(line)
        self._sleep(self._bounds.poll)

    def _tell(self, line: str) -> None:
        self._last = line
        self._say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")
