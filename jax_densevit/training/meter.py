"""Numbers of a logging interval: means of what the steps report, and what the clock says."""

import time
from collections.abc import Mapping
from typing import Any


class Meter:
    """Collects the steps since the last line of the log.

    The means are float64 sums of float32 numbers in the order of the steps, and their state is part of the checkpoint:
    a resumed run writes the same digits.

    Args:
      step: where training starts.
      steps: where it ends.
      batch_size: images per step.
      flops: of one training step of the whole batch; None when not known.
      peak: FLOP/s of all devices together; None when not known.
      state: from :meth:`state`, of the checkpoint that training goes on from.
      began: `time.perf_counter()` when the program began to prepare this run; now, when not given.
    """

    def __init__(
        self,
        *,
        step: int,
        steps: int,
        batch_size: int,
        flops: float | None = None,
        peak: float | None = None,
        state: Mapping[str, Any] | None = None,
        began: float | None = None,
    ):
        self._steps, self._batch_size, self._flops, self._peak = steps, batch_size, flops, peak
        state = state or {"count": 0, "sums": {}}
        self._count, self._sums = int(state["count"]), dict(state["sums"])
        self._lost, self._in_a_row = int(state.get("lost", 0)), int(state.get("in_a_row", 0))
        self._rate: float | None = None
        self._began, self._worked = time.perf_counter() if began is None else began, 0.0
        self.restart_clock(step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps (JSON): the sums of an interval that is not over."""
        return {"count": self._count, "sums": dict(self._sums), "lost": self._lost, "in_a_row": self._in_a_row}

    def restart_clock(self, step: int) -> None:
        """Times from here: after compiling, evaluating, saving."""
        self._start, self._start_step, self._waited = time.perf_counter(), step, 0.0

    def wait(self, seconds: float) -> None:
        """Adds time that the loop spent waiting for data."""
        self._waited += seconds

    def work(self, seconds: float) -> None:
        """Adds time that a step took, waiting for data excluded. The step that is compiled does not count."""
        self._worked += seconds

    def add(self, numbers: Mapping[str, float]) -> None:
        """Adds the numbers of a step."""
        for name, value in numbers.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        self._in_a_row = 0
        self._latest = numbers

    def lose(self, numbers: Mapping[str, float]) -> int:
        """Counts a step that was not finite, whose numbers are in no mean; returns how many there were in a row."""
        self._lost += 1
        self._in_a_row += 1
        self._latest = numbers
        return self._in_a_row

    def numbers(self) -> dict[str, float]:
        """The means of the interval (the learning rate as it is now), and starts the next interval.

        Steps that were not finite are counted, as "not_finite", where there were any.
        """
        means = {name: total / self._count for name, total in self._sums.items()}
        if "lr" in means:
            means["lr"] = self._latest["lr"]
        if self._lost:
            means["not_finite"] = self._lost
        self._count, self._sums, self._lost = 0, {}, 0
        return means

    def timing(self, step: int) -> dict[str, float | None]:
        """What the clock says about the steps since it was started, and starts it again."""
        seconds, steps = time.perf_counter() - self._start, step - self._start_step
        if steps < 1 or seconds <= 0:
            return {}
        per_step = seconds / steps
        # The time that is left follows the speed slowly, so that one slow interval does not make it jump.
        self._rate = per_step if self._rate is None else 0.7 * self._rate + 0.3 * per_step
        mfu = self._flops / per_step / self._peak if self._flops and self._peak else None
        timing = {
            "images_per_second": self._batch_size / per_step,
            "step_seconds": per_step,
            "input_wait": min(1.0, self._waited / seconds),
            "mfu": mfu,
            "goodput": min(1.0, self._worked / max(seconds, time.perf_counter() - self._began)),
            "seconds_left": self._rate * (self._steps - step),
        }
        self.restart_clock(step)
        return timing
