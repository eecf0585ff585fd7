"""Being told to stop: SIGTERM (a preempted machine, a job scheduler) and Ctrl-C become a flag that the loop reads.

One process: our own handlers. Several processes: JAX's preemption service catches SIGTERM in whichever process gets it
and picks one step, a little ahead, at which all of them stop; Ctrl-C is handed to it as a SIGTERM.
"""

import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

STOPPED = 75  # exit code: stopped with the state saved, run the same command again (EX_TEMPFAIL of sysexits.h)


class StopRequest:
    """A context in which SIGTERM and SIGINT ask the loop to stop; the second one ends the process at once."""

    def __init__(self):
        self._signals = 0
        self._agreed = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            # With several processes SIGTERM belongs to JAX: a handler of ours would hide it from the others.
            for number in (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1
        if self._signals > 1:
            os.write(2, b"\nEnded at once: what was not saved yet is lost.\n")
            os._exit(128 + number)
        os.write(2, b"\nStopping: the current step ends and is saved; a second signal ends at once.\n")
        if jax.process_count() > 1 and not self._agreed:
            os.kill(os.getpid(), signal.SIGTERM)

    @property
    def requested(self) -> bool:
        """Whether this process knows that it should stop. Processes may disagree: see :meth:`reached`."""
        return self._agreed or self._signals > 0

    def reached(self, step: int) -> bool:
        """Whether to stop after `step`. Every process must ask at every step; all get True at the same one."""
        if jax.process_count() == 1:
            return self.requested
        if not self._agreed and multihost_utils.reached_preemption_sync_point(step):
            self._agreed = True
            if threading.current_thread() is threading.main_thread():
                # The service has done its work. A machine that is told to stop after the others finds this process
                # saving already: that SIGTERM is its first and must not end it; one more does.
                self._previous[signal.SIGTERM] = signal.SIG_DFL
                signal.signal(signal.SIGTERM, self._handle)
        return self._agreed
