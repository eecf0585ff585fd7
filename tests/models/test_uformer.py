"""Uformer: published counts to the digit, recorded outputs of the original, and sizes that it could not take."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_densevit.errors import UserError
from jax_densevit.models.counts import count_parameters
from jax_densevit.models.registry import create_model, find_model
from jax_densevit.models.uformer import STAGES, _drop_path_rates, macs_as_published, windows_built_for
from jax_densevit.pretrained import convert

TINY = {"base": 4, "heads": (1, 1, 2, 2, 4, 4, 2, 2, 1), "window": 4}
# One block a stage, the second stages of encoder and decoder with a shifted one.
SMALL = {**TINY, "base": 2, "heads": (1,) * 9, "depths": (1, 2, 1, 1, 2, 1, 1, 2, 1), "drop_path": 0.0}


@functools.partial(jax.jit, static_argnums=0)
def run(model, variables, images, valid=None):
    return model.apply(variables, images, valid=valid)


def random_variables(model, seed=0):
    """Noise for every parameter, so that no zero bias or zero table hides a mistake."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * 0.2, shapes)


@pytest.mark.parametrize(
    "variant,options,expected",
    [
        ("S", {"num_classes": 3}, 20_628_317),
        ("S", {"num_classes": 40}, 20_649_666),
        ("S-modulator", {}, 20_751_197),
        ("T", {}, 5_230_413),
        ("T-modulator", {}, 5_291_853),
        ("B", {}, 50_467_250),
        ("B-modulator", {}, 50_880_946),
        ("S", {"projection": "conv"}, 20_745_437),
        ("S", {"feed_forward": "ffn"}, 20_472_157),
    ],
)
def test_published_parameter_counts(variant, options, expected):
    assert count_parameters(create_model("uformer", variant, **options), (16, 16)) == expected


def test_published_count_of_the_dual_pixel_model():
    model = create_model("uformer", "B-modulator")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 6)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 50_881_810


