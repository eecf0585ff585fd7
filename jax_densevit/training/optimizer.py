"""Optimizers and learning-rate schedules by name, from the `optimizer` section of a config.

Every group of parameters with a learning-rate factor f follows

    lr_f(t) = (f * lr - m) * decay(t) + m,    m = min(min_lr, f * lr)

so that ten-times heads start at ten times the rate and end at the common minimum, as SETR's published recipe has it
(poly, power 0.9, minimum 1e-4, heads x10). A "piecewise" rate has no minimum, lr_f(t) = f * lr * decay(t).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_densevit.errors import UserError, did_you_mean
from jax_densevit.training.paths import first_match, named_leaves, path_name

Schedule = Callable[[Any], jax.Array]

RMSPROP_EPSILON = 1e-7  # of Keras
DECAYS = ("constant", "cosine", "poly", "piecewise")


def make_optimizer(config: Mapping[str, Any], params: Any, steps: int) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimizer of a config section.

    Args:
      config: the fields of `default_config().optimizer`. `name` is one of
        "adamw": decoupled weight decay (Loshchilov and Hutter 2019), epsilon 1e-8;
        "sgd": PyTorch's form, `buffer = momentum * buffer + g`, then `w -= lr * buffer`; weight decay is added to g;
        "rmsprop_legacy": Keras up to TF 2.10 (trained ColTran), `w -= lr * g / (sqrt(v) + 1e-7)` with v the mean
        square of g, whose decay is `momentum` (0.9); weight decay is added to g.
      params: parameters or their shapes.
      steps: the length of the schedule.

    Returns:
      (transformation, schedule): `schedule(step)` is the learning rate of factor 1 at an update, float32.

    Raises:
      UserError: unknown names, impossible numbers, a multiplier that matches nothing, everything frozen.
    """
    known = {"adamw": _adamw, "sgd": _sgd, "rmsprop_legacy": _rmsprop_legacy}
    if config["name"] not in known:
        raise UserError(f"optimizer.name {config['name']!r} does not exist{did_you_mean(config['name'], known)}")
    rate = learning_rates(config, steps)
    factors = parameter_factors(config["multipliers"], params)
    parts = [optax.clip_by_global_norm(config["clip_norm"])] if config["clip_norm"] > 0 else []
    transform = optax.chain(*parts, known[config["name"]](config))
    if not all(jax.tree.leaves(trainable_parameters(config["multipliers"], params))):
        # Frozen parameters have no moments and are never decayed.
        labels = jax.tree.map(lambda factor: "trained" if factor else "frozen", factors)
        transform = optax.partition({"trained": transform, "frozen": optax.set_to_zero()}, labels)
    return optax.chain(transform, _scale_by_rates(rate, factors)), lambda step: rate(step, 1.0)


def learning_rates(config: Mapping[str, Any], steps: int) -> Callable[[Any, float], jax.Array]:
    """`rate(step, factor)`, the learning rate of a group at update `step` (0-based), float32.

    During warm-up it rises linearly, `(step + 1) / warmup_steps` of its peak; the decay takes the steps that remain.
    With "piecewise" the rate is the peak before the first of `boundaries`, and from boundary i on the peak times
    `factors[i]`: (1845, 3690) with (0.5, 0.1) at 1e-4 gives 1e-4, 5e-5 and 1e-5.
    """
    peak, minimum, warmup = config["learning_rate"], config["min_learning_rate"], config["warmup_steps"]
    kind, power = config["schedule"], config["power"]
    if kind not in DECAYS:
        raise UserError(f"optimizer.schedule {kind!r} does not exist{did_you_mean(kind, DECAYS)}")
    for field in ("learning_rate", "min_learning_rate", "weight_decay", "clip_norm", "warmup_steps"):
        if not config[field] >= 0:
            raise UserError(f"optimizer.{field} is {config[field]}; it must not be negative.")
    if kind == "piecewise":
        _check_pieces(config)
    if minimum > peak:
        raise UserError(f"optimizer.min_learning_rate {minimum} is above optimizer.learning_rate {peak}.")
    if steps < 1 or warmup >= steps:
        raise UserError(f"optimizer.warmup_steps {warmup} leaves nothing of a training of {steps} steps.")

    def rate(step: Any, factor: float) -> jax.Array:
        step = jnp.asarray(step, jnp.int32)
        start = peak * factor
        end = start if kind == "constant" else min(minimum, start)
        # What remains is counted in whole numbers: float32 would lose the last steps of a long schedule.
        remaining = jnp.clip(steps - step, 0, steps - warmup) / jnp.float32(steps - warmup)
        if kind == "piecewise":
            piece = jnp.searchsorted(jnp.asarray(config["boundaries"], jnp.int32), step, side="right")
            end, shape = 0.0, jnp.asarray((1.0, *config["factors"]), jnp.float32)[piece]
        elif kind == "cosine":
            shape = 0.5 * (1 - jnp.cos(jnp.pi * remaining))
        else:
            shape = remaining**power
        value = (start - end) * shape + end
        if warmup:
            value *= jnp.minimum(step + 1, warmup) / jnp.float32(warmup)
        return value.astype(jnp.float32)

    return rate


