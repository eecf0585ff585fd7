"""Checkpoints: written in the background, verified before use, restored onto any mesh.

`workdir/checkpoints/<step>/` holds the Orbax items `params`, `statistics`, `ema`, `optimizer` (plain nested dicts of
arrays), `data`, `meta` (JSON) and a SHA-256 manifest of all their files. A step gets its name by one rename, after its
manifest was written: a folder with a number for a name is complete, whatever happened to the process.

This file and `pretrained/orbax_files.py` are the only ones that import Orbax (the classic interface of 0.12).
"""

import logging
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jax_densevit.errors import UserError
from jax_densevit.manifest import sync_folder, write_manifest
from jax_densevit.pretrained.orbax_files import item_metadata, restore_item
from jax_densevit.training.plain import from_plain, mismatches, to_plain
from jax_densevit.training.processes import anywhere
from jax_densevit.training.state import TrainState
from jax_densevit.training.stored import StoredSteps

log = logging.getLogger(__name__)

BARRIER_SECONDS = 600  # how long processes wait for each other before they give up
_ITEMS = ("params", "statistics", "ema", "optimizer")


class Checkpoints(StoredSteps):
    """The checkpoints of one workdir.

    Args:
      workdir: the folder of the run; `checkpoints/` is made in it unless `read_only`.
      keep: how many of the latest steps stay; the best one stays besides.
      best: the score that decides which step is best, e.g. "val/mIoU"; a leading "-" means that smaller is better.
        Empty: none.
      strict: a damaged newest step is an error instead of a reason to fall back to the one before.
      read_only: for evaluation and prediction: nothing in the workdir is created, renamed or removed.
    """

    def __init__(
        self, workdir: str | Path, *, keep: int = 2, best: str = "", strict: bool = False, read_only: bool = False
    ):
        if keep < 1:
            raise UserError(f"checkpoint.keep is {keep}; at least 1 checkpoint must stay.")
        super().__init__(workdir, best, strict)
        self.keep, self.read_only = keep, read_only
        self._finisher: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._saving: int | None = None
        self._writer: ocp.AsyncCheckpointer | None = None
        if not read_only:
            self._create_folder()
            if jax.process_index() == 0:
                self._remove_leftovers()

    # --- saving ---

    def save(self, step: int, state: TrainState, data: dict[str, Any], meta: dict[str, Any]) -> None:
        """Starts saving; returns as soon as the arrays are copied. Every process calls it.

        Args:
          step: the number of updates made; a checkpoint of that step that is already there is replaced.
          data: what the input stream needs to go on (JSON).
          meta: what evaluation and prediction need to know (JSON).

        Raises:
          UserError: this save, or the one before, failed (disk full, workdir gone). What was there before is intact.
        """
        self.wait()
        self._saving = step
        target = self.folder / f"{step}.unverified"
        items = {name: to_plain(getattr(state, name)) for name in _ITEMS}
        arguments = {name: ocp.args.StandardSave(tree) for name, tree in items.items() if tree}
        arguments |= {"data": ocp.args.JsonSave(data), "meta": ocp.args.JsonSave(meta)}
        try:
            if not self.folder.is_dir():
                raise FileNotFoundError("the folder is gone")
            with jax.transfer_guard("allow"):
                self._get_writer().save(epath.Path(target), args=ocp.args.Composite(**arguments), force=True)
        except Exception as error:
            self._abandon()
            raise self._failed(error) from error
        self._finisher = threading.Thread(target=self._finish, args=(step, target), name="checkpoint")
        self._finisher.start()

    def check(self) -> None:
        """Raises :class:`UserError` if a save that has ended in the background failed."""
        if self._finisher is not None and not self._finisher.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way, if any; :class:`UserError` if it failed."""
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise self._failed(failure) from failure

    def close(self) -> None:
        """Waits for the save under way and frees threads; :class:`UserError` if that save failed."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, value, trace) -> None:
        try:
            self.close()
        except UserError as error:
            if value is None:
                raise
            log.warning("%s", error)  # the exception under way says what went wrong first

    def _get_writer(self) -> ocp.AsyncCheckpointer:
        if self._writer is None:
            # Orbax logs the traceback of what it raises; we say it in one sentence.
            for name in ("absl", "asyncio"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
            # For good: its threads may end after this object.
            if not isinstance(sys.unraisablehook, _ClosedLoopsUnsaid):
                sys.unraisablehook = _ClosedLoopsUnsaid(sys.unraisablehook)
            processes = set(range(jax.process_count())) if jax.process_count() > 1 else None
            self._writer = ocp.AsyncCheckpointer(
                ocp.CompositeCheckpointHandler(),
                async_options=ocp.AsyncOptions(timeout_secs=BARRIER_SECONDS, create_directories_asynchronously=False),
                # Naming the processes makes Orbax use barriers that time out instead of ones that hang.
                multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=processes),
            )
        return self._writer

    def _finish(self, step: int, target: Path) -> None:
        """In a thread: waits for Orbax, then process 0 writes the manifest, renames, and removes old steps."""
        try:
            self._writer.wait_until_finished()
            if jax.process_index() != 0:
                return
            write_manifest(target)
            final = self.folder / str(step)
            if final.exists():
                self._remove(final)
            target.rename(final)
            sync_folder(self.folder)
            self._intact.add(step)
            self._remove_old()
        except BaseException as error:
            self._failure = error
            self._abandon()

    def _remove_old(self) -> None:
        best = self.scores.latest()
        keep = {*self.steps()[-self.keep :], *([best["step"]] if best else [])}
        for step in self.steps():
            if step not in keep:
                self._remove(self.folder / str(step))

    def _remove(self, path: Path) -> None:
        # A kill in the middle of the removal must not leave half a step under its number.
        doomed = path.with_name(f"{path.name}.deleting")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _abandon(self) -> None:
        """Frees the space of a save that failed. Threads of TensorStore may still be writing, and make folders anew."""
        if jax.process_index() != 0:
            return
        gone = 0
        for _ in range(50):
            left = list(self.folder.glob(f"{self._saving}.unverified*"))
            gone = 0 if left else gone + 1
            if gone == 3:
                return
            for path in left:
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.1)

    def _failed(self, error: BaseException) -> UserError:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        cause = lines[0] if lines else type(error).__name__
        if re.search(r"No space left on device|ENOSPC|Disk quota exceeded", str(error)):
            cause = "the disk is full"
        intact = ", ".join(map(str, self.steps()))
        kept = f"the checkpoints of steps {intact} are intact" if intact else "there is no earlier checkpoint"
        return UserError(
            f"Saving step {self._saving} in {self.folder} failed: {cause[:300]}; {kept}. Put it right and run the same "
            "command again."
        )

    def _create_folder(self) -> None:
        """Every process writes its share of a checkpoint, so one that cannot stops all of them before they begin."""
        cause = ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".probe-{jax.process_index()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            cause = error.strerror
        if anywhere(bool(cause)):
            who = "" if jax.process_count() == 1 else f"Process {jax.process_index()}: "
            if not cause:
                who, cause = "Another process: ", "see its message"
            raise UserError(f"{who}Cannot write in workdir {self.workdir}: {cause}; choose another --workdir.")

    def _remove_leftovers(self) -> None:
        """What a killed process left half-written."""
        for path in self.folder.iterdir():
            if re.fullmatch(r"\d+\.(unverified.*|deleting)", path.name):
                shutil.rmtree(path, ignore_errors=True)

    # --- restoring ---

    def set_aside_after(self, step: int) -> None:
        """Renames steps newer than `step`, which are damaged, to `damaged-<step>`: training will write them again."""
        if jax.process_index() == 0:
            for newer in (number for number in self.steps() if number > step):
                aside = self.folder / f"damaged-{newer}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.folder / str(newer)).rename(aside)
        self.barrier(f"set_aside_after_{step}")

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of `step`, typed: shapes, dtypes and shardings as `abstract` (`jax.ShapeDtypeStruct` leaves) says.

        The checkpoint may have been written on any number of devices and processes.

        Raises:
          UserError: the checkpoint is damaged, or holds other parameters, shapes or dtypes than `abstract`.
        """
        self._verify_together(step)
        trees = {name: getattr(abstract, name) for name in _ITEMS}
        wanted = {name: tree for name in _ITEMS if (tree := to_plain(trees[name]))}
        self._compare(step, wanted)
        with jax.transfer_guard("allow"):
            arguments = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
            restored = _read(self.folder / str(step), ocp.args.Composite(**arguments))
            count = jax.device_put(np.int32(step), abstract.step.sharding)
            parts = {name: from_plain(restored.get(name) or {}, trees[name]) for name in _ITEMS}
            return TrainState(step=count, **parts)

    def read_data(self, step: int) -> dict[str, Any]:
        """What `save` was given as `data`."""
        return self._read_json(step, "data")

    def read_meta(self, step: int) -> dict[str, Any]:
        """What `save` was given as `meta`."""
        return self._read_json(step, "meta")

    def _read_json(self, step: int, item: str) -> dict[str, Any]:
        self.verify(step)
        return _read(self.folder / str(step), ocp.args.Composite(**{item: ocp.args.JsonRestore()}))[item]

    def restore_variables(self, step: int, which: str = "params", shardings: Any = None) -> dict[str, Any]:
        """The model's variables: {"params": ..., "batch_stats": ...}, without optimizer state.

        Args:
          which: "params", or "ema" for the moving averages of parameters and statistics.
          shardings: a tree like the result; None gives NumPy arrays.

        Raises:
          UserError: a damaged checkpoint, or one without a moving average.
        """
        if which not in ("params", "ema"):
            raise UserError(f"which is {which!r}; it must be 'params' or 'ema'.")
        self.verify(step)
        folder = self.folder / str(step)
        if not (folder / which).is_dir():
            raise UserError(f"The checkpoint of step {step} in {self.folder} has no {which}: it was trained without.")
        names = {"params": "params", "batch_stats": "statistics"}
        if which == "ema":
            restored = restore_item(folder / "ema", shardings and _renamed(shardings, names))
            return _renamed(restored, {ours: name for name, ours in names.items()})
        return {
            name: restore_item(folder / item, shardings and shardings[name])
            for name, item in names.items()
            if (folder / item).is_dir()
        }

    def _verify_together(self, step: int) -> None:
        message = ""
        try:
            if jax.process_index() == 0:
                self.verify(step)
            elif step not in self.steps():
                raise UserError(f"This process does not see {self.folder / str(step)}: workdir must be shared.")
        except UserError as error:
            message = str(error)
        if anywhere(bool(message)):
            raise UserError(message or f"The checkpoint of step {step} cannot be used: see the message of process 0.")

    def _compare(self, step: int, wanted: dict[str, Any]) -> None:
        """Orbax casts dtypes without a word and describes the first difference only; we list them."""
        folder, problems = self.folder / str(step), []
        for name in _ITEMS:
            stored = item_metadata(folder / name) if (folder / name).is_dir() else {}
            if name == "optimizer" and wanted.get(name) and not stored:
                raise UserError(
                    f"The checkpoint of step {step} in {self.folder} holds parameters and no state of training, as "
                    "convert writes it, so there is nothing to resume: name another --workdir, and start from these "
                    f"parameters with --config.init.workdir={self.workdir}."
                )
            problems += mismatches(name, stored, wanted.get(name, {}))
        if problems:
            problems.sort()
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise UserError(
                f"The checkpoint of step {step} in {self.folder} does not fit the config: {'; '.join(problems[:8])}"
                f"{more}. "
                "Use the config it was trained with, or another workdir (config.init.workdir takes over what fits)."
            )

    # --- processes ---

    def barrier(self, name: str, seconds: int = BARRIER_SECONDS) -> None:
        """Waits until every process is here; :class:`UserError` when one is not within `seconds`."""
        if jax.process_count() == 1:
            return
        wait = ocp.multihost.get_barrier_sync_fn(processes=set(range(jax.process_count())))
        try:
            wait(key=f"jax_densevit_{name}", timeout_ms=seconds * 1000)
        except jax.errors.JaxRuntimeError as error:
            raise UserError(
                f"Another process did not arrive at {name!r} within {seconds} s: look at its log."
            ) from error


class _ClosedLoopsUnsaid:
    """In place of `sys.unraisablehook`: says nothing of TensorStore's threads that end after Orbax gave up a save.

    Each would print a traceback about a closed event loop. Why the save failed is said elsewhere.
    """

    def __init__(self, before: Callable[[Any], Any]):
        self.before = before

    def __call__(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self.before(unraisable)


def _read(folder: Path, arguments: ocp.args.Composite) -> Any:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(epath.Path(folder), args=arguments)


def _renamed(tree: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """`tree` with its entries under their new names (old -> new)."""
    return {new: tree[old] for old, new in names.items() if old in tree}
