"""The training loop, to be read from top to bottom: start or resume, step, log, save, evaluate, stop.

It knows an experiment by its attributes (see `jax_densevit.experiment.Experiment`), and no task or model by name.
"""

import contextlib
import datetime
import gc
import json
import logging
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError
from jax_densevit.manifest import write_text
from jax_densevit.training.allocator import give_back_freed_memory, leave_out_of_garbage_collection
from jax_densevit.training.checkpoint import Checkpoints
from jax_densevit.training.culprits import find_culprits, indices, names
from jax_densevit.training.evaluation import evaluate, save_evaluation
from jax_densevit.training.hardware import peak_flops
from jax_densevit.training.initial import take_over
from jax_densevit.training.lock import WorkdirLock
from jax_densevit.training.logging import RunLog
from jax_densevit.training.mesh import replicated
from jax_densevit.training.meter import Meter
from jax_densevit.training.parts import prepare
from jax_densevit.training.preemption import STOPPED, StopRequest
from jax_densevit.training.prefetch import Feed
from jax_densevit.training.processes import check_agreement, check_same_data, differences
from jax_densevit.training.sharding import gather
from jax_densevit.training.state import TrainState
from jax_densevit.training.stored import local_folder

_LOG = logging.getLogger(__name__)

DONE = 0
MOST_IN_A_ROW = 10  # steps that are not finite; then it is no accident any more, whatever `on_not_finite` says


class Diverged(UserError):
    """A loss, gradient or parameter is no longer finite: another learning rate might do."""


def train(experiment: Any, workdir: str | Path, *, quiet: bool = False, strict: bool = False) -> int:
    """Trains until `experiment.steps`, from the newest intact checkpoint in `workdir` if there is one.

    Every process of a multi-process run calls it with the same experiment and the same, shared, workdir.

    Args:
      quiet: print nothing but warnings.
      strict: a damaged newest checkpoint is an error; else the one before is used, with a warning.

    Returns:
      The exit code: 0 when training is done, 75 when it was told to stop and saved its state.

    Raises:
      UserError: a workdir that cannot be used, damaged checkpoints, a loss that is not finite, a full disk, bad data.
    """
    began = time.perf_counter()
    workdir, config, main = local_folder(workdir), experiment.config, jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        if main:
            stack.enter_context(WorkdirLock(workdir))
        keeping = {"keep": config.checkpoint.keep, "best": config.checkpoint.best, "strict": strict}
        checkpoints = stack.enter_context(Checkpoints(workdir, **keeping))
        stop = stack.enter_context(StopRequest())

        # Where to start: the newest intact checkpoint; whatever the log says about later steps is cut.
        meta = json.loads(json.dumps(experiment.meta()))
        check_agreement(meta)
        check_same_data({"train": experiment.source, **{one.name: one.source for one in experiment.evaluators}})
        found = checkpoints.latest_intact()
        start = found or 0
        _check_start(start, experiment.steps, workdir)
        if found is not None:
            _check_same_order(checkpoints.read_data(start), config, workdir)
        settings = {"quiet": quiet, "tensorboard": config.log.tensorboard}
        log = RunLog(workdir, step=start, steps=experiment.steps, main=main, **settings)
        stack.callback(log.close)
        if found is not None:
            checkpoints.set_aside_after(start)
        checkpoints.scores.forget_after(start)
        checkpoints.barrier("log_cut")
        waiting = _due(experiment, start, log.evaluated(start)) if start else []
        if start == experiment.steps and not waiting:
            log.say(f"{workdir} has reached step {start} already: nothing to do. More steps: raise config.steps.")
            return DONE
        if main:
            write_text(workdir / "config.json", json.dumps(meta["config"], indent=1) + "\n")

        # The state: restored, taken over from another run, or fresh.
        feed = Feed(experiment.train_stream(start), experiment.mesh)
        stack.callback(feed.close)
        first = next(feed)
        parts = prepare(experiment, first)
        if found is not None:
            for line in differences(checkpoints.read_meta(start).get("config", {}), meta["config"]):
                log.say(f"The config differs from the checkpoint's: {line}")
            state = checkpoints.restore(start, parts.target)
            log.say(f"Resuming from step {start} of {experiment.steps} in {workdir}")
        else:
            state = parts.fresh()
            if config.init.workdir:
                state, sentence = take_over(state, config.init.workdir, tuple(config.init.leave_out), experiment.info)
                log.say(sentence)
            log.say(f"Training {experiment.steps} steps from the start in {workdir}")
        saved = checkpoints.read_data(start) if found is not None else {}
        meter = Meter(
            step=start,
            steps=experiment.steps,
            batch_size=config.batch_size,
            flops=_step_flops(experiment),
            peak=_total_peak(experiment.mesh),
            state=saved.get("meter"),
            began=began,
        )
        run = _Run(experiment, workdir, checkpoints, log, meter, feed, parts, stop, meta)
        stack.callback(gc.unfreeze)
        with jax.transfer_guard("disallow"):
            code = run.loop(state, start, waiting, first)
        checkpoints.wait()
        if code == STOPPED:
            log.say("Stopped; the state is saved: run the same command again to go on.")
        return code