def _check_pieces(config: Mapping[str, Any]) -> None:
    boundaries, factors = tuple(config["boundaries"]), tuple(config["factors"])
    if not boundaries or len(boundaries) != len(factors):
        raise UserError(
            f"optimizer.schedule='piecewise' has {len(boundaries)} optimizer.boundaries and {len(factors)} "
            "optimizer.factors; give one factor for the steps from each boundary on."
        )
    if not all(isinstance(step, int) for step in boundaries) or list(boundaries) != sorted({0, *boundaries})[1:]:
        raise UserError(f"optimizer.boundaries {boundaries} must be whole numbers of steps above 0, in rising order.")
    if not all(factor >= 0 for factor in factors):
        raise UserError(f"optimizer.factors {factors} must not be negative.")
    if config["min_learning_rate"]:
        raise UserError("optimizer.min_learning_rate has no meaning with schedule='piecewise'; set the last factor.")


def parameter_factors(multipliers: Any, params: Any) -> Any:
    """A tree like `params` of learning-rate factors (Python floats); parameters that no pattern matches have 1."""
    rules = [(pattern, float(factor)) for pattern, factor in multipliers]
    for pattern, factor in rules:
        if not factor >= 0:
            raise UserError(f"optimizer.multipliers: the factor of {pattern!r} is {factor}; it must not be negative.")
    decided = first_match([pattern for pattern, _ in rules], named_leaves(params), "optimizer.multipliers")

    def factor(path, _) -> float:
        name = path_name(path)
        return rules[decided[name]][1] if name in decided else 1.0

    return jax.tree_util.tree_map_with_path(factor, params)


def trainable_parameters(multipliers: Any, params: Any) -> Any:
    """A tree like `params` of bools: False where a multiplier is 0. :class:`UserError` when everything is frozen."""
    trainable = jax.tree.map(bool, parameter_factors(multipliers, params))
    if not any(jax.tree.leaves(trainable)):
        raise UserError("optimizer.multipliers freezes every parameter; give at least one a factor above 0.")
    return trainable


def decayed_parameters(params: Any) -> Any:
    """A tree like `params` of bools: True for kernels of at least two dimensions.

    Biases, norm scales, tokens and position tables are never decayed, under their usual names also where layers are
    stacked and vectors have become matrices.
    """

    def decayed(path, leaf) -> bool:
        return leaf.ndim >= 2 and path_name(path[-1:]).endswith("kernel")

    return jax.tree_util.tree_map_with_path(decayed, params)


def _decay(config: Mapping[str, Any]) -> list[optax.GradientTransformation]:
    return [optax.add_decayed_weights(config["weight_decay"], decayed_parameters)] if config["weight_decay"] else []


def _adamw(config: Mapping[str, Any]) -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_adam(config["b1"], config["b2"], eps=1e-8), *_decay(config))


def _sgd(config: Mapping[str, Any]) -> optax.GradientTransformation:
    return optax.chain(*_decay(config), optax.trace(config["momentum"]) if config["momentum"] else optax.identity())


def _rmsprop_legacy(config: Mapping[str, Any]) -> optax.GradientTransformation:
    return optax.chain(
        *_decay(config), optax.scale_by_rms(decay=config["momentum"], eps=RMSPROP_EPSILON, eps_in_sqrt=False)
    )


class RatesState(NamedTuple):
    """The number of steps, int32; those that were not finite count."""

    count: jax.Array


def _scale_by_rates(rate: Callable[[Any, float], jax.Array], factors: Any) -> optax.GradientTransformation:
    """Multiplies each update by minus the learning rate of its group."""

    def init(params):
        del params
        return RatesState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params
        rates = {factor: -rate(state.count, factor) for factor in set(jax.tree.leaves(factors))}
        updates = jax.tree.map(lambda update, factor: rates[factor] * update, updates, factors)
        return updates, RatesState(state.count + 1)

    return optax.GradientTransformation(init, update)
