"""Running a study: probes, the full run with the best rate, one measurement on the test split; nothing is done twice.

DIR/<task>/<model>/probe_<rate>/    a short run per learning rate; `probe.json` once it is done
DIR/<task>/<model>/run/             the full run: a workdir like any other
DIR/<task>/<model>/result.json      what the report needs, once everything is done; `examples.npz` for its pictures
"""

import json
import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jax_densevit.errors import UserError
from jax_densevit.experiment import build
from jax_densevit.studies.measure import measure
from jax_densevit.studies.plan import Plan
from jax_densevit.training.best import BestScores
from jax_densevit.training.lock import WorkdirLock
from jax_densevit.training.preemption import STOPPED, StopRequest
from jax_densevit.training.processes import differences
from jax_densevit.training.trainer import DONE, Diverged, train
from jax_densevit.writing import whole_file, write_json

log = logging.getLogger(__name__)


def run_study(
    plans: list[Plan],
    workdir: Path,
    *,
    say: Callable[[str], None],
    finished: Callable[[], None],
    loss_examples: int,
    sheet: int,
    quiet: bool = False,
) -> int:
    """Does what is not done yet of every plan, in order.

    Args:
      plans: from :func:`~jax_densevit.studies.plan.make_plans`.
      workdir: the folder of the study.
      say: told a line about what begins.
      finished: called after every model: the report can be written anew.
      loss_examples, sheet: see :func:`~jax_densevit.studies.plan.default_study`.
      quiet: the runs print nothing.

    Returns:
      0, or 75 when the process was told to stop: the same command goes on.

    Raises:
      UserError: what is in the folder was made with another config, every rate of a model diverges, or whatever the
        trainer finds wrong.
    """
    with WorkdirLock(workdir), StopRequest() as stop:
        for plan in plans:  # before hours go by
            _check_same(plan, workdir / plan.task / plan.model)
        for number, plan in enumerate(plans, start=1):
            folder = workdir / plan.task / plan.model
            if read_result(folder) is None:
                label = f"[{number}/{len(plans)}] {plan.task}: {plan.title}"
                code = _finish(plan, folder, label, stop, say, loss_examples, sheet, quiet)
                if code != DONE:
                    return code
                finished()
    return DONE


def read_result(folder: Path) -> dict[str, Any] | None:
    """What is in `result.json`; None where the model is not done."""
    path = folder / "result.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def read_examples(folder: Path) -> list[dict[str, Any]]:
    """The examples for the picture, as `evaluation.evaluate` gave them: arrays, and "name"."""
    with np.load(folder / "examples.npz", allow_pickle=False) as arrays:
        examples: dict[int, dict[str, Any]] = {}
        for key, value in arrays.items():
            row, _, name = key.partition("/")
            examples.setdefault(int(row), {})[name] = str(value) if name == "name" else value
    return [examples[row] for row in sorted(examples)]


def probe_folder(folder: Path, rate: float) -> Path:
    """Where a rate is probed."""
    return folder / f"probe_{rate:g}"


