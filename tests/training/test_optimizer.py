import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_training import tiny_config

from jax_densevit.configuration import default_config
from jax_densevit.errors import UserError
from jax_densevit.training.optimizer import (
    decayed_parameters,
    learning_rates,
    make_optimizer,
    parameter_factors,
    trainable_parameters,
)


def parameters(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"body": {"kernel": (3, 4), "bias": (4,)}, "head": {"kernel": (4, 2), "scale": (2,)}}
    return jax.tree.map(lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))


def follow(config, params, gradients, steps=None):
    """The parameters after each gradient."""
    optimizer, _ = make_optimizer(config, params, steps or len(gradients))
    state, trace = optimizer.init(params), []
    update = jax.jit(lambda g, s, p: (lambda u, s: (optax.apply_updates(p, u), s))(*optimizer.update(g, s, p)))
    for gradient in gradients:
        params, state = update(gradient, state, params)
        trace.append(jax.tree.map(np.asarray, params))
    return trace


def by_hand(rule, config, params, gradients, rates):
    """The same in NumPy float64, leaf by leaf: `rule(g, w, memory, t) -> direction`; decays kernels, clips globally."""
    leaves, tree = jax.tree.flatten(params)
    decays = [np.ndim(leaf) >= 2 for leaf in leaves]
    weights = [leaf.astype(np.float64) for leaf in leaves]
    memory, trace = [{} for _ in leaves], []
    for t, gradient in enumerate(gradients):
        grads = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradient)]
        if config["clip_norm"]:
            norm = np.sqrt(sum(np.sum(g**2) for g in grads))
            grads = [g * min(1, config["clip_norm"] / norm) for g in grads]
        for i, g in enumerate(grads):
            decay = config["weight_decay"] * decays[i] * weights[i]
            weights[i] = weights[i] - rates(t) * rule(g, decay, memory[i], t)
        trace.append(jax.tree.unflatten(tree, list(weights)))
    return trace


def adamw_rule(config):
    def rule(g, decay, memory, t):
        memory["m"] = config["b1"] * memory.get("m", 0) + (1 - config["b1"]) * g
        memory["v"] = config["b2"] * memory.get("v", 0) + (1 - config["b2"]) * g**2
        m, v = memory["m"] / (1 - config["b1"] ** (t + 1)), memory["v"] / (1 - config["b2"] ** (t + 1))
        return m / (np.sqrt(v) + 1e-8) + decay

    return rule


def sgd_rule(config):
    def rule(g, decay, memory, t):
        memory["b"] = config["momentum"] * memory.get("b", 0) + g + decay
        return memory["b"]

    return rule


def rmsprop_rule(config):
    def rule(g, decay, memory, t):
        g = g + decay
        memory["v"] = config["momentum"] * memory.get("v", 0) + (1 - config["momentum"]) * g**2
        return g / (np.sqrt(memory["v"]) + 1e-7)

    return rule


