"""Seq2Seg: counts to the digit, the whole model in NumPy, sizes, dropout as in BERT."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.errors import UserError
from jax_densevit.models.counts import count_parameters
from jax_densevit.models.registry import create_model, find_model

TINY = {
    "num_classes": 3,
    "hidden_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_size": 12,
    "patch_size": 4,
    "image_size": (8, 12),
}
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)


def tiny(**options):
    return create_model("seq2seg", **{**TINY, **options})


def variables_of(model, seed=1):
    """Parameters away from their start, where norms are plain and biases zero."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: (0.4 * rng.normal(size=p.shape)).astype(np.float32), shapes)


@pytest.mark.parametrize(
    ("variant", "options", "expected"),
    [
        ("skip", {}, 49_903_906),
        ("no_skip", {}, 49_903_906),
        ("skip", {"token_type": False}, 49_902_370),
        ("skip", {"norm_style": "pre"}, 49_903_906 + 1536),
        ("bert", {}, 50_789_410),
        ("bert_no_skip", {}, 50_789_410),
        ("bert", {"vocabulary": 1}, 50_790_178),
    ],
)
def test_published_parameter_counts(variant, options, expected):
    assert count_parameters(create_model("seq2seg", variant, num_classes=34, **options), (128, 256)) == expected


def test_macs_are_those_the_compiler_counts():
    model = tiny(hidden_size=32, mlp_size=96)
    images = jnp.zeros((1, 40, 48, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    lowered = jax.jit(lambda v, x: model.apply(v, x).logits).lower(variables, images)
    counted = lowered.cost_analysis()["flops"] / 2
    assert 1.0 < counted / find_model("seq2seg").macs(model, (40, 48)) < 1.25  # norms, softmax and GELU beside


def by_hand(params, images, skip, include_embedding, norm_style):
    """The whole model in NumPy float64."""

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]

    def attention(x, p):
        q, k, v = np.einsum("btd,dphe->pbthe", x, p["qkv"]["kernel"]) + p["qkv"]["bias"][:, None, None]
        weights = np.exp(np.einsum("bthe,bshe->bhts", q, k) / math.sqrt(q.shape[-1]))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("bhts,bshe,hed->btd", weights, v, p["out"]["kernel"]) + p["out"]["bias"]

    def mlp(x, p):
        x = x @ p["fc1"]["kernel"] + p["fc1"]["bias"]
        x = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return x @ p["fc2"]["kernel"] + p["fc2"]["bias"]

    x = np.zeros((2, 6, 8))
    for row in range(2):
        for column in range(3):
            patch = images[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            kernel = params["embedding"]["kernel"]
            x[:, 3 * row + column] = np.einsum("bijc,ijcd->bd", patch, kernel) + params["embedding"]["bias"]
    x = norm(x + params["position_embedding"][:, :6] + params["token_type_embedding"][0], params["norm"])
    states = [x]
    for i in range(2):
        p = params["encoder"][f"block_{i}"]
        if norm_style == "post":
            x = norm(x + attention(x, p["attention"]), p["norm1"])
            x = norm(x + mlp(x, p["mlp"]), p["norm2"])
        else:
            x = x + attention(norm(x, p["norm1"]), p["attention"])
            x = x + mlp(norm(x, p["norm2"]), p["mlp"])
        states.append(x)
    hidden = sum(states if include_embedding else states[1:]) if skip else x
    if norm_style == "pre":
        hidden = norm(hidden, params["final_norm"])
    logits = np.zeros((2, 8, 12, 3))
    for row in range(8):
        for column in range(12):
            token = hidden[:, 3 * (row // 4) + column // 4]
            logits[:, row, column] = token @ params["head"]["kernel"][row % 4, column % 4] + params["head"]["bias"]
    return logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"skip": False},
        {"include_embedding": False},
        {"norm_style": "pre"},
        {"bert_compatible": True, "vocabulary": 2, "remat": "full"},
    ],
    ids=str,
)
def test_equals_the_formulas(options):
    model = tiny(**options)
    variables = variables_of(model)
    out = jax.jit(model.apply)(variables, IMAGES)
    params = jax.tree.map(np.float64, variables["params"])
    chosen = {name: options.get(name, getattr(model, name)) for name in ("skip", "include_embedding", "norm_style")}
    np.testing.assert_allclose(out.logits, by_hand(params, IMAGES, **chosen), atol=2e-5)
    assert out.logits.dtype == jnp.float32 and out.covers == (8, 12) and out.auxiliary == ()

    def loss(variables):
        rngs = {"dropout": jax.random.key(3)}
        return jnp.square(model.apply(variables, IMAGES, train=True, rngs=rngs).logits - 1).mean()

    gradients = jax.jit(jax.grad(loss))(variables)["params"]
    still = {"pooler_kernel", "pooler_bias", "word_embedding"}  # BERT's, which nothing reads
    for name, part in gradients.items():
        learns = [bool(np.abs(leaf).max() > 0) for leaf in jax.tree.leaves(part)]
        assert all(learns) if name not in still else not any(learns), name


def test_any_size():
    """Padded at the bottom and the right; positions follow the grid, or count along the rows in BERT's form."""
    images = np.random.default_rng(1).normal(size=(1, 10, 7, 3)).astype(np.float32)
    model = tiny()
    variables = variables_of(model)
    out = jax.jit(model.apply)(variables, images)
    assert out.covers == (12, 8) and out.logits.shape == (1, 12, 8, 3)
    padded = jax.jit(model.apply)(variables, np.pad(images, ((0, 0), (0, 2), (0, 1), (0, 0))))
    np.testing.assert_array_equal(out.logits, padded.logits)
    # In BERT's form the first six rows are read.
    bert = tiny(bert_compatible=True)
    given = variables_of(bert)
    changed = jax.tree.map(lambda leaf: leaf, given)
    changed["params"]["position_embedding"] = given["params"]["position_embedding"].copy()
    changed["params"]["position_embedding"][:, 6:, 0] += 1
    apply = jax.jit(bert.apply)
    np.testing.assert_array_equal(apply(given, images).logits, apply(changed, images).logits)
    changed["params"]["position_embedding"][:, 5, 0] += 1
    assert np.abs(apply(given, images).logits - apply(changed, images).logits).max() > 1e-3
    with pytest.raises(UserError, match="512 positions"):
        jax.eval_shape(bert.apply, given, jax.ShapeDtypeStruct((1, 108, 76, 3), jnp.float32))


def test_dropout_only_in_training_and_in_both_places():
    model = tiny(dropout=0.0, attention_dropout=0.0)
    variables = variables_of(model)
    exact = jax.jit(model.apply)(variables, IMAGES).logits
    np.testing.assert_array_equal(jax.jit(tiny().apply)(variables, IMAGES).logits, exact)
    for rates in ({"dropout": 0.5, "attention_dropout": 0.0}, {"dropout": 0.0, "attention_dropout": 0.5}):
        rngs = {"dropout": jax.random.key(0)}
        dropped = tiny(**rates).apply(variables, IMAGES, train=True, rngs=rngs).logits
        assert np.abs(dropped - exact).max() > 1e-3


def test_half_precision_computes_in_it_and_answers_in_float32():
    variables = variables_of(tiny())
    exact = jax.jit(tiny().apply)(variables, IMAGES).logits
    out = jax.jit(tiny(dtype="bfloat16").apply)(variables, IMAGES)
    assert out.logits.dtype == jnp.float32
    assert 0 < np.abs(out.logits - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bert_compatible": True, "norm_style": "pre"}, "needs norm_style='post'"),
        ({"bert_compatible": True, "token_type": False}, "token_type=True"),
        ({"vocabulary": 1}, "part of BERT only"),
        ({"norm_style": "past"}, "did you mean 'post'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(tiny(**options).init, jax.random.key(0), IMAGES)