def _finish(
    plan: Plan, folder: Path, label: str, stop: StopRequest, say: Callable, loss_examples: int, sheet: int, quiet: bool
) -> int:
    probes = []
    for rate in plan.rates if plan.probe_steps else ():
        if stop.requested:
            return STOPPED
        found = _probe(plan, rate, probe_folder(folder, rate), label, say, quiet)
        if found is None:
            return STOPPED
        probes.append(found)
    rate = best_rate(probes, plan.config.checkpoint.best) if probes else plan.rates[0]
    if rate is None:
        tried = ", ".join(f"{rate:g}" for rate in plan.rates)
        raise UserError(f"{label}: every learning rate diverges ({tried}): give lower ones in config.learning_rates.")
    run = folder / "run"
    began = _begun(run)
    if began is not None and began["optimizer"]["learning_rate"] != rate:
        raise UserError(
            f"{run} was begun with learning rate {began['optimizer']['learning_rate']:g}, and of the rates now probed "
            f"{rate:g} is the best: remove {run} to train with that."
        )
    say(f"{label}, {plan.config.steps} steps with learning rate {rate:g} in {run}")
    code = train(build(plan.run(rate)), run, quiet=quiet)
    if code != DONE or stop.requested:
        return STOPPED
    say(f"{label}, measuring the best step")
    measured = measure(run, plan.test, loss_examples=loss_examples, sheet=sheet, stop=lambda: stop.requested)
    if measured is None:
        return STOPPED
    result, examples = measured
    arrays = {f"{row}/{name}": value for row, example in enumerate(examples) for name, value in example.items()}
    with whole_file(folder / "examples.npz") as part:
        np.savez_compressed(part, **arrays)
    facts = {
        "task": plan.task,
        "model": plan.model,
        "title": plan.title,
        "learning_rate": rate,
        "steps": plan.config.steps,
        "batch_size": plan.config.batch_size,
        "gmacs": plan.macs / 1e9,
        "training_flops": plan.flops,
        "learning_rates": list(plan.rates),
        "probe_steps": plan.probe_steps,
        "probes": probes,
    }
    write_json(
        folder / "result.json", {**facts, **result, "config": _plain(plan.config), "test_config": _plain(plan.test)}
    )
    return DONE


def best_rate(probes: list[dict[str, Any]], best: str) -> float | None:
    """The rate with the best score; the lower of two equal ones; None where all diverged."""
    sign = -1 if best.startswith("-") else 1
    scored = [(sign * probe["score"], -probe["learning_rate"]) for probe in probes if probe["score"] is not None]
    return -max(scored)[1] if scored else None


def _probe(plan: Plan, rate: float, folder: Path, label: str, say: Callable, quiet: bool) -> dict[str, Any] | None:
    """{"learning_rate", "score" (None: diverged), ...} of a rate; None when told to stop."""
    file = folder / "probe.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))["probe"]
    config = plan.probe(rate)
    say(f"{label}, probe of learning rate {rate:g}: {config.steps} steps")
    score = None
    try:
        if train(build(config), folder, quiet=quiet) != DONE:
            return None
        record = BestScores(folder, config.checkpoint.best).latest()
        score = record["value"] if record and math.isfinite(record["value"]) else None
    except Diverged as error:
        say(f"{label}, learning rate {rate:g} diverges: {error}")
    probe = {"learning_rate": rate, "score": score, "steps": config.steps}
    write_json(file, {"probe": probe, "config": _plain(config)})
    # A probe has said what it was for: its parameters, a gigabyte for the largest models, are not kept.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return probe


def _check_same(plan: Plan, folder: Path) -> None:
    """Raises :class:`UserError` where a folder holds results of another config."""
    parts = {"config": _plain(plan.config), "test_config": _plain(plan.test), "learning_rates": list(plan.rates)}
    planned = {"result.json": parts}
    if plan.probe_steps:
        for rate in plan.rates:
            planned[f"{probe_folder(folder, rate).name}/probe.json"] = {"config": _plain(plan.probe(rate))}
    for name, parts in planned.items():
        file = folder / name
        if not file.is_file():
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        for key, value in parts.items():
            if lines := differences(found.get(key), value, key):
                raise UserError(
                    f"{file} was made with another config ({'; '.join(lines[:3])}): choose another --workdir, or "
                    f"remove {folder} to run this model again."
                )
    before = _begun(folder / "run")
    if before is not None:
        now = _plain(plan.config)
        now["optimizer"]["learning_rate"] = before["optimizer"]["learning_rate"]
        if lines := differences(before, now):
            raise UserError(
                f"{folder / 'run'} was begun with another config ({'; '.join(lines[:3])}): choose another --workdir, "
                f"or remove {folder} to run this model again."
            )


def _begun(run: Path) -> dict[str, Any] | None:
    """The config that a full run was begun with; None where it was not."""
    path = run / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _plain(config: ConfigDict) -> Any:
    return json.loads(json.dumps(config.to_dict()))
