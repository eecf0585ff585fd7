"""Queries on dense models of every kind, and the Hungarian U-Net."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.errors import UserError
from jax_densevit.models.counts import count_parameters
from jax_densevit.models.hungarian_unet import unet_of
from jax_densevit.models.registry import create_model, find_model

TINY_VIT = {"hidden_size": 8, "num_layers": 4, "num_heads": 2, "mlp_size": 12}
BACKBONES = {
    "unet": {"base": 2},
    "setr_naive": TINY_VIT,
    "setr_pup": TINY_VIT,
    "setr_mla": TINY_VIT,
    "dpt": {**TINY_VIT, "reassemble": (4, 4, 4, 4), "features": 4},
    "uformer": {"base": 4, "depths": (1,) * 9, "heads": (1,) * 9},
    "seq2seg": {**TINY_VIT, "patch_size": 8, "num_layers": 1},
    "axial": {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "mlp_size": 8},
}
STILL = {"dropout": 0.0, "attention_dropout": 0.0}
IMAGES = np.random.default_rng(0).normal(size=(2, 40, 56, 3)).astype(np.float32)


def tiny(backbone="unet", **options):
    sizes = {"num_classes": 3, "num_queries": 4, "embedding_size": 6, "hidden_size": 8, "num_layers": 2}
    sizes |= {"num_heads": 2, "mlp_size": 12, "image_size": 64, "backbone": backbone, "backbone_variant": ""}
    return create_model("queries", **{**sizes, "backbone_options": BACKBONES[backbone], **options})


@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_dense_model_carries_them(backbone):
    """The masks are at the resolution of the dense model's map and stretch over what it covers."""
    model = tiny(backbone)
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGES)
    out = jax.eval_shape(model.apply, variables, IMAGES)
    dense = create_model(backbone, **{"num_classes": 6, **BACKBONES[backbone]})
    if "image_size" in find_model(backbone).options:
        dense = dense.clone(image_size=64)
    alone = jax.eval_shape(lambda key, images: dense.init_with_output(key, images)[0], jax.random.key(0), IMAGES)
    assert out.class_logits.shape == (2, 4, 4) and out.covers == alone.covers
    assert out.mask_logits.shape == (2, 4, *alone.logits.shape[1:3])
    stride = alone.covers[0] // alone.logits.shape[1]
    grid = tuple(-(-side // (16 // stride)) for side in alone.logits.shape[1:3])
    assert out.features["attention"].shape == (2, 4, 2, *grid)
    assert not [name for name in variables["params"]["body"] if name.startswith("auxiliary")]
    assert find_model("queries").macs(model, (40, 56)) > find_model(backbone).macs(dense, (40, 56))


def test_macs_are_those_the_compiler_counts():
    model = tiny(hidden_size=32, mlp_size=128, embedding_size=16, num_queries=20, backbone_options={"base": 16})
    images = jnp.zeros((1, 64, 64, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    lowered = jax.jit(lambda v, x: model.apply(v, x).mask_logits).lower(variables, images)
    counted = lowered.cost_analysis()["flops"] / 2
    assert 0.85 < counted / find_model("queries").macs(model, (64, 64)) < 1.1  # zeros of the borders; norms, softmax


def test_every_parameter_learns_and_queries_have_no_order():
    model = tiny("seq2seg", backbone_options=BACKBONES["seq2seg"] | STILL)
    variables = jax.jit(model.init)(jax.random.key(1), IMAGES)

    def loss(params):
        out = model.apply({"params": params}, IMAGES, train=True)
        outputs = (out, *out.auxiliary)
        return sum(jnp.square(x - 1).mean() for o in outputs for x in (o.class_logits, o.mask_logits)), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients)) and len(out.auxiliary) == 1
    learns = jax.tree.map(lambda g: bool(np.abs(g).max() > 0), gradients)
    assert all(jax.tree.leaves(learns)), learns
    turned = {**variables["params"], "queries": variables["params"]["queries"][::-1]}
    apply = jax.jit(model.apply)
    straight, other = apply(variables, IMAGES), apply({**variables, "params": turned}, IMAGES)
    assert straight.auxiliary == ()
    np.testing.assert_allclose(straight.mask_logits[:, ::-1], other.mask_logits, atol=1e-4)
    np.testing.assert_allclose(straight.class_logits[:, ::-1], other.class_logits, atol=1e-4)
    np.testing.assert_allclose(straight.features["attention"].sum((2, 3, 4)), 1, atol=1e-5)


def test_refusals():
    for backbone, options, message in (
        ("vit", {}, "no dense model"),
        ("queries", {}, "no dense model"),
        ("unett", {}, "did you mean 'unet'"),
        ("unet", {"bass": 2}, "did you mean 'base'"),
    ):
        with pytest.raises(UserError, match=message):
            model = create_model("queries", backbone=backbone, backbone_variant="", backbone_options=options)
            jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))


# --- Hungarian U-Net ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "expected"), [("32", 7_766_308), ("32-bias", 7_769_252)])
def test_published_parameter_counts(variant, expected):
    model = create_model("hungarian_unet", variant)
    assert count_parameters(unet_of(model), (128, 256)) == expected
    assert count_parameters(model, (128, 256)) == expected + 461_700


def hungarian(**options):
    sizes = {"num_classes": 3, "num_queries": 5, "base": 4, "image_size": 32, "dropout": 0.0}
    return create_model("hungarian_unet", **{**sizes, **options})


def test_hungarian_macs_are_those_the_compiler_counts():
    model = hungarian(base=32, num_layers=1)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    lowered = jax.jit(lambda v, x: model.apply(v, x)).lower(variables, jnp.zeros((1, 64, 64, 3)))
    counted = lowered.cost_analysis()["flops"] / 2
    assert 0.85 < counted / find_model("hungarian_unet").macs(model, (64, 64)) < 1.03


def test_hungarian_unet():
    model = hungarian(num_layers=1, auxiliary=True, conv_bias=True)
    images = np.random.default_rng(0).normal(size=(2, 33, 47, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(1), images)
    out = jax.jit(model.apply)(variables, images)
    assert out.class_logits.shape == (2, 5, 4) and out.mask_logits.shape == (2, 5, 33, 47)
    assert out.covers == (33, 47) and out.auxiliary == () and out.boxes is None
    # Channel q of the U-Net is query q, its class is read from the mean of the encoder's output.
    dense = jax.jit(unet_of(model).apply)({name: tree["unet"] for name, tree in variables.items()}, images)
    np.testing.assert_allclose(out.mask_logits[:, 3], dense.logits[..., 3], atol=1e-5)
    p = variables["params"]["classes"]
    classes = np.asarray(dense.features["bottleneck"]).mean((1, 2)) @ p["kernel"] + p["bias"]
    np.testing.assert_allclose(out.class_logits, classes.reshape(2, 5, 4), atol=1e-4)

    def loss(params):
        out, _ = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        outputs = (out, *out.auxiliary)
        return sum(jnp.square(x - 1).mean() for o in outputs for x in (o.class_logits, o.mask_logits)), out

    (_, trained), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
    shapes = [layer.mask_logits.shape for layer in trained.auxiliary]
    assert shapes == [(2, 5, 4, 5), (2, 5, 8, 11), (2, 5, 16, 23)]
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(gradient).all(), path
        # What a batch norm takes away again learns nothing.
        assert np.abs(gradient).max() > 0 or "['conv']['bias']" in jax.tree_util.keystr(path), path
