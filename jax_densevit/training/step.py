"""One training step: augment, microbatches, gradient, update, average; compiled once, state donated."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_densevit.tasks.task import Batch, LossTerm, Task
from jax_densevit.training.mesh import BATCH_AXES, batch_sharding, check_batch_size, replicated
from jax_densevit.training.optimizer import RatesState
from jax_densevit.training.sharding import gathered
from jax_densevit.training.state import TrainState

Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]


def stream_key(seed: int, stream: str, *counters: Any) -> jax.Array:
    """The random key of a named stream at given counters (step, microbatch): a pure function of its arguments."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(stream.encode()))
    for counter in counters:
        key = jax.random.fold_in(key, counter)
    return key


def moving_average(average: Any, params: Any, decay: float) -> Any:
    """`decay * average + (1 - decay) * params`, leaf by leaf, written so that equal values stay equal."""
    return jax.tree.map(lambda mean, value: mean - (1 - decay) * (mean - value), average, params)


def make_train_step(
    model: Any,
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Any], jax.Array],
    *,
    mesh: Mesh,
    shardings: TrainState,
    augment: Callable[[Batch], Batch] | None = None,
    accumulate: int = 1,
    ema: float = 0.0,
    seed: int = 0,
    trainable: Any = None,
) -> Step:
    """The compiled step `(state, batch) -> (state, numbers)`; the given state is donated.

    The loss is the sum over terms of `coefficient * sum / weight` with totals over the whole global batch, whatever the
    number of devices and microbatches; a term whose weight is 0 counts 0 and has no gradient. Statistics of
    normalisation pass through the microbatches one after the other, each computed over all devices.

    A step whose loss or gradient is not finite changes nothing but the counters of steps: `state.step`, and the one
    that the learning rate follows.

    Args:
      model, task: the contracts; the model's output is whatever the task's loss takes.
      optimizer, schedule: from `make_optimizer`; the schedule is only reported.
      mesh, shardings: from `make_mesh` and `state_shardings`.
      augment: from a global uint8 batch to a batch; runs on the devices.
      accumulate: microbatches per step.
      ema: decay of the moving average; 0 where the state has none.
      seed: of dropout.
      trainable: a tree of bools like the parameters, from `trainable_parameters`; no gradient is computed where False.

    Returns:
      The jitted step. `numbers` describes the state that came in, by scalars that are the same on every device: "loss",
      "loss/<term>" (`sum / weight`), "grad_norm" (before clipping), "param_norm", "lr" (float32), "finite" (bool).
    """

    def forward(params, statistics, batch: Batch, key: jax.Array) -> tuple[Any, Any]:
        variables = {"params": params, **({"batch_stats": statistics} if statistics else {})}
        mutable = ["batch_stats"] if statistics else False
        result = model.apply(variables, *task.inputs(batch), train=True, rngs={"dropout": key}, mutable=mutable)
        return (result[0], result[1]["batch_stats"]) if statistics else (result, statistics)

    def objective(params, statistics, batch: Batch, key: jax.Array, totals: dict[str, jax.Array] | None):
        """This microbatch's share of the loss, with (new statistics, shares by term)."""
        with gathered(params, shardings.params) as params:
            if trainable is not None:
                params = jax.tree.map(lambda p, trained: p if trained else jax.lax.stop_gradient(p), params, trainable)
            output, statistics = forward(params, statistics, batch, key)
        terms = task.loss(output, batch)
        means = {name: _mean(term, term.weight if totals is None else totals[name]) for name, term in terms.items()}
        loss = sum(terms[name].coefficient * mean for name, mean in means.items())
        return loss, (statistics, means)

    gradient = jax.value_and_grad(objective, has_aux=True)

    def split(rows: jax.Array) -> jax.Array:
        """[B, ...] -> [A, B/A, ...]: microbatch a has rows a, a + A, ..., so that no row leaves its device."""
        rows = jnp.swapaxes(rows.reshape(rows.shape[0] // accumulate, accumulate, *rows.shape[1:]), 0, 1)
        return jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)))

    def accumulated(state: TrainState, batch: Batch):
        """Loss, gradient, statistics and means over all microbatches."""
        batches = jax.tree.map(split, batch)
        first = jax.tree.map(lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), batches)
        key = jax.eval_shape(lambda: stream_key(seed, "dropout", 0, 0))
        # Weights depend on the batch alone, so the totals come before any gradient, from an output of zeros: the model
        # does not run for them.
        output, _ = jax.eval_shape(forward, state.params, state.statistics, first, key)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), output)

        def weights(microbatch: Batch) -> dict[str, jax.Array]:
            return {name: jnp.asarray(term.weight, jnp.float32) for name, term in task.loss(zeros, microbatch).items()}

        totals = jax.tree.map(lambda weight: weight.sum(axis=0), jax.lax.map(weights, batches))

        def body(carry, numbered):
            number, microbatch = numbered
            loss, grads, statistics, means = carry
            key = stream_key(seed, "dropout", state.step, number)
            (share, (statistics, shares)), more = gradient(state.params, statistics, microbatch, key, totals)
            add = jax.tree.map(jnp.add, (loss, grads, means), (share, pin(more), shares))
            return (add[0], add[1], statistics, add[2]), None

        zero = jnp.zeros((), jnp.float32)
        start = (zero, pin(jax.tree.map(jnp.zeros_like, state.params)), state.statistics, dict.fromkeys(totals, zero))
        return jax.lax.scan(body, start, (jnp.arange(accumulate), batches))[0]

    def pin(grads: Any) -> Any:
        # Gradients lie where their parameters lie: with FSDP the sum over devices becomes a reduce-scatter.
        return jax.lax.with_sharding_constraint(grads, shardings.params)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        check_batch_size(len(jax.tree.leaves(batch)[0]), mesh, accumulate)
        if augment is not None:
            batch = augment(batch)
        if accumulate > 1:
            loss, grads, statistics, means = accumulated(state, batch)
        else:
            key = stream_key(seed, "dropout", state.step, 0)
            (loss, (statistics, means)), grads = gradient(state.params, state.statistics, batch, key, None)
            grads = pin(grads)
        updates, new_optimizer = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = None
        if state.ema is not None:
            average = moving_average(state.ema, {"params": params, "statistics": statistics}, ema)
        numbers = {
            "loss": loss,
            **{f"loss/{name}": mean for name, mean in means.items()},
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(state.params),
            "lr": schedule(state.step),
        }
        numbers = {name: jnp.asarray(value, jnp.float32) for name, value in numbers.items()}
        finite = jnp.isfinite(numbers["loss"]) & jnp.isfinite(numbers["grad_norm"])
        new = TrainState(state.step, params, statistics, average, new_optimizer)

        def kept(after, before):
            return after if isinstance(after, RatesState) else jnp.where(finite, after, before)

        new = jax.tree.map(kept, new, state, is_leaf=lambda node: isinstance(node, RatesState))
        return new.replace(step=state.step + 1), {**numbers, "finite": finite}

    return jax.jit(
        step,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def _mean(term: LossTerm, weight: jax.Array) -> jax.Array:
    """`sum / weight`, float32; 0 with a gradient of 0 where nothing was counted."""
    weight = jax.lax.stop_gradient(jnp.asarray(weight, jnp.float32))
    return jnp.where(weight > 0, term.sum.astype(jnp.float32) / jnp.where(weight > 0, weight, 1.0), 0.0)
