"""What a study is, from its config: its fields, what may differ between models, and every run as an ordinary config.

A study's config has tasks, each an experiment's config without a model, and models, each with nothing but its options.
Whatever else decides about a score (crops, order of examples, batch, optimizer, schedule, budget) belongs to the task
and so is the same for all models; the learning rate alone is found for each of them.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

from ml_collections import ConfigDict

from jax_densevit.configuration import check_config, check_keys, read_config
from jax_densevit.errors import UserError, check_name, did_you_mean
from jax_densevit.experiment import build
from jax_densevit.models import create_model

BUDGETS = ("steps", "flops")
FORMS = ("segmentation", "colorization")  # tasks that have a table in a report

# Fields that take an object's own options, as in an experiment's config: see `configuration.read_config`.
_OPEN = re.compile(
    r"^(tasks\.[^.]+\.(task|data\.train|eval\.[^.]+\.data|eval\.[^.]+\.decode)"
    r"|models\.[^.]+\.model|models\.[^.]+\.per_task\.[^.]+\.(model|task))(\.|$)"
)


def default_study() -> ConfigDict:
    """Every field of a study with its default."""
    return ConfigDict(
        {
            # Experiments by name, each `configuration.default_config()` without a model: `task`, `data`, `steps`,
            # `optimizer`, ..., with the evaluators "val", which decides, and "test", which is measured once at the end.
            "tasks": ConfigDict({}, sort_keys=False),
            # Models by name, each `default_model()`; tables have them in the order in which they were entered.
            "models": ConfigDict({}, sort_keys=False),
            # What is the same for all models of a task: "steps", its `steps`; or "flops", that of the first model in
            # these steps, or `flops` if above 0: costly models then train for fewer steps.
            "budget": "steps",
            "flops": 0.0,
            # Rates that every model tries for `probe` of its steps, with the schedule shrunk to them; what is best on
            # "val" trains in full. One rate alone needs no probe.
            "learning_rates": (3e-4, 1e-3, 3e-3),
            "probe": 0.15,
            "evaluations": 10,  # on "val" in a full run, evenly spaced; the best one is kept
            "loss_examples": 512,  # training crops on which the training loss is measured at the end
            "sheet": 4,  # rows of the picture of all models
        }
    )


def default_model() -> ConfigDict:
    """The fields of one entry of `models`."""
    return ConfigDict(
        {
            "title": "",  # in tables and pictures; empty takes the entry's name
            "model": {"name": ""},  # + the options of that model
            # Further options for one kind of task: {"colorization": {"model": {...}, "task": {...}}}.
            "per_task": {},
        }
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """One model on one task.

    Attributes:
      task, model: the names of the two entries, and of the folders.
      title: of the model.
      config: of its full run, but for the learning rate.
      test: the evaluator that is run once, at the end.
      rates: to be probed.
      probe_steps: steps of a probe; 0 where a single rate needs none.
      macs: multiply-accumulates of a forward pass of one training crop.
    """

    task: str
    model: str
    title: str
    config: ConfigDict
    test: ConfigDict
    rates: tuple[float, ...]
    probe_steps: int
    macs: int

    @property
    def flops(self) -> float:
        """Of the full run: two per multiply-accumulate, forward once and backward twice."""
        return 6.0 * self.macs * self.config.batch_size * self.config.steps

    def run(self, rate: float) -> ConfigDict:
        """The config of the full run."""
        config = self.config.copy_and_resolve_references()
        config.optimizer.learning_rate = rate
        return config

    def probe(self, rate: float) -> ConfigDict:
        """The config of a short run that only shows how good a rate is: evaluated and saved once."""
        config = self.run(rate)
        _shorten(config, self.probe_steps)
        config.eval.val.every = 0
        config.eval.val.sheet = 0
        config.checkpoint.every = 0
        return config


def read_study(path: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """Reads the config of a study, as `configuration.read_config` does that of an experiment."""
    return read_config(path, overrides, check=check_study, open_sections=_OPEN)


def check_study(study: ConfigDict) -> None:
    """Raises :class:`UserError` for a key no section knows, a model or option that is not there, a wrong value."""
    for name, field in (("tasks", "task"), ("models", "model")):
        if not study.get(name):
            raise UserError(f"A study needs at least one {field}: config.{name} is empty.")
    check_keys(study, default_study(), open_sections=re.compile(r"^(tasks|models)(\.|$)"))
    for name, task in study.tasks.items():
        where = f"config.tasks.{name}"
        if task.model.name:
            raise UserError(f"{where}.model.name is {task.model.name!r}: models belong into config.models.")
        check_config(task, where)
        check_name("table for a task", task.task.name, FORMS)
        for evaluator in ("val", "test"):
            if evaluator not in task.eval:
                raise UserError(f"{where}.eval has no evaluator {evaluator!r}: a study needs val and test.")
        if task.checkpoint.best.removeprefix("-").partition("/")[0] != "val":
            raise UserError(f"{where}.checkpoint.best={task.checkpoint.best!r} must be a score of val, e.g. val/mIoU.")
        if task.steps is None:
            raise UserError(f"{where}.steps is not set: a study counts in steps, not in epochs.")
        if task.ema and not 0 < task.ema < 1:
            raise UserError(f"{where}.ema={task.ema} must be between 0 and 1.")
    for name, model in study.models.items():
        where = f"config.models.{name}"
        check_keys(model, default_model(), open_sections=re.compile(r"^(model|per_task)(\.|$)"), where=where)
        for kind, more in model.per_task.items():
            if kind not in FORMS:
                raise UserError(f"{where}.per_task has a task {kind!r}{did_you_mean(kind, FORMS)}")
            parts = ConfigDict({"model": {}, "task": {}})
            check_keys(more, parts, open_sections=re.compile(r"^(model|task)\."), where=f"{where}.per_task.{kind}")
        if not model.model.get("name"):
            raise UserError(f"{where}.model.name is empty; `python -m jax_densevit.models` lists models.")
        for kind in FORMS:
            create_model(**_model_options(model, kind))
    check_name("budget of a study", study.budget, BUDGETS)
    rates = tuple(study.learning_rates)
    if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
        raise UserError(f"config.learning_rates={rates} must be different rates above 0.")
    if len(rates) > 1 and not 0 < study.probe <= 1:
        raise UserError(f"config.probe={study.probe} must be a share of the steps: above 0, at most 1.")
    if study.evaluations < 1 or study.loss_examples < 1 or study.sheet < 1:
        raise UserError("config.evaluations, config.loss_examples and config.sheet must be at least 1.")
    if study.flops < 0 or (study.flops and study.budget != "flops"):
        raise UserError(f"config.flops={study.flops} needs config.budget='flops', and must not be negative.")


def make_plans(study: ConfigDict) -> list[Plan]:
    """Every model on every task, in the order of the config; what is missing of data and models is said now.

    Raises:
      UserError: as `experiment.build` does, and a budget too small for a model.
    """
    plans = []
    for name, task in study.tasks.items():
        budget = study.flops
        for key, model in study.models.items():
            config = _config(task, model)
            macs = build(config).macs()
            per_step = 6.0 * macs * config.batch_size
            budget = budget or per_step * config.steps  # the first model's
            if study.budget == "flops":
                steps = round(budget / per_step)
                if steps < 1:
                    raise UserError(f"A budget of {budget:.3g} FLOPs is no step of {key}, which has {per_step:.3g}.")
                _shorten(config, steps)
            rates = tuple(float(rate) for rate in study.learning_rates)
            config.eval.val.every = math.ceil(config.steps / study.evaluations)
            plans.append(
                Plan(
                    task=name,
                    model=key,
                    title=model.title or key,
                    config=config,
                    test=task.copy_and_resolve_references().eval.test,
                    rates=rates,
                    probe_steps=max(1, round(config.steps * study.probe)) if len(rates) > 1 else 0,
                    macs=macs,
                )
            )
    return plans


def _config(task: ConfigDict, model: ConfigDict) -> ConfigDict:
    """The experiment of one model on one task."""
    config = task.copy_and_resolve_references()
    more = model.per_task.get(task.task.name, ConfigDict())
    with config.unlocked():
        config.model = ConfigDict(_model_options(model, task.task.name))
        config.task.update(more.get("task", {}))
        config.eval = ConfigDict({"val": config.eval.val})
    return config


def _model_options(model: ConfigDict, kind: str) -> dict:
    more = model.per_task.get(kind, ConfigDict())
    return {**model.model.to_dict(), **more.get("model", ConfigDict()).to_dict()}


def _shorten(config: ConfigDict, steps: int) -> None:
    """Another number of steps with the same form of schedule: warm-up and pieces keep their share."""
    scale = steps / config.steps
    optimizer = config.optimizer
    optimizer.warmup_steps = min(round(optimizer.warmup_steps * scale), steps - 1)
    optimizer.boundaries = tuple(max(1, round(step * scale)) for step in optimizer.boundaries)
    config.steps = steps
    config.log.every = max(1, min(config.log.every, steps))