class _Stopped(Exception):
    """An evaluation was left because the process was told to stop."""


class _Run:
    """One run of the loop: what it needs, so that its pieces have names."""

    def __init__(self, experiment, workdir, checkpoints, log, meter, feed, parts, stop, meta):
        self.experiment, self.workdir, self.meta = experiment, workdir, meta
        self.checkpoints, self.log, self.meter = checkpoints, log, meter
        self.feed, self.parts, self.stop = feed, parts, stop
        self.unread: deque[tuple[int, dict, dict]] = deque()  # batches and numbers of steps, still on the devices
        self.state: TrainState | None = None  # the newest
        self.saved_at = -1
        model = experiment.model

        def apply(variables, *inputs):
            whole = gather(variables["params"], parts.shardings.params)
            return model.apply({**variables, "params": whole}, *inputs, train=False)

        self._apply = jax.jit(apply)
        self._all_finite = jax.jit(_all_finite, out_shardings=replicated(experiment.mesh))

    def loop(self, state: TrainState, step: int, waiting: list[Any], first: dict[str, jax.Array]) -> int:
        """Trains from `step` to the end; `waiting` are evaluators that are due before the first step."""
        experiment, every = self.experiment, self.experiment.config.checkpoint.every
        self.saved_at = step
        if waiting and not self.evaluate(waiting, state, step):
            return STOPPED
        first_step, profiling = step + 1, False
        profile_at, profile_steps = experiment.config.log.profile_at, experiment.config.log.profile_steps
        self.meter.restart_clock(step)
        while step < experiment.steps:
            clock = time.perf_counter()
            batch = first if first is not None else next(self.feed)
            first = None
            arrived = time.perf_counter()
            self.meter.wait(arrived - clock)
            if profile_at and step == profile_at:
                profiling = self._start_profile()
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, numbers = self.parts.step(state, batch)
            step += 1
            self.state = state
            self.unread.append((step, batch, numbers))
            self.read(leave=1)
            if step != first_step:
                self.meter.work(time.perf_counter() - arrived)
            if profiling and step >= profile_at + profile_steps:
                self.read()
                profiling = self._end_profile()
            if step == first_step:  # compiling is over
                self.read()
                self.log.say(f"step {step}: first step done after {time.perf_counter() - clock:.1f} s (compiling)")
                leave_out_of_garbage_collection()
                give_back_freed_memory()
                self.meter.restart_clock(step)
            stopping = self.stop.reached(step)
            due = [] if stopping else _due(experiment, step, set())
            # A step is saved before it is evaluated: being stopped in a long evaluation then costs nothing.
            if stopping or step == experiment.steps or (every and step % every == 0):
                self.save(state, step)
            if stopping:
                return STOPPED
            if due and not self.evaluate(due, state, step):
                return STOPPED
            self.checkpoints.check()
        if profiling:
            self._end_profile()
        return DONE

    def read(self, leave: int = 0) -> None:
        """Reads the numbers of all steps but the `leave` latest (the devices stay busy with those) and logs them."""
        every, steps = self.experiment.config.log.every, self.experiment.steps
        while len(self.unread) > leave:
            step, batch, on_device = self.unread.popleft()
            numbers = {name: value.item() for name, value in jax.device_get(on_device).items()}
            if numbers.pop("finite"):
                self.meter.add(numbers)
            else:
                self._not_finite(step, batch, numbers)
            self.log.progress(step)
            if step % every == 0 or step == steps:
                timing = self.meter.timing(step)
                self.log.train(step, self.meter.numbers(), {**timing, "skipped": self.feed.bad or None})

    def save(self, state: TrainState, step: int) -> None:
        """Saves in the background; never a state that is not finite."""
        self.read()
        if self.saved_at == step:
            return
        if not jax.device_get(self._all_finite(state)):
            raise Diverged(
                f"The parameters are not finite after step {step}, though its loss is; step {step} is not saved. Lower "
                f"optimizer.learning_rate or set optimizer.clip_norm. {self._last_good()}"
            )
        self.log.sync()
        data = {
            "step": step,
            "batch_size": self.experiment.config.batch_size,
            "seed": self.experiment.config.seed,
            "meter": self.meter.state(),
        }
        self.checkpoints.save(step, state, data, {**self.meta, "step": step})
        self.saved_at = step

    def evaluate(self, due: list[Any], state: TrainState, step: int) -> bool:
        """Runs evaluators and keeps the state if it is the best; False when told to stop: the state is saved then."""
        self.read()
        weights = state.ema or {"params": state.params, "statistics": state.statistics}
        variables = {"params": weights["params"]}
        if weights["statistics"]:
            variables["batch_stats"] = weights["statistics"]
        main = jax.process_index() == 0

        def forward(*inputs):
            return self._apply(variables, *inputs)

        def progress(done: int, total: int) -> None:
            # Processes that left an evaluation one by one would wait for each other for ever.
            if jax.process_count() == 1 and self.stop.requested:
                raise _Stopped

        for evaluator in due:
            clock = time.perf_counter()
            try:
                with jax.transfer_guard("allow"):
                    evaluation = evaluate(
                        evaluator.task,
                        forward,
                        evaluator.source,
                        mesh=self.experiment.mesh,
                        batch_size=evaluator.batch_size,
                        limit=evaluator.limit,
                        sheet=evaluator.sheet,
                        progress=progress,
                    )
            except _Stopped:
                self.save(state, step)
                return False
            if main:
                save_evaluation(
                    evaluation, evaluator.task, self.workdir, evaluator.name, step, self._facts(evaluator, state)
                )
            scores = {f"{evaluator.name}/{name}": float(value) for name, value in evaluation.summary.items()}
            best = self.checkpoints.scores.record(step, scores)
            self.log.evaluation(
                step, evaluator.name, evaluation.summary, evaluation.count, round(time.perf_counter() - clock, 3)
            )
            if best:
                self.log.say(f"step {step} is the best so far by {self.checkpoints.scores.score}")
                self.save(state, step)
        give_back_freed_memory()
        self.meter.restart_clock(step)
        return True

    def _facts(self, evaluator: Any, state: TrainState) -> dict[str, Any]:
        """What an evaluation's file says besides the scores."""
        options = self.meta["config"].get("eval", {}).get(evaluator.name, {})
        devices = self.experiment.mesh.devices
        return {
            "data": options.get("data", {"name": evaluator.source.info.name}),
            "weights": "params" if state.ema is None else "ema",
            "versions": self.meta.get("versions", {}),
            "device": f"{devices.size} x {devices.flat[0].device_kind}",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }

    def _not_finite(self, step: int, batch: dict[str, jax.Array], numbers: dict[str, float]) -> None:
        """Raises what is to be said of a step that failed, unless the config says to go on without it."""
        source = self.experiment.source
        values = ", ".join(f"{name} {numbers[name]:.4g}" for name in ("loss", "grad_norm", "lr"))
        in_a_row = self.meter.lose(numbers)
        if self.experiment.config.on_not_finite == "skip" and in_a_row < MOST_IN_A_ROW:
            lost = indices(batch, self.experiment.mesh)  # every process takes part in it
            if jax.process_index() == 0:
                text = "Step %d is not finite (%s) and changes nothing; its examples: %s"
                _LOG.warning(text, step, values, names(source, lost))
            return
        try:
            found = find_culprits(self.parts.step, self.state, batch, self.experiment.mesh)
            what = "it is so for these" if len(found) < len(batch["index"]) else "its examples"
            what = f"{what}: {names(source, found)}"
        except Exception:  # looking for them must not hide what happened
            what = "its examples: ..."
        more = f" It is the {in_a_row}th such step in a row." if in_a_row >= MOST_IN_A_ROW else ""
        raise Diverged(
            f"Step {step} is not finite ({values}); {what}.{more} Look at them, lower "
            f"optimizer.learning_rate or set optimizer.clip_norm. {self._last_good()}"
        )

    def _last_good(self) -> str:
        self.checkpoints.wait()
        steps = self.checkpoints.steps()
        return f"The last saved step is {steps[-1]}." if steps else "Nothing was saved yet."

    def _start_profile(self) -> bool:
        self.read()
        if jax.process_index() == 0:
            jax.profiler.start_trace(str(self.workdir / "profile"))
        return True

    def _end_profile(self) -> bool:
        if jax.process_index() == 0:
            jax.profiler.stop_trace()
            self.log.say(f"Profile written to {self.workdir / 'profile'}")
        return False


