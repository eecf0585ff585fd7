"""The state of training: everything that a step changes, and nothing else.

There is no random key in it: keys are derived from the seed and the step.
"""

from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jax_densevit.tasks.task import Task
from jax_densevit.training.mesh import replicated
from jax_densevit.training.sharding import Rule, like_parameters, parameter_shardings


@flax.struct.dataclass
class TrainState:
    """What a checkpoint holds.

    Attributes:
      step: int32 scalar, the number of updates made.
      params: nested dict of float32 parameters.
      statistics: running statistics of normalisation (Flax's `batch_stats`); an empty dict where the model has none.
      ema: moving averages {"params": ..., "statistics": ...}, or None. Statistics are averaged with the parameters:
        those of the last few batches belong to the last parameters and can be far off for their average.
      optimizer: state of the optax transformation.
    """

    step: jax.Array
    params: Any
    statistics: Any
    ema: Any
    optimizer: Any


def initial_variables(model: Any, task: Task, batch: Any, key: jax.Array) -> tuple[Any, Any]:
    """Initial (parameters, statistics) of a model for batches like `batch` (arrays or shapes); traceable."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), batch)
    variables = model.init({"params": key, "dropout": key}, *task.inputs(zeros), train=True)
    unknown = set(variables) - {"params", "batch_stats", "intermediates"}
    if unknown:
        raise ValueError(
            f"{type(model).__name__} keeps variables {sorted(unknown)} that the training state has no room for"
        )
    return variables["params"], variables.get("batch_stats", {})


def abstract_parameters(model: Any, task: Task, batch: Any) -> Any:
    """The shapes of a model's parameters: what `make_optimizer` and `parameter_shardings` need to know."""
    return jax.eval_shape(lambda: initial_variables(model, task, batch, jax.random.key(0))[0])


def _initial_state(model, task, optimizer, batch, ema: bool, key: jax.Array) -> TrainState:
    params, statistics = initial_variables(model, task, batch, key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        statistics=statistics,
        # The average starts at the parameters themselves, so it needs no correction for a start at zero.
        ema=jax.tree.map(jnp.copy, {"params": params, "statistics": statistics}) if ema else None,
        optimizer=optimizer.init(params),
    )


def abstract_state(
    model: Any, task: Task, optimizer: optax.GradientTransformation, batch: Any, *, ema: bool = False
) -> TrainState:
    """The state's shapes and dtypes, found without touching a device. `batch`: arrays or shapes of a global batch."""
    return jax.eval_shape(lambda: _initial_state(model, task, optimizer, batch, ema, jax.random.key(0)))


def state_shardings(
    state: TrainState, mesh: Mesh, rules: Sequence[Rule] = (), minimum_bytes: int | None = None
) -> TrainState:
    """The sharding of every leaf of a state: moments and average lie where their parameters lie.

    Arguments as in `parameter_shardings`.
    """
    params = parameter_shardings(state.params, mesh, rules, minimum_bytes)
    statistics = jax.tree.map(lambda _: replicated(mesh), state.statistics)
    return TrainState(
        step=replicated(mesh),
        params=params,
        statistics=statistics,
        ema=None if state.ema is None else {"params": params, "statistics": statistics},
        optimizer=like_parameters(state.optimizer, state.params, params, mesh),
    )


def init_state(
    model: Any,
    task: Task,
    optimizer: optax.GradientTransformation,
    batch: Any,
    shardings: TrainState,
    *,
    seed: int = 0,
    ema: bool = False,
) -> TrainState:
    """The state at step 0, created in place on the devices: no process ever holds a full copy of a divided tensor.

    The values depend on the seed alone, not on the mesh.
    """
    # The key is made inside, so that a run under `transfer_guard("disallow")` can start here.
    create = jax.jit(
        lambda: _initial_state(model, task, optimizer, batch, ema, jax.random.key(seed)), out_shardings=shardings
    )
    return create()
