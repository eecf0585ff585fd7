"""Evaluation: every example of a source exactly once, decoded, measured on the devices, summed up on the host.

Knows the contract of a task and no task by name. Runs the same program on every host; all of them get the results.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_densevit.data.order import host_rows
from jax_densevit.data.pipeline import evaluation_plan, evaluation_stream
from jax_densevit.data.source import Source
from jax_densevit.tasks.rooms import cut, give_room
from jax_densevit.tasks.task import Task
from jax_densevit.training.mesh import batch_shards, put_batch, replicated
from jax_densevit.writing import write_json, write_picture

EXACT_SIZES = 8  # for more sizes of pictures than this, arrays get some room, so that few shapes are compiled


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
      results: per metric, what its `compute` returned: JSON-ready.
      summary: the few numbers for a line on the screen, the first being 'the' score.
      baselines: the same numbers of trivial answers, by name.
      examples: for the picture sheet: "image", "labels", ..., "name" of an example, predictions as "predicted_<name>".
      count: how many examples were measured: all of them.
    """

    results: dict[str, dict[str, Any]]
    summary: dict[str, float]
    baselines: dict[str, dict[str, float]]
    examples: list[dict[str, Any]]
    count: int


def evaluate(
    task: Task,
    forward: Callable[..., Any],
    source: Source,
    *,
    mesh: Mesh,
    batch_size: int,
    limit: int = 0,
    sheet: int = 6,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Decodes and measures every example of `source`.

    Batches hold images of one size and are filled up with masked rows, so every number is that of the whole set
    whatever the batch size and the number of devices and hosts.

    Args:
      task: decodes, measures, sums up.
      forward: jitted model in evaluation mode, parameters bound; takes `task.inputs`.
      source: what to evaluate.
      mesh: batches are laid over it.
      batch_size: of all devices together; rounded up to a multiple of their number.
      limit: only the first so many examples; 0 = all.
      sheet: how many examples, spread evenly over the set, to keep for the picture sheet.
      threads: that read and decode; 0 = one per core.
      progress: called with (examples done, examples in all) after every batch.

    Raises:
      UserError: no examples, an unreadable file, labels that are no class.
    """
    shards = batch_shards(mesh)
    plan = evaluation_plan(source, -(-batch_size // shards) * shards, limit)
    total = sum(index >= 0 for planned in plan for index in planned.indices)
    shown = set(np.linspace(0, total - 1, min(sheet, total)).round().astype(int).tolist())
    roomy = len({planned.size for planned in plan}) > EXACT_SIZES
    processes = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    stream = evaluation_stream(source, plan, threads=threads, **processes)
    # Which row of the plan lies where: a mesh that follows the machine's wires need not have the hosts in their order.
    own = host_rows(len(plan[0].indices), **processes)
    numbers = np.arange(own.start, own.stop, dtype=np.int32)
    metrics, measure = task.metrics(), _measure(task, mesh)
    states = {name: metric.empty() for name, metric in metrics.items()}
    count, examples, pending = 0, {}, None

    def take(measured):
        nonlocal count, states
        counts, seen = jax.device_get(measured)
        states = {name: metric.merge(states[name], counts[name]) for name, metric in metrics.items()}
        count += int(seen)
        if progress is not None:
            progress(count, total)

    # Decoding feeds small host arrays to jitted pieces; a training loop may have forbidden that for itself.
    with jax.transfer_guard("allow"):
        for planned, rows in zip(plan, stream, strict=True):
            if roomy:
                rows = give_room(rows, {"labels": source.info.ignore})
            size = {"size": rows.pop("size")} if roomy else {}
            batch = {**put_batch({**rows, "row": numbers}, mesh), **size}
            where = batch.pop("row")
            predictions = task.decode(forward, batch)
            measured = measure(predictions, batch)
            for row, index in enumerate(planned.indices):
                if index in shown:
                    fetched = jax.device_get(_row(mesh)(predictions, where, row))
                    fetched = cut(fetched, batch["image"].shape[1:3], planned.size)
                    examples[index] = {f"predicted_{name}": value for name, value in fetched.items()}
            if pending is not None:  # read one batch late: the devices never wait for the host
                take(pending)
            pending = measured
        take(pending)
    if count != total:
        raise RuntimeError(f"{count} examples were measured where the source has {total}")
    results = {name: metric.compute(states[name]) for name, metric in metrics.items()}
    shown_examples = [_example(source, i, examples[i]) for i in sorted(examples)]
    return Evaluation(results, task.summary(results), task.baselines(results), shown_examples, count)


def save_evaluation(
    evaluation: Evaluation, task: Task, workdir: str | Path, name: str, step: int, facts: dict[str, Any]
) -> list[Path]:
    """Writes `eval/<name>-<step>.json`, `..._sheet.png` and the task's charts below `workdir`; returns their paths.

    Files appear whole or not at all, the JSON last. Call it on one host.

    Args:
      evaluation, task: what was found and by whom.
      workdir: of the run.
      name: of the evaluator.
      step: of the checkpoint.
      facts: what else belongs into the JSON: data, versions, date.
    """
    stem = Path(workdir) / "eval" / f"{name}-{step}"
    pictures = dict(task.charts(evaluation.results))
    if evaluation.examples:
        pictures = {"sheet": task.sheet(evaluation.examples), **pictures}
    paths = []
    for kind, picture in pictures.items():
        path = stem.with_name(f"{stem.name}_{kind}.png")
        write_picture(path, picture)
        paths.append(path)
    values = {
        "evaluator": name,
        "step": int(step),
        "examples": evaluation.count,
        "summary": _json_ready(evaluation.summary),
        "baselines": {kind: _json_ready(numbers) for kind, numbers in evaluation.baselines.items()},
        "protocol": task.protocol(),
        **facts,
        **evaluation.results,
    }
    return [write_json(stem.with_name(f"{stem.name}.json"), values), *paths]


@functools.lru_cache(maxsize=64)
def _measure(task: Task, mesh: Mesh) -> Callable:
    """The jitted measurement, kept: a training run evaluates many times."""

    def measure(predictions, batch):
        return task.measure(predictions, batch), jnp.sum(batch["mask"], dtype=jnp.int32)

    return jax.jit(measure, out_shardings=replicated(mesh))


@functools.lru_cache(maxsize=8)
def _row(mesh: Mesh) -> Callable:
    """One row of every array, whole on every host."""

    def one(arrays, rows, row):
        place = jnp.argmax(rows == row)
        return jax.tree.map(lambda array: array[place], arrays)

    return jax.jit(one, out_shardings=replicated(mesh))


def _json_ready(numbers: dict[str, float]) -> dict[str, float | None]:
    return {key: value if np.isfinite(value) else None for key, value in numbers.items()}


def _example(source: Source, index: int, predicted: dict[str, np.ndarray]) -> dict[str, Any]:
    example = dict(source.read(index))
    return {"name": example.pop("id"), **example, **predicted}
