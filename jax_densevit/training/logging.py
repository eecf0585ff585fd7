"""What a run says about itself: a line for people, `metrics.jsonl` for machines, timings, TensorBoard.

`metrics.jsonl` holds only what follows from config, seed and data (losses, rates, scores; floats in full), so that a
run which was killed and resumed ends with the same bytes as one that was not. Whatever the clock measures goes to
`timings.jsonl`.
"""

import datetime
import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jax_densevit.errors import UserError
from jax_densevit.manifest import write_text

log = logging.getLogger(__name__)


class JsonLines:
    """A file of JSON objects, one a line, each written by a single append: a kill cannot leave half of one."""

    def __init__(self, path: Path):
        self.path = path
        self._handle: int | None = None

    def append(self, values: Mapping[str, Any]) -> None:
        """Writes one line. NaN and infinity become null. `UserError` when the file cannot be written."""
        line = json.dumps({name: _finite(value) for name, value in values.items()}, allow_nan=False)
        try:
            if self._handle is None:
                self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            content = (line + "\n").encode()
            if os.write(self._handle, content) != len(content):
                raise OSError(28, "No space left on device")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}).") from error

    def sync(self) -> None:
        """Forces what was written to disk."""
        if self._handle is not None:
            os.fsync(self._handle)

    def read(self) -> list[dict[str, Any]]:
        """The lines so far; one that is no JSON object ends the list (the rest of a torn file is not trusted)."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        values = []
        for line in lines:
            try:
                value = json.loads(line)
            except ValueError:
                break
            if not isinstance(value, dict) or "step" not in value:
                break
            values.append(value)
        return values

    def cut_after(self, step: int) -> None:
        """Drops the lines of steps after `step`, and what is not a line, in one rename."""
        self.close()
        if not self.path.exists():
            return
        kept = [line for line in self.read() if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if text.encode() != self.path.read_bytes():
            write_text(self.path, text)

    def close(self) -> None:
        """Closes the file; the next append opens it again."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


class TensorBoard:
    """TensorBoard event files, written without TensorFlow. Whatever fails is said once and does not stop the run."""

    def __init__(self, folder: Path, step: int):
        """Opens a new event file; what earlier files say about steps after `step` is declared void."""
        self._file: Any = None
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter

            self._event, self._summary = event_pb2.Event, summary_pb2.Summary
            folder.mkdir(parents=True, exist_ok=True)
            now = (
                time.time_ns()
            )  # in the name twice: in seconds as TensorBoard reads it, in full so that no name recurs
            name = f"events.out.tfevents.{now // 10**9:010d}.{os.uname().nodename}.{os.getpid()}.{now}"
            self._file = open(folder / name, "xb")
            self._records = RecordWriter(self._file)
            self._write(file_version="brain.Event:2")
            restart = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(step=step + 1, session_log=restart)
        except Exception as error:
            self._fail(error)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes numbers of one step."""
        if self._file is None:
            return
        try:
            points = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
            self._write(step=step, summary=self._summary(value=points))
        except Exception as error:
            self._fail(error)

    def _write(self, **fields) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._file.flush()

    def _fail(self, error: Exception) -> None:
        log.warning("TensorBoard is off: %s: %s. Training goes on.", type(error).__name__, error)
        self.close()

    def close(self) -> None:
        """Closes the event file."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError:
                pass


class _Screen(Console):
    """A console that leaves it to its user what happens when nobody reads it any more; rich would end the program."""

    def on_broken_pipe(self) -> None:
        raise  # it is called while the error is handled


