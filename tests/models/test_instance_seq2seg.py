"""Instance Seq2Seg: counts to the digit, the three heads in NumPy, queries in any order, outputs of every layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.errors import UserError
from jax_densevit.layers.boxes import paste_masks
from jax_densevit.layers.resize import resize_bilinear
from jax_densevit.models.counts import count_parameters
from jax_densevit.models.queries import QueryHeads
from jax_densevit.models.registry import create_model, find_model

TINY = {
    "num_classes": 3,
    "num_queries": 3,
    "mask_size": 6,
    "embedding_size": 5,
    "hidden_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_size": 12,
    "patch_size": 4,
    "image_size": (8, 12),
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
HEADS = ("token", "embedding", "box")


def tiny(mask_head="token", **options):
    return create_model("instance_seq2seg", **{**TINY, "mask_head": mask_head, **options})


def drawn(shapes, seed=1):
    """Parameters away from their start, where norms are plain and biases zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: (0.4 * rng.normal(size=p.shape)).astype(np.float32), shapes)


def variables_of(model):
    return drawn(jax.eval_shape(model.init, jax.random.key(0), IMAGES))


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("bert-8/16", 13_310_219),
        ("bert-8/32", 13_704_203),
        ("bert-4/32", 13_679_627),
        ("bert-16/32", 13_802_507),
        ("bert-8/64", 15_280_139),
    ],
)
def test_published_parameter_counts(variant, expected):
    assert count_parameters(create_model("instance_seq2seg", variant), (64, 64)) == expected


@pytest.mark.parametrize("mask_head", HEADS)
def test_macs_are_those_the_compiler_counts(mask_head):
    sizes = {"hidden_size": 32, "mlp_size": 96, "mask_size": 16, "embedding_size": 16, "mask_stride": 2}
    model = tiny(mask_head, **sizes)
    images = jnp.zeros((1, 40, 48, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    lowered = jax.jit(lambda v, x: model.apply(v, x).mask_logits).lower(variables, images)
    counted = lowered.cost_analysis()["flops"] / 2
    assert 1.0 < counted / find_model("instance_seq2seg").macs(model, (40, 48)) < 1.3  # norms, softmax, GELU beside


def dense(x, p):
    return x @ np.float64(p["kernel"]) + p["bias"]


@pytest.mark.parametrize("mask_head", HEADS)
def test_heads_equal_the_formulas(mask_head):
    rng = np.random.default_rng(2)
    states, patches = rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 2, 3, 8))
    pixels = rng.normal(size=(2, 7, 11, 5)) if mask_head == "embedding" else (7, 11)
    heads = QueryHeads(4, mask_head, mask_size=6, num_heads=2)
    given = (*map(_float32, (states, patches, pixels)), 4, (7, 11))
    variables = drawn(jax.eval_shape(lambda key: heads.init(key, *given), jax.random.key(0)))
    p = variables["params"]
    out = jax.jit(lambda variables: heads.apply(variables, *given))(variables)
    np.testing.assert_allclose(out.class_logits, dense(states, p["class"]), atol=1e-5)
    if mask_head != "embedding":
        masks = dense(states, p["mask"]).reshape(2, 3, 6, 6)
        if mask_head == "token":
            np.testing.assert_allclose(out.mask_logits, masks, atol=1e-5)
            assert out.boxes is None and out.box_masks is None and out.features == {}
            return
        hidden = np.maximum(dense(np.maximum(dense(states, p["box_0"]), 0), p["box_1"]), 0)
        boxes = 1 / (1 + np.exp(-dense(hidden, p["box_2"])))
        np.testing.assert_allclose(out.boxes, boxes, atol=1e-5)
        np.testing.assert_allclose(out.box_masks, masks, atol=1e-5)
        np.testing.assert_allclose(out.mask_logits, paste_masks(out.box_masks, out.boxes, (7, 11)), atol=1e-5)
        return
    embedding = dense(np.maximum(dense(states, p["mask_0"]), 0), p["mask_1"])
    q = dense(states, p["look_query"]).reshape(2, 3, 2, 4)
    k = dense(patches, p["look_patch"]).reshape(2, 6, 2, 4)
    maps = np.exp(np.einsum("bqhd,bphd->bqhp", q, k) / 2)
    maps /= maps.sum((2, 3), keepdims=True)  # over heads and places together
    seen = np.einsum("bqhp,h->bqp", np.log(12 * maps), p["look_weight"]).reshape(2, 3, 2, 3)
    # The patches protrude: their 8 x 12 pixels are cut to 7 x 11.
    seen = resize_bilinear(seen.astype(np.float32)[..., None], (8, 12))[:, :, :7, :11, 0]
    np.testing.assert_allclose(out.mask_logits, np.einsum("bqe,bhwe->bqhw", embedding, pixels) + seen, atol=1e-4)
    np.testing.assert_allclose(out.features["attention"], maps.reshape(2, 3, 2, 2, 3), atol=1e-6)


