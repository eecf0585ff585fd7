"""What a table says about a trained model: losses in evaluation mode, test scores, speed, cost."""

import datetime
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jax_densevit.data.pipeline import evaluation_plan, evaluation_stream
from jax_densevit.experiment import Loaded, build, build_evaluators, load, stream_of, versions
from jax_densevit.models.counts import count_like_paper
from jax_densevit.studies.curves import read_lines
from jax_densevit.timing import Contender, time_in_turn
from jax_densevit.training.evaluation import evaluate, save_evaluation
from jax_densevit.training.mesh import make_mesh

ROUNDS = 5  # of timing


class _Stopped(Exception):
    """The process was told to stop."""


def measure(
    run: Path, test: ConfigDict, *, loss_examples: int, sheet: int, stop: Callable[[], bool]
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Numbers of the best step of a run, on the first device, and examples of the test split for a picture.

    The losses are the training loss's own formula in evaluation mode (no dropout, no auxiliary heads, batch norm with
    its running statistics): over the first `loss_examples` crops of the training order, before flips, which are the
    same for every model, and over the whole validation split.

    Args:
      run: the workdir of a finished training.
      test: the evaluator of the test split, an entry like those of `config.eval`.
      loss_examples: training crops to measure the training loss on.
      sheet: how many examples to give.
      stop: asked now and then whether to leave.

    Returns:
      ({"step", "parameters", "training_loss", "validation_loss", "validation", "test", "baselines", ...}, examples), or
      None when `stop` said so.
    """
    loaded = load(run)
    config = loaded.config.copy_and_resolve_references()
    with config.unlocked():
        config.eval.test = test
    val, tested = build_evaluators(config, loaded.info, ("val", "test"))
    mesh = make_mesh(devices=jax.local_devices()[:1])

    def look(done: int, total: int) -> None:
        if stop():
            raise _Stopped

    try:
        found = evaluate(
            tested.task,
            loaded.forward,
            tested.source,
            mesh=mesh,
            batch_size=tested.batch_size,
            limit=tested.limit,
            sheet=sheet,
            progress=look,
        )
        training_loss = mean_loss(loaded, _training_crops(loaded, loss_examples), stop)
        plan = evaluation_plan(val.source, val.batch_size, val.limit)
        validation_loss = mean_loss(loaded, _unmasked(evaluation_stream(val.source, plan)), stop)
    except _Stopped:
        return None
    facts = {
        "data": test.data.to_dict(),
        "weights": "ema" if config.ema else "params",
        "versions": versions(),
        "device": str(mesh.devices.flat[0].device_kind),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    save_evaluation(found, tested.task, run, "test", loaded.step, facts)
    validation = json.loads((run / "eval" / f"val-{loaded.step}.json").read_text(encoding="utf-8"))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(loaded.variables["params"]))
    result = {
        "kind": config.task.name,
        "step": loaded.step,
        "parameters": int(parameters),
        "parameters_as_published": count_like_paper(loaded.model, _crop(loaded)),
        "loss": _loss_name(config.task),
        "training_loss": training_loss,
        "training_loss_examples": min(loss_examples, config.steps * config.batch_size),
        "validation_loss": validation_loss,
        "validation": validation["summary"],
        "validation_examples": validation["examples"],
        "validation_baselines": validation["baselines"],
        "test": {name: value if math.isfinite(value) else None for name, value in found.summary.items()},
        "test_examples": found.count,
        "baselines": {**found.baselines, **_most_frequent(found.results)},
        "inference_images_per_second": images_per_second(loaded),
        **_clock(run),
        "facts": facts,
    }
    return result, found.examples


def mean_loss(loaded: Loaded, batches: Iterable[dict[str, Any]], stop: Callable[[], bool]) -> float:
    """The loss over batches in evaluation mode, a quotient of totals: batches of any size count by their pixels."""

    @jax.jit
    def add(output, batch):
        (term,) = loaded.task.loss(output, batch).values()  # in evaluation mode there is one head
        return term.sum, term.weight

    totals = []
    for batch in batches:
        if stop():
            raise _Stopped
        output = loaded.forward(*loaded.task.inputs(batch))
        totals.append([float(value) for value in jax.device_get(add(output, batch))])
    sums, weights = zip(*totals, strict=True)
    return math.fsum(sums) / math.fsum(weights)


def images_per_second(loaded: Loaded) -> float:
    """Training crops per second that the model answers on one device, in batches as large as in training."""
    batch_size = loaded.config.batch_size
    image = np.random.default_rng(0).integers(0, 256, (batch_size, *_crop(loaded), 3), np.uint8)
    inputs = jax.block_until_ready(loaded.task.inputs({"image": image}))
    last = [None]

    def call():
        last[0] = loaded.forward(*inputs)

    contender = Contender("model", "forward", call, lambda: jax.block_until_ready(last))
    (seconds,) = time_in_turn([contender], ROUNDS, time.perf_counter)
    return batch_size / statistics.median(seconds)


def _crop(loaded: Loaded) -> tuple[int, int]:
    """(height, width) of what the model was trained on."""
    crop = tuple(loaded.config.data.crop)
    return crop if all(crop) else build(loaded.config).source.size(0)


def _training_crops(loaded: Loaded, count: int) -> Iterable[dict[str, Any]]:
    config = loaded.config
    stream = stream_of(config, build(config).source)
    try:
        for _ in range(max(1, min(config.steps, count // config.batch_size))):
            yield _arrays(next(stream))
    finally:
        stream.close()


def _unmasked(batches: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    """Without the rows that only fill up a batch."""
    for batch in batches:
        mask = np.asarray(batch["mask"])
        yield {name: value[mask] for name, value in _arrays(batch).items()}


def _arrays(batch: dict[str, Any]) -> dict[str, Any]:
    """What a loss looks at: not the numbers and masks of examples."""
    return {name: batch[name] for name in ("image", "labels", "size") if name in batch}


def _clock(run: Path) -> dict[str, float]:
    """Seconds of the steps, without compiling and evaluating, and images per second, over however many sittings."""
    seconds, before, rates = 0.0, 0, []
    for line in read_lines(run / "timings.jsonl"):
        if "step_seconds" in line:
            seconds += line["step_seconds"] * (line["step"] - before)
            before = line["step"]
            rates.append(line["images_per_second"])
    return {"training_seconds": seconds, "training_images_per_second": statistics.median(rates) if rates else 0.0}


def _most_frequent(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of labels: the scores of answering everywhere with the class that is the most frequent in this split."""
    if "segmentation" not in results:
        return {}
    pixels = [row["pixels"] for row in results["segmentation"]["per_class"]]
    share = max(pixels) / max(1, sum(pixels))
    # Classes that are neither labelled nor predicted have no IoU.
    return {
        "most frequent class": {"mIoU": share / max(1, sum(count > 0 for count in pixels)), "pixel_accuracy": share}
    }


def _loss_name(task: ConfigDict) -> str:
    default = {"segmentation": "cross_entropy", "colorization": "charbonnier"}[task.name]
    return task.get("loss_function", default)
