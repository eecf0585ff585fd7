"""Where a config becomes objects: source, model, task, optimizer, mesh, evaluators. And a workdir a model again.

`build(config)` is what training starts from; `load(workdir)` is what evaluation, prediction and users start from: it
needs nothing but the checkpoint, neither the data set nor the config file.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

import jax_densevit
from jax_densevit.configuration import check_config, config_from_json
from jax_densevit.data.augment import augment as augment_batch
from jax_densevit.data.augment import normalise
from jax_densevit.data.pipeline import TrainStream, train_stream
from jax_densevit.data.source import DataInfo, Source
from jax_densevit.data.sources import create_source
from jax_densevit.errors import UserError, did_you_mean
from jax_densevit.models import create_model
from jax_densevit.models.registry import find_model
from jax_densevit.tasks import create_task
from jax_densevit.tasks.task import Task
from jax_densevit.training.checkpoint import Checkpoints
from jax_densevit.training.mesh import check_batch_size, make_mesh, replicated
from jax_densevit.training.optimizer import make_optimizer

_VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "pillow")


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """One entry of `config.eval`: a source, a task with this evaluator's decoding, and when to run."""

    name: str
    source: Source
    task: Task
    every: int
    batch_size: int
    limit: int
    sheet: int


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that training needs, built from one config.

    Attributes:
      config: the resolved config.
      info: facts about the training data (classes, palette, normalisation).
      source: the training source.
      model: the Flax module.
      task: loss, decoding, metrics.
      mesh: devices as ("data", "fsdp", "tensor").
      steps: number of optimizer steps.
      evaluators: in the order of the config.
      augment: batch -> batch on the device, or None.
    """

    config: ConfigDict
    info: DataInfo
    source: Source
    model: Any
    task: Task
    mesh: Mesh
    steps: int
    evaluators: tuple[Evaluator, ...]
    augment: Callable[[dict], dict] | None

    def make_optimizer(self, params):
        """(optax transformation, schedule) for a parameter tree (arrays or shapes)."""
        return make_optimizer(self.config.optimizer, params, self.steps)

    def train_stream(self, start_step: int) -> Iterator[dict]:
        """This host's rows of every global training batch from `start_step` on."""
        return stream_of(self.config, self.source, start_step)

    def macs(self) -> int:
        """Multiply-accumulates of one forward pass of one training image, counted analytically.

        A task whose model does not see the whole training image, or does less in training, says so by a method
        `training_macs`, which gets the model's count as a function of (height, width).
        """
        count = functools.partial(find_model(self.config.model.name).macs, self.model)
        if hasattr(self.task, "training_macs"):
            return self.task.training_macs(count)
        size = tuple(self.config.data.crop)
        return count(size if all(size) else self.source.size(0))

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says about itself: config, data, versions. JSON-ready."""
        return {
            "config": self.config.to_dict(),
            "info": self.info.to_json(),
            "model_options": model_options(self.config, self.task),
            "versions": versions(),
        }


def stream_of(config: ConfigDict, source: Source, start_step: int = 0) -> TrainStream:
    """This host's rows of every global batch that the config trains on, from `start_step` on."""
    data = config.data
    return train_stream(
        source,
        batch_size=config.batch_size,
        seed=config.seed,
        crop=tuple(data.crop),
        resize_box=tuple(data.resize_box),
        resize_ratio=tuple(data.resize_ratio),
        largest_crop=data.largest_crop,
        max_class_ratio=data.max_class_ratio,
        on_bad=data.on_bad,
        threads=data.threads,
        start_step=start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model, ready to use: `loaded.forward(*loaded.inputs(images))`, or `task.decode(loaded.forward, batch)`.

    Attributes:
      model: the Flax module.
      variables: {"params": ..., "batch_stats": ...} (the moving average of the parameters where one was kept).
      task: decoding, metrics and pictures; None for a weight file that was loaded without a config.
      info: facts about the data it was trained on.
      config: the config it was trained with; None as above.
      step: the step it was saved at; 0 for a weight file.
      forward: jitted `forward(*inputs) -> output` in evaluation mode, parameters bound.
    """

    model: Any
    variables: dict[str, Any]
    task: Task | None
    info: DataInfo
    config: ConfigDict | None
    step: int
    forward: Callable[..., Any]

    def inputs(self, images: Any) -> tuple[Any, ...]:
        """What the model is called with, from images uint8 `[B, H, W, 3]`: normalised, or made gray, as in training."""
        if self.task is None:
            return (normalise(jnp.asarray(images), self.info.mean, self.info.std),)
        return self.task.inputs({"image": jnp.asarray(images)})


def versions() -> dict[str, str]:
    """Versions of what computes, and the git commit when run from a checkout."""
    found = {name: importlib.metadata.version(name) for name in _VERSIONED}
    found |= {"jax_densevit": jax_densevit.__version__, "python": platform.python_version()}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["libtpu"] = importlib.metadata.version("libtpu")
    unpacked = Path(__file__).parents[1] / "COMMIT"
    if unpacked.is_file():  # a host that got an archive of a commit: see launch/
        return found | {"commit": unpacked.read_text(encoding="utf-8").strip()}
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
        found["commit"] = commit.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass  # installed from a wheel, or no git: the version says it
    return found


def build(config: ConfigDict, devices: list | None = None) -> Experiment:
    """Builds an experiment on `devices` (all of them by default).

    Raises:
      UserError: a name or option that does not exist, data that cannot be found, a mesh that does not fit.
    """
    check_config(config)
    source = _source(config.data.train, "data.train")
    info = source.info
    task = make_task(config, info)
    mesh = make_mesh(**config.mesh.to_dict(), devices=devices)
    check_batch_size(config.batch_size, mesh, config.accumulate)
    steps = config.steps
    if steps is None:
        steps = math.ceil(config.epochs * len(source) / config.batch_size)
    data = config.data
    augment = None
    if data.flip or data.vertical_flip or data.rotate90 or data.photometric:

        def augment(batch):
            return augment_batch(
                batch,
                flip=data.flip,
                vertical_flip=data.vertical_flip,
                rotate90=data.rotate90,
                photometric=data.photometric,
            )

    return Experiment(
        config=config,
        info=info,
        source=source,
        model=create_model(**model_options(config, task)),
        task=task,
        mesh=mesh,
        steps=steps,
        evaluators=build_evaluators(config, info),
        augment=augment,
    )


def build_evaluators(config: ConfigDict, info: DataInfo, names: tuple[str, ...] | None = None) -> tuple[Evaluator, ...]:
    """The evaluators of a config (or those named), each with its own source and decoding."""
    for name in names or ():
        if name not in config.eval:
            raise UserError(f"The config has no evaluator {name!r}{did_you_mean(name, config.eval)}")
    evaluators = []
    for name in names or tuple(config.eval):
        options = config.eval[name]
        source = _source(options.data, f"eval.{name}.data")
        if source.info.classes != info.classes:
            raise UserError(
                f"config.eval.{name}.data has the classes {source.info.classes}, but training has {info.classes}."
            )
        if source.info.stretch != info.stretch:
            raise UserError(
                f"config.eval.{name}.data has images stretched between the percentiles {source.info.stretch}, but "
                f"training {info.stretch}: give both data sources the same stretch."
            )
        evaluators.append(
            Evaluator(
                name=name,
                source=source,
                task=make_task(config, info, options.decode.to_dict()),
                every=options.every,
                batch_size=options.batch_size or config.batch_size,
                limit=options.limit,
                sheet=options.sheet,
            )
        )
    return tuple(evaluators)


def load(
    workdir: str | Path,
    step: int | None = None,
    which: str = "best",
    decode: dict | None = None,
    mesh: Mesh | None = None,
) -> Loaded:
    """Loads a trained model from its workdir, on whatever devices are here.

    Args:
      workdir: the folder that training wrote.
      step: the step to load; None takes the best one where the config named a score, else the latest.
      which: "best" prefers the moving average of the parameters where one was kept; "ema" or "params" insist.
      decode: overrides of the task's decoding options, e.g. `{"mode": "slide", "flip": True}`.
      mesh: where the parameters go, a copy on every device; None takes the first device alone.

    Raises:
      UserError: no intact checkpoint there (never returns random weights).
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    step = checkpoints.preferred_step() if step is None else step
    meta = checkpoints.read_meta(step)
    if missing := [name for name in ("config", "info", "model_options") if name not in meta]:
        raise UserError(
            f"The checkpoint of step {step} in {workdir} does not say its {missing[0]}: not written by train."
        )
    config = config_from_json(meta["config"])
    info = DataInfo.from_json(meta["info"])
    task = make_task(config, info, decode)
    model = create_model(**meta["model_options"])
    if which == "best":
        which = "ema" if (checkpoints.folder / str(step) / "ema").is_dir() else "params"
    return make_ready(model, checkpoints.restore_variables(step, which), task, info, config, step, mesh)


def make_ready(
    model: Any,
    variables: dict[str, Any],
    task: Task | None,
    info: DataInfo,
    config: ConfigDict | None,
    step: int,
    mesh: Mesh | None = None,
) -> Loaded:
    """A model with its variables on the devices of `mesh` (the first device where there is none), ready to use."""
    place = replicated(mesh) if mesh is not None else jax.local_devices()[0]
    variables = jax.device_put(variables, place)
    apply = jax.jit(lambda variables, *inputs: model.apply(variables, *inputs, train=False))

    def forward(*inputs):
        return apply(variables, *inputs)

    return Loaded(model, variables, task, info, config, step, forward)


def _source(options: ConfigDict, where: str) -> Source:
    options = options.to_dict()
    name = options.pop("name")
    if not name:
        raise UserError(f"config.{where}.name is empty: name a data source there, e.g. 'digit_scenes'.")
    source = create_source(name, **options)
    if not len(source):
        raise UserError(f"config.{where} ({name}) is empty: it has no example.")
    return source


def make_task(config: ConfigDict, info: DataInfo, decode: dict | None = None) -> Task:
    """The config's task for data described by `info`; `decode` overrides options."""
    options = {**config.task.to_dict(), **(decode or {})}
    return create_task(options.pop("name"), info, **options)


def model_options(config: ConfigDict, task: Task) -> dict[str, Any]:
    """What `create_model` gets: the config's options, and the task's number of outputs where the model has classes."""
    options = config.model.to_dict()
    if not options["name"]:
        raise UserError("config.model.name is empty: name a model there; `python -m jax_densevit.models` lists them.")
    if "num_classes" in find_model(options["name"]).options:
        options.setdefault("num_classes", task.num_outputs)
    return options