RULES = {"adamw": adamw_rule, "sgd": sgd_rule, "rmsprop_legacy": rmsprop_rule}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("extra", [{}, {"weight_decay": 0.1, "clip_norm": 0.5}], ids=["plain", "decay_clip"])
def test_updates_equal_numpy(name, extra):
    config = tiny_config(
        name=name, learning_rate=0.01, schedule="poly", min_learning_rate=1e-3, warmup_steps=2, **extra
    )
    params = parameters()
    gradients = [parameters(seed) for seed in range(1, 7)]

    def rates(t):
        warm, remaining = min(1, (t + 1) / 2), 1 - max(0, t - 2) / 4
        return warm * ((0.01 - 1e-3) * remaining**0.9 + 1e-3)

    for found, expected in zip(
        follow(config, params, gradients), by_hand(RULES[name](config), config, params, gradients, rates), strict=True
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


def test_adamw_equals_optax_own():
    params, gradients = parameters(), [parameters(seed) for seed in range(1, 4)]
    config = tiny_config(name="adamw", learning_rate=0.01, weight_decay=0.1)
    reference = optax.adamw(0.01, 0.9, 0.999, weight_decay=0.1, mask=decayed_parameters)
    state, expected = reference.init(params), params
    for gradient in gradients:
        updates, state = reference.update(gradient, state, expected)
        expected = optax.apply_updates(expected, updates)
    jax.tree.map(np.testing.assert_allclose, follow(config, params, gradients)[-1], expected)


def test_the_defaults_of_a_config_make_every_optimizer():
    for name in RULES:
        config = default_config().optimizer
        config.name = name
        follow(config, parameters(), [parameters(1)], steps=10)


def test_rates_of_groups_start_apart_and_end_together():
    """SETR's recipe: poly 0.9, minimum 1e-4, heads ten times the base rate."""
    config = tiny_config(learning_rate=0.01, schedule="poly", min_learning_rate=1e-4, power=0.9)
    rate = learning_rates(config, 40_000)
    for factor in (1.0, 10.0):
        for step in (0, 1, 100, 20_000, 39_999, 40_000):
            expected = (0.01 * factor - 1e-4) * (1 - step / 40_000) ** 0.9 + 1e-4
            assert float(rate(step, factor)) == pytest.approx(expected, rel=1e-6)
    # A group that starts below the minimum stays where it is: it is not raised.
    assert float(rate(0, 0.001)) == float(rate(40_000, 0.001)) == pytest.approx(1e-5)


@settings(max_examples=40, deadline=None)
@given(
    schedule=st.sampled_from(["constant", "cosine", "poly"]),
    steps=st.integers(2, 200_000),
    warmup=st.integers(0, 50),
    factor=st.floats(0, 20),
)
def test_schedules_rise_then_fall_and_stay_within_their_bounds(schedule, steps, warmup, factor):
    warmup = min(warmup, steps - 1)
    config = tiny_config(schedule=schedule, warmup_steps=warmup, min_learning_rate=0.01, learning_rate=0.1)
    rate = learning_rates(config, steps)
    points = np.unique(np.clip(np.linspace(0, steps + 5, 40).astype(int), 0, None))
    values = np.asarray(jax.vmap(lambda step: rate(step, factor))(points))
    peak = 0.1 * factor
    assert values.min() >= 0 and values.max() <= peak * (1 + 1e-6)
    after = values[points >= warmup]
    assert np.all(np.diff(after) <= 1e-6 * peak)
    if warmup:
        assert float(rate(0, factor)) == pytest.approx(peak / warmup, rel=1e-5)
        assert float(rate(warmup - 1, factor)) == pytest.approx(peak, rel=1e-5)
    assert float(rate(warmup, factor)) == pytest.approx(peak, rel=1e-5)
    end = peak if schedule == "constant" else min(0.01, peak)
    for late in (steps, steps + 100):
        assert float(rate(late, factor)) == pytest.approx(end, rel=1e-5, abs=1e-9)


def test_piecewise_rates():
    """Seq2Seg's: 1e-4, 5e-5 after 15 epochs of 123 steps, 1e-5 after 30; the same steps for every group."""
    pieces = {"schedule": "piecewise", "boundaries": (1845, 3690), "factors": (0.5, 0.1)}
    rate = learning_rates(tiny_config(learning_rate=1e-4, **pieces), 5535)
    for factor in (1.0, 10.0):
        for step, expected in ((0, 1e-4), (1844, 1e-4), (1845, 5e-5), (3689, 5e-5), (3690, 1e-5), (5534, 1e-5)):
            assert float(rate(step, factor)) == pytest.approx(factor * expected, rel=1e-6)
    warm = learning_rates(tiny_config(learning_rate=1e-4, warmup_steps=4, **pieces), 5535)
    assert [float(warm(step, 1.0)) for step in (0, 1, 3, 4)] == pytest.approx([2.5e-5, 5e-5, 1e-4, 1e-4])
    assert float(warm(2000, 1.0)) == pytest.approx(5e-5)
    # A rate may rise again.
    rate = learning_rates(tiny_config(learning_rate=1.0, **{**pieces, "factors": [0.0, 3.0]}), 5535)
    assert [float(rate(step, 1.0)) for step in (1844, 1845, 3690)] == [1.0, 0.0, 3.0]


def test_the_schedule_that_is_returned_is_the_one_that_is_applied():
    config = tiny_config(momentum=0.0, schedule="cosine", warmup_steps=2)
    params = {"w": np.zeros(3, np.float32)}
    _, schedule = make_optimizer(config, params, 8)
    trace = follow(config, params, [{"w": np.ones(3, np.float32)}] * 8)
    steps = -np.diff([0.0] + [float(p["w"][0]) for p in trace])
    np.testing.assert_allclose(steps, [float(schedule(t)) for t in range(8)], rtol=1e-5, atol=1e-7)


def test_multipliers_scale_groups_and_zero_freezes():
    config = tiny_config(momentum=0.0, weight_decay=0.5, multipliers=(("body", 0), ("kernel", 10)))
    params, gradient = parameters(), parameters(1)
    assert parameter_factors(config["multipliers"], params) == {
        "body": {"kernel": 0.0, "bias": 0.0},
        "head": {"kernel": 10.0, "scale": 1.0},
    }
    assert trainable_parameters(config["multipliers"], params) == {
        "body": {"kernel": False, "bias": False},
        "head": {"kernel": True, "scale": True},
    }
    found = follow(config, params, [gradient])[0]
    jax.tree.map(np.testing.assert_array_equal, found["body"], params["body"])  # neither updated nor decayed
    head = params["head"]
    np.testing.assert_allclose(
        found["head"]["kernel"], head["kernel"] - 1.0 * (gradient["head"]["kernel"] + 0.5 * head["kernel"]), rtol=1e-5
    )
    np.testing.assert_allclose(found["head"]["scale"], head["scale"] - 0.1 * gradient["head"]["scale"], rtol=1e-5)


def test_frozen_parameters_have_no_moments_and_do_not_count_for_clipping():
    config = tiny_config(name="adamw", multipliers=(("body", 0),))
    params = parameters()
    optimizer, _ = make_optimizer(config, params, 10)
    assert sum(leaf.size for leaf in jax.tree.leaves(optimizer.init(params)) if leaf.ndim) == 2 * (8 + 2)
    config = tiny_config(momentum=0.0, learning_rate=1.0, clip_norm=1.0, multipliers=(("body", 0),))
    gradient = jax.tree.map(lambda w: 100 * np.ones_like(w), params)
    gradient["head"] = jax.tree.map(lambda w: 0.1 * np.ones_like(w), params["head"])
    found = follow(config, params, [gradient])[0]
    np.testing.assert_allclose(found["head"]["scale"], params["head"]["scale"] - 0.1, rtol=1e-5)


def test_only_kernels_are_decayed_stacked_layers_too():
    shapes = {"block": {"kernel": (12, 4, 4), "bias": (12, 4), "scale": (12, 4)}, "token": (1, 1, 4), "kernel": (4,)}
    tree = jax.tree.map(lambda s: jnp.zeros(s), shapes, is_leaf=lambda x: isinstance(x, tuple))
    assert decayed_parameters(tree) == {
        "block": {"kernel": True, "bias": False, "scale": False},
        "token": False,
        "kernel": False,
    }


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"name": "adam"}, "optimizer.name 'adam' does not exist; did you mean 'adamw'"),
        ({"schedule": "cosin"}, "optimizer.schedule 'cosin' does not exist; did you mean 'cosine'"),
        ({"learning_rate": -0.1}, "optimizer.learning_rate is -0.1"),
        ({"weight_decay": float("nan")}, "optimizer.weight_decay is nan"),
        ({"min_learning_rate": 0.2}, "min_learning_rate 0.2 is above"),
        ({"schedule": "piecewise"}, "has 0 optimizer.boundaries and 0 optimizer.factors"),
        ({"schedule": "piecewise", "boundaries": (3, 6), "factors": (0.1,)}, "2 optimizer.boundaries and 1 optimizer"),
        ({"schedule": "piecewise", "boundaries": (6, 3), "factors": (0.5, 0.1)}, "in rising order"),
        ({"schedule": "piecewise", "boundaries": (0, 3), "factors": (0.5, 0.1)}, "above 0"),
        ({"schedule": "piecewise", "boundaries": (3,), "factors": (-1.0,)}, "must not be negative"),
        (
            {"schedule": "piecewise", "boundaries": (3,), "factors": (0.1,), "min_learning_rate": 0.01},
            "no meaning with schedule='piecewise'",
        ),
        ({"warmup_steps": 10}, "warmup_steps 10 leaves nothing of a training of 10 steps"),
        ({"multipliers": (("haed", 10),)}, "'haed' matches no parameter"),
        ({"multipliers": (("head", -1),)}, "factor of 'head' is -1"),
        ({"multipliers": ((".", 0),)}, "freezes every parameter"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(tiny_config(**changes), parameters(), 10)


@pytest.mark.reference
def test_reference_poly_table(reference_data):
    with np.load(reference_data / "goldens/setr/misc_resize_loss_miou_sched.npz") as file:
        for start, factor in [(0.01, 1), (0.01, 10), (0.001, 1)]:
            config = tiny_config(learning_rate=start, schedule="poly", min_learning_rate=1e-4, power=0.9)
            rate = learning_rates(config, 40_000)
            found = [float(rate(step, factor)) for step in file["poly_its"]]
            np.testing.assert_allclose(found, file[f"poly_lr_base{start * factor:g}_T40000_min1e-4_p0.9"], rtol=2e-6)


@pytest.mark.reference
def test_reference_sgd_trace(reference_data):
    with np.load(reference_data / "goldens/setr/misc_resize_loss_miou_sched.npz") as file:
        expected = file["sgd_m0.9_wd0.01_lr0.1_f=sum(w^2)_from_1_-2_3"]
    # Decay applies to kernels of two dimensions: the reference's vector becomes one.
    params = {"kernel": np.array([[1.0, -2.0, 3.0]], np.float32)}
    optimizer, _ = make_optimizer(tiny_config(weight_decay=0.01), params, 10)
    state, found = optimizer.init(params), []
    for _ in expected:
        updates, state = optimizer.update(jax.tree.map(lambda w: 2 * w, params), state, params)
        params = optax.apply_updates(params, updates)
        found.append(params["kernel"][0])
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=5e-7)


@pytest.mark.reference
def test_reference_rmsprop_trace(reference_data):
    with np.load(reference_data / "goldens/coltran/optim.npz") as file:
        config = tiny_config(name="rmsprop_legacy", learning_rate=3e-4)
        trace = follow(config, {"w": file["rmsprop/x0"]}, [{"w": g} for g in file["rmsprop/grads"]])
        np.testing.assert_allclose([p["w"] for p in trace], file["rmsprop/legacy/trace"], rtol=1e-6)
