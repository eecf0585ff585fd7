"""From an experiment to what is compiled: optimizer, shapes and places of the state, the training step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jax_densevit.training.mesh import batch_sharding
from jax_densevit.training.optimizer import trainable_parameters
from jax_densevit.training.state import TrainState, abstract_parameters, abstract_state, init_state, state_shardings
from jax_densevit.training.step import Step, make_train_step


@dataclasses.dataclass(frozen=True)
class Parts:
    """What is compiled, and what the state looks like.

    Attributes:
      abstract, shardings: shapes and places of the state.
      step: the training step.
      fresh: makes the state of step 0.
    """

    abstract: TrainState
    shardings: TrainState
    step: Step
    fresh: Callable[[], TrainState]

    @property
    def target(self) -> TrainState:
        """Shapes with shardings, for a typed restore."""
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            self.abstract,
            self.shardings,
        )


def prepare(experiment: Any, batch: dict[str, Any]) -> Parts:
    """Optimizer, state shapes, shardings and step of an experiment for global batches like `batch` (or its shapes)."""
    config, model, task, mesh = experiment.config, experiment.model, experiment.task, experiment.mesh
    shapes = {
        name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=batch_sharding(mesh))
        for name, value in batch.items()
    }
    if experiment.augment is not None:
        shapes_in = jax.eval_shape(experiment.augment, shapes)
    else:
        shapes_in = shapes
    params = abstract_parameters(model, task, shapes_in)
    optimizer, schedule = experiment.make_optimizer(params)
    abstract = abstract_state(model, task, optimizer, shapes_in, ema=bool(config.ema))
    rules = tuple((pattern, tuple(axes)) for pattern, axes in config.sharding_rules)
    shardings = state_shardings(abstract, mesh, rules)
    step = make_train_step(
        model,
        task,
        optimizer,
        schedule,
        mesh=mesh,
        shardings=shardings,
        augment=experiment.augment,
        accumulate=config.accumulate,
        ema=config.ema,
        seed=config.seed,
        trainable=trainable_parameters(config.optimizer.multipliers, params),
    )

    def fresh() -> TrainState:
        return init_state(model, task, optimizer, shapes_in, shardings, seed=config.seed, ema=bool(config.ema))

    return Parts(abstract, shardings, step, fresh)