class RunLog:
    """Everything that a run writes besides checkpoints and evaluations. On processes other than 0 it is silent.

    Args:
      workdir: of the run.
      step: the step that training starts from; what older files say about later steps is cut.
      steps: the step that it ends at.
      main: whether this is process 0.
      quiet: no lines and no progress bar.
      tensorboard: whether to write event files, in `workdir/tensorboard`.
    """

    def __init__(
        self, workdir: Path, *, step: int, steps: int, main: bool = True, quiet: bool = False, tensorboard: bool = True
    ):
        self._main, self._steps = main, steps
        self._metrics, self._timings = JsonLines(workdir / "metrics.jsonl"), JsonLines(workdir / "timings.jsonl")
        self._board: TensorBoard | None = None
        if main:
            self._metrics.cut_after(step)
            if tensorboard:
                self._board = TensorBoard(workdir / "tensorboard", step)
        self._console = _Screen(quiet=quiet or not main, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        if main and not quiet and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._bar = self._progress.add_task("step", total=steps, completed=step)
            self._progress.start()

    def say(self, line: str) -> None:
        """Prints a line for people. Where they cannot get it (`| head`, a full disk behind `>`) training goes on."""
        try:
            self._console.print(line, markup=False)
        except OSError as error:
            self._console.quiet = True
            # Python writes what is left at its end once more: give it somewhere to go.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            log.warning("Nothing is printed any more (%s). Training goes on: see metrics.jsonl.", error.strerror)

    def progress(self, step: int) -> None:
        """Moves the bar."""
        if self._progress is not None:
            self._progress.update(self._bar, completed=step)

    def train(self, step: int, numbers: Mapping[str, float], timing: Mapping[str, float | None]) -> None:
        """Logs an interval: `numbers` must follow from seed and data alone, `timing` is what the clock says.

        `timing` may have "images_per_second", "step_seconds", "input_wait" (share of the time), "mfu" (share of the
        peak), "goodput" (share of the time since the program began that steps took),
        "seconds_left", "skipped" (unreadable files so far).
        """
        if not self._main:
            return
        self._metrics.append({"step": step, **numbers})
        self._timings.append({"step": step, "time": round(time.time(), 3), **timing})
        if self._board is not None:
            measured = {f"timing/{name}": value for name, value in timing.items() if value is not None}
            self._board.scalars(step, {**{f"train/{name}": value for name, value in numbers.items()}, **measured})
        self.say(human_line(step, self._steps, numbers, timing))

    def evaluation(self, step: int, name: str, summary: Mapping[str, float], count: int, seconds: float) -> None:
        """Logs the scores of one evaluator."""
        if not self._main:
            return
        self._metrics.append({"step": step, "evaluator": name, "examples": count, **summary})
        self._timings.append({"step": step, "time": round(time.time(), 3), "evaluator": name, "seconds": seconds})
        if self._board is not None:
            self._board.scalars(step, {f"{name}/{key}": value for key, value in summary.items()})
        scores = "  ".join(f"{key} {value:.4f}" for key, value in summary.items())
        self.say(f"step {step}  {name}: {scores}  ({count} images, {seconds:.1f} s)")

    def evaluated(self, step: int) -> set[str]:
        """The evaluators whose scores at `step` are in the log."""
        return {line["evaluator"] for line in self._metrics.read() if line["step"] == step and "evaluator" in line}

    def sync(self) -> None:
        """Forces the metrics to disk: called before a checkpoint that relies on them."""
        self._metrics.sync()

    def close(self) -> None:
        """Closes files and takes the bar off the screen."""
        if self._progress is not None:
            self._progress.stop()
        for file in (self._metrics, self._timings, self._board):
            if file is not None:
                file.close()


def human_line(step: int, steps: int, numbers: Mapping[str, float], timing: Mapping[str, float | None]) -> str:
    """`step 50/1000  loss 0.8123  lr 1.00e-03  312 images/s  MFU 34.1%  goodput 97%  input wait 2%  ETA 0:03:12`."""
    parts = [f"step {step}/{steps}"]
    if "loss" in numbers:
        parts.append(f"loss {numbers['loss']:.4f}")
    if "lr" in numbers:
        parts.append(f"lr {numbers['lr']:.2e}")
    if timing.get("images_per_second") is not None:
        rate = timing["images_per_second"]
        parts.append(f"{rate:,.0f} images/s" if rate >= 100 else f"{rate:.3g} images/s")
    if timing.get("mfu") is not None:
        parts.append(f"MFU {100 * timing['mfu']:.1f}%")
    if timing.get("goodput") is not None:
        parts.append(f"goodput {100 * timing['goodput']:.0f}%")
    if timing.get("input_wait") is not None:
        parts.append(f"input wait {100 * timing['input_wait']:.0f}%")
    if timing.get("seconds_left") is not None:
        parts.append(f"ETA {datetime.timedelta(seconds=round(timing['seconds_left']))}")
    if timing.get("skipped"):
        parts.append(f"{timing['skipped']:.0f} unreadable files skipped")
    if numbers.get("not_finite"):
        parts.append(f"{numbers['not_finite']:.0f} steps not finite")
    return "  ".join(parts)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