def _float32(x):
    return x.astype(np.float32) if isinstance(x, np.ndarray) else x


@pytest.mark.parametrize("mask_head", HEADS)
def test_every_parameter_learns_and_every_layer_answers(mask_head):
    model = tiny(mask_head, auxiliary=True)
    variables = variables_of(model)

    def loss(variables):
        out = model.apply(variables, IMAGES, train=True)
        outputs = (out, *out.auxiliary)
        parts = [x for o in outputs for x in (o.class_logits, o.mask_logits, o.boxes, o.box_masks) if x is not None]
        return sum(jnp.square(x - 1).mean() for x in parts), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
    learns = jax.tree.map(lambda g: bool(np.isfinite(g).all() and np.abs(g).max() > 0), gradients["params"])
    assert all(jax.tree.leaves(learns)), learns
    assert len(out.auxiliary) == 1 and out.auxiliary[0].auxiliary == () and out.covers == (8, 12)
    # What is asked after the first block is what a model of one block says.
    first = jax.jit(tiny(mask_head, num_layers=1).apply)(variables, IMAGES)
    np.testing.assert_allclose(out.auxiliary[0].class_logits, first.class_logits, atol=1e-5)
    last = jax.jit(tiny(mask_head).apply)(variables, IMAGES)
    assert last.auxiliary == ()
    for got, expected in zip(jax.tree.leaves(out.replace(auxiliary=())), jax.tree.leaves(last), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    if mask_head == "embedding":
        maps = out.features["attention"]
        assert maps.shape == (2, 3, 2, 2, 3)
        np.testing.assert_allclose(maps.sum((2, 3, 4)), 1, atol=1e-5)
    elif mask_head == "box":
        assert out.box_masks.shape == (2, 3, 6, 6) and (out.boxes > 0).all() and (out.boxes < 1).all()
    assert out.mask_logits.shape == (2, 3, *((6, 6) if mask_head == "token" else (8, 12)))


def test_queries_have_no_order_but_in_berts_form():
    for bert in (False, True):
        model = tiny(bert_compatible=bert)
        variables = variables_of(model)
        turned = jax.tree.map(lambda leaf: leaf, variables)
        turned["params"]["queries"] = variables["params"]["queries"][::-1]
        apply = jax.jit(model.apply)
        straight, other = apply(variables, IMAGES), apply(turned, IMAGES)
        same = np.allclose(straight.mask_logits[:, ::-1], other.mask_logits, atol=1e-5)
        assert same == (not bert)


def test_any_size_and_gray():
    """Padded at the bottom and the right; gray sees the mean of the channels only."""
    images = np.random.default_rng(1).normal(size=(1, 10, 7, 3)).astype(np.float32)
    model = tiny("embedding", gray=True, mask_stride=2, norm_style="pre")
    variables = variables_of(model)
    apply = jax.jit(model.apply)
    out = apply(variables, images)
    assert out.covers == (12, 8) and out.mask_logits.shape == (1, 3, 6, 4)
    assert out.features["attention"].shape == (1, 3, 2, 3, 2)
    np.testing.assert_allclose(apply(variables, images[..., ::-1]).mask_logits, out.mask_logits, atol=1e-5)
    other = np.repeat(images.mean(-1, keepdims=True), 3, -1)
    np.testing.assert_allclose(apply(variables, other).mask_logits, out.mask_logits, atol=1e-4)


@pytest.mark.parametrize("mask_head", HEADS)
def test_half_precision_computes_in_it_and_answers_in_float32(mask_head):
    variables = variables_of(tiny(mask_head))
    exact = jax.jit(tiny(mask_head).apply)(variables, IMAGES)
    out = jax.jit(tiny(mask_head, dtype="bfloat16").apply)(variables, IMAGES)
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype("float32")}
    assert 0 < np.abs(out.class_logits - exact.class_logits).max() < 0.1 * np.abs(exact.class_logits).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_head": "tokens"}, "did you mean 'token'"),
        ({"mask_stride": 3}, "must divide patch_size=4"),
        ({"mask_stride": 0}, "mask_stride=0"),
        ({"bert_compatible": True, "image_size": 8, "norm_style": "pre"}, "needs norm_style='post'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(tiny(**options).init, jax.random.key(0), IMAGES)


def test_more_queries_and_patches_than_bert_has_positions():
    model = tiny(bert_compatible=True)
    variables = variables_of(model)
    jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((1, 4, 4 * 509, 3), jnp.float32))
    with pytest.raises(UserError, match="512 positions"):
        jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((1, 4, 4 * 510, 3), jnp.float32))