def _due(experiment: Any, step: int, done: set[str]) -> list[Any]:
    """The evaluators to run at a step: when their interval says so, and all of them at the end."""
    waiting = [evaluator for evaluator in experiment.evaluators if evaluator.name not in done]
    return [one for one in waiting if step == experiment.steps or (one.every and step % one.every == 0)]


def _all_finite(state: TrainState) -> jax.Array:
    leaves = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


def _step_flops(experiment: Any) -> float | None:
    """Model FLOPs of one step: a multiply-accumulate is two, and the backward pass costs twice the forward one."""
    macs = experiment.macs()
    return None if macs is None else 3 * 2 * float(macs) * experiment.config.batch_size


def _total_peak(mesh: jax.sharding.Mesh) -> float | None:
    peak = peak_flops(mesh.devices.flat[0])
    return None if peak is None else peak * mesh.devices.size


def _check_start(step: int, steps: int, workdir: Path) -> None:
    if step > steps:
        raise UserError(
            f"{workdir} is at step {step}, beyond the {steps} steps of the config: raise config.steps or choose "
            "another --workdir."
        )


def _check_same_order(data: dict[str, Any], config: Any, workdir: Path) -> None:
    """The order of examples follows from seed and batch size: with others, some would be repeated and some left out."""
    for field in ("batch_size", "seed"):
        if field in data and data[field] != config[field]:
            raise UserError(
                f"{workdir} was trained with {field} {data[field]} and config.{field} is {config[field]}: examples "
                f"would be repeated or left out. Set it back, or start anew with config.init.workdir={workdir}."
            )