def test_counts_of_the_stages():
    """Blocks of B with modulators, stage by stage."""
    shapes = jax.eval_shape(create_model("uformer", "B-modulator").init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    counts = [sum(leaf.size for leaf in jax.tree.leaves(shapes["params"][name])) for name in STAGES]
    assert counts == [14_209, 105_988, 1_634_336, 6_414_400, 6_352_928, 25_673_856, 6_545_472, 424_968, 57_090]


@pytest.mark.parametrize("variant,giga", [("T", 11.997), ("S", 43.858), ("B", 89.456)])
def test_published_macs(variant, giga):
    assert round(macs_as_published(create_model("uformer", variant), (256, 256)) / 1e9, 3) == giga


@pytest.mark.parametrize("num_classes,giga", [(3, 40.99), (40, 42.39)])
def test_macs_are_those_that_pytorch_counts(num_classes, giga):
    macs = find_model("uformer").macs(create_model("uformer", "S", num_classes=num_classes), (256, 256))
    assert round(macs / 1e9, 2) == giga


@pytest.mark.parametrize("options", [{}, {"feed_forward": "ffn"}])
def test_macs_are_those_the_compiler_counts(options):
    """Norms, GELU and softmax come on top."""
    model = create_model("uformer", "S", depths=(1,) * 9, **options)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    lowered = jax.jit(lambda v, x: model.apply(v, x).logits).lower(variables, jnp.zeros((1, 64, 96, 3)))
    counted = lowered.cost_analysis()["flops"] / 2
    assert 1.0 < counted / find_model("uformer").macs(model, (64, 96)) < 1.2


def test_the_published_rule():
    windows, shifts = windows_built_for(256, (8,) * 9, (4,) * 9)
    assert windows == (8,) * 9 and shifts == (4,) * 9
    windows, shifts = windows_built_for(128, (8,) * 9, (4,) * 9)
    assert windows == (8,) * 9 and shifts == (4, 4, 4, 4, 0, 4, 4, 4, 4)
    assert windows_built_for((80, 64), (8,) * 9, (0,) * 9)[0] == (8, 8, 8, 8, 4, 8, 8, 8, 8)
    # The bottleneck of a model built for 64 has 49 positions instead of 225.
    smaller = create_model("uformer", "T", built_for=64)
    assert smaller.windows_and_shifts()[1] == (4, 4, 4, 0, 0, 0, 4, 4, 4)
    ours = count_parameters(create_model("uformer", "T"), (16, 16))
    assert ours - count_parameters(smaller, (16, 16)) == 2 * 16 * (225 - 49)


def test_explicit_windows_and_shifts():
    model = create_model("uformer", window=[8, 8, 4, 4, 2, 4, 4, 8, 8], shift=[0, 1, 2, 3, 0, 0, 0, 0, 0])
    assert model.windows_and_shifts() == ((8, 8, 4, 4, 2, 4, 4, 8, 8), (0, 1, 2, 3, 0, 0, 0, 0, 0))
    assert create_model("uformer", shift=False).windows_and_shifts()[1] == (0,) * 9


def test_stochastic_depth_follows_the_encoder_down_again():
    rates = _drop_path_rates(0.1, (2,) * 9)
    np.testing.assert_allclose(rates[:8], np.linspace(0, 0.1, 8))
    assert rates[8:10] == [0.1, 0.1] and rates[10:] == rates[7::-1]


@pytest.mark.parametrize(
    "size,options",
    [
        ((1, 1), {}),
        ((17, 40), {"modulator": True, "num_classes": 5}),
        ((28, 23), {"projection": "conv", "feed_forward": "ffn"}),
    ],
)
def test_any_size_and_every_parameter_learns(size, options):
    model = create_model("uformer", **{**SMALL, **options})
    images = jax.random.normal(jax.random.key(0), (2, *size, 3))
    variables = jax.tree.map(lambda leaf: leaf + 0.2, random_variables(model))  # so that no ReLU is dead

    def loss(params):
        out = model.apply({"params": params}, images)
        return jnp.square(out.logits - 1).mean(), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert out.logits.shape == (2, *size, model.num_classes) and out.logits.dtype == jnp.float32
    assert out.covers == size and out.auxiliary == ()
    assert out.features["bottleneck"].shape == (2, -(-size[0] // 16), -(-size[1] // 16), 16 * model.base)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    if size != (1, 1):
        still = [
            jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(gradients) if not g.any()
        ]
        assert not still, still


def test_it_runs_at_224():
    """14 tokens a side at the bottleneck, 28 above it: neither divides by the published window."""
    model = create_model("uformer", base=2, heads=(1,) * 9, depths=(1, 1, 1, 1, 2, 1, 1, 1, 1))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    out = jax.eval_shape(model.apply, variables, jnp.zeros((2, 224, 224, 3)))
    assert out.logits.shape == (2, 224, 224, 3) and out.covers == (224, 224)


_PADDED = {
    "plain": {},
    "no shift": {"shift": False},
    "conv, modulator": {"projection": "conv", "modulator": True},
    "odd windows": {"window": (4, 3, 2, 1, 2, 3, 4, 2, 5), "shift": (1, 2, 1, 0, 1, 2, 3, 0, 4)},
}


@pytest.mark.parametrize("name", _PADDED)
@settings(max_examples=2, deadline=None)
@given(st.integers(5, 40), st.integers(5, 40), st.integers(0, 2))
def test_padding_of_any_size_and_content_changes_nothing(name, height, width, seed):
    """An image framed at the bottom and the right by anything gives what it gives alone, whatever its size."""
    model = create_model("uformer", **{**SMALL, **_PADDED[name]})
    variables = random_variables(model)
    rng = np.random.default_rng(seed)
    canvas = rng.normal(size=(2, 48, 48, 3)).astype(np.float32) * 5
    valid = np.zeros((2, 48, 48), bool)
    valid[0, :height, :width] = True
    valid[1, :37, :48] = True
    framed = run(model, variables, canvas, valid).logits
    alone = run(model, variables, canvas[:1, :height, :width]).logits
    scale = np.abs(alone).max()
    np.testing.assert_allclose(framed[0, :height, :width] / scale, alone[0] / scale, atol=2e-6)
    alone = run(model, variables, canvas[1:, :37]).logits
    np.testing.assert_allclose(framed[1, :37] / scale, alone[0] / scale, atol=2e-6)


def test_both_treatments_agree_where_there_is_no_padding():
    """And differ where there is some: the original reads its padding."""
    options = {**SMALL, "modulator": True, "projection": "conv", "shift": False}
    masked, original = (create_model("uformer", **options, padding=padding) for padding in ("masked", "original"))
    variables = random_variables(masked)
    images = jax.random.normal(jax.random.key(3), (2, 64, 128, 3))
    assert original.padded((64, 65)) == (64, 128)
    ours, theirs = run(masked, variables, images), run(original, variables, images)
    np.testing.assert_allclose(ours.logits, theirs.logits, atol=1e-5)
    cut = images[:, :, :100]
    ours, theirs = run(masked, variables, cut), run(original, variables, cut)
    assert ours.covers == (64, 100) and theirs.covers == (64, 128) and theirs.logits.shape == (2, 64, 128, 3)
    assert np.abs(ours.logits - theirs.logits[:, :, :100]).max() > 1e-3
    # With `valid` valid tokens still look at padding, and padding no longer at padding.
    valid = jnp.arange(128) < 100
    told = run(
        original, variables, jnp.pad(cut, ((0, 0), (0, 0), (0, 28), (0, 0))), jnp.broadcast_to(valid, (2, 64, 128))
    )
    assert 1e-6 < np.abs(told.logits - theirs.logits).max()


def test_rematerialised_blocks_compute_the_same():
    images = jax.random.normal(jax.random.key(0), (2, 20, 16, 3))
    results = []
    for remat in ("none", "full", "dots_no_batch"):
        model = create_model("uformer", **{**SMALL, "drop_path": 0.5}, remat=remat)
        variables = random_variables(model)

        def loss(params, model=model):
            out = model.apply({"params": params}, images, train=True, rngs={"dropout": jax.random.key(4)})
            return jnp.square(out.logits).mean()

        results.append(jax.jit(jax.value_and_grad(loss))(variables["params"]))
    for other in results[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), results[0], other)


def test_stochastic_depth_drops_in_training_only():
    model = create_model("uformer", **{**SMALL, "drop_path": 0.9})
    variables = random_variables(model)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    apply = jax.jit(lambda key: model.apply(variables, images, train=True, rngs={"dropout": key}).logits)
    assert np.abs(apply(jax.random.key(1)) - apply(jax.random.key(2))).max() > 1e-3
    evaluated = run(model, variables, images).logits
    without = create_model("uformer", **SMALL)
    without = jax.jit(lambda: without.apply(variables, images, train=True).logits)()
    np.testing.assert_allclose(evaluated, without, atol=1e-5)


@pytest.mark.parametrize(
    "residual,num_classes,channels,added",
    [
        ("study", 3, 3, True),
        ("study", 5, 3, False),
        ("study", 6, 6, True),
        ("official", 3, 3, True),
        ("official", 3, 6, False),
        ("none", 3, 3, False),
    ],
)
def test_the_rules_of_the_residual(residual, num_classes, channels, added):
    model = create_model("uformer", **{**SMALL, "depths": (1,) * 9}, num_classes=num_classes, residual=residual)
    images = jax.random.normal(jax.random.key(0), (1, 16, 16, channels))
    variables = jax.tree.map(
        lambda leaf: jnp.full(leaf.shape, 0.1), jax.eval_shape(model.init, jax.random.key(1), images)
    )
    output = variables["params"]["output"]
    output.update(kernel=jnp.zeros_like(output["kernel"]), bias=jnp.full_like(output["bias"], 0.5))
    expected = images + 0.5 if added else np.full((1, 16, 16, num_classes), 0.5)
    np.testing.assert_allclose(run(model, variables, images).logits, expected, atol=1e-6)


def test_half_precision_computes_in_it_and_answers_in_float32():
    exact = create_model("uformer", **SMALL)
    model = create_model("uformer", **SMALL, dtype="bfloat16")
    images = jax.random.normal(jax.random.key(0), (1, 24, 32, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(1), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    variables = random_variables(model)
    out = run(model, variables, images)
    assert out.features["bottleneck"].dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32
    expected = run(exact, variables, images).logits
    assert 0 < np.abs(out.logits - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.parametrize(
    "options,cause",
    [
        ({"depths": (2, 2)}, "nine numbers"),
        ({"heads": (3,) * 9}, "do not divide"),
        ({"shift": (9,) * 9, "depths": (2,) * 9}, "not within a window"),
        ({"window": 0}, "at least 1"),
        ({"projection": "linaer"}, "did you mean 'linear'"),
        ({"feed_forward": "left"}, "did you mean 'leff'"),
        ({"padding": "mask"}, "did you mean 'masked'"),
        ({"residual": "studi"}, "did you mean 'study'"),
        ({"remat": "ful"}, "did you mean 'full'"),
        ({"residual": "official", "num_classes": 4}, "3 channels to 4 outputs"),
    ],
)
def test_refusals(options, cause):
    model = create_model("uformer", **{**SMALL, **options})
    with pytest.raises(UserError, match=cause):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


def test_refuses_a_mask_that_is_none():
    model = create_model("uformer", **SMALL)
    with pytest.raises(UserError, match="valid is bool"):
        jax.eval_shape(lambda key, x: model.init(key, x, valid=x), jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


# The authors' names of the stages, beside ours.
_STAGES = {
    "conv": "bottleneck",
    **{f"{side}layer_{i}": f"{side}_{i}" for side in ("encoder", "decoder") for i in range(4)},
}


@pytest.mark.reference
@pytest.mark.parametrize("padding", ["masked", "original"])
def test_recorded_outputs(reference_data, padding):
    with np.load(reference_data / "goldens/uformer/uformer_tiny_seed_color.npz", allow_pickle=False) as archive:
        recorded = {key: archive[key] for key in archive.files}
    meta = json.loads(str(recorded["meta"]))
    model = create_model(
        "uformer",
        num_classes=meta["out_channels"],
        base=meta["embed_dim"],
        depths=meta["depths"],
        heads=meta["num_heads"],
        window=meta["win_size"],
        built_for=meta["img_size"],
        padding=padding,
    )
    for stage, window, shift, depth in zip(STAGES, *model.windows_and_shifts(), model.depths, strict=True):
        theirs = next(name for name, ours in _STAGES.items() if ours == stage)
        assert meta["last_block_window_shift"][theirs] == {"win": window, "shift": 0 if depth % 2 else shift}
    state = {key.removeprefix("sd/"): value for key, value in recorded.items() if key.startswith("sd/")}
    variables = convert(state, "uformer", model)
    images = recorded["in/x"].astype(np.float32).transpose(0, 2, 3, 1)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == meta["params"]
    apply = jax.jit(lambda v, x: model.apply(v, x, capture_intermediates=True, mutable=["intermediates"]))
    out, captured = apply(variables, images)
    np.testing.assert_allclose(out.logits, recorded["out/y"].transpose(0, 2, 3, 1), atol=1e-5)

    names = {
        "input_proj": "input",
        "bottleneck": "bottleneck",
        **_STAGES,
        **{f"dowsample_{i}": f"downsample_{i}" for i in range(4)},
    }
    seen = 0
    for key, expected in recorded.items():
        if not key.startswith("act/"):
            continue
        got = captured["intermediates"][names[key[4:]]]["__call__"][0]
        got = got.reshape(1, -1, got.shape[-1])
        if key == "act/input_proj":
            got = np.where(got > 0, got, 0.01 * got)
        got = got[:, :: got.shape[1] // expected.shape[1]]
        np.testing.assert_allclose(got, expected, atol=1e-5, err_msg=key)
        seen += 1
    assert seen == 9
