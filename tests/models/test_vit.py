import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.errors import UserError
from jax_densevit.models import create_model
from jax_densevit.models.counts import count_parameters
from jax_densevit.models.registry import find_model

TINY = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "mlp_size": 12, "patch_size": 4, "image_size": 8}
X = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


def build(images=X, **options):
    model = create_model("vit", **{**TINY, "num_classes": 5, **options})
    return model, jax.jit(model.init)(jax.random.key(0), images)


@pytest.mark.parametrize(
    "variant,without_head,gmacs",
    [
        ("Ti/16", 5_524_416, 1.3),
        ("S/16", 21_665_664, 4.6),
        ("B/16", 85_798_656, 17.6),
        ("L/16", 303_301_632, 61.6),
        ("H/14", 630_764_800, 167.3),
    ],
)
def test_published_counts(variant, without_head, gmacs):
    model = create_model("vit", variant, scan=True)
    assert count_parameters(model, (224, 224)) == without_head + 1000 * (model.hidden_size + 1)
    assert round(find_model("vit").macs(model, (224, 224)) / 1e9, 1) == gmacs


@pytest.mark.parametrize(
    "variant,side,gmacs", [("Ti/16", 768, 37.1), ("S/16", 480, 26.9), ("B/16", 512, 107.0), ("L/16", 384, 191.1)]
)
def test_macs_at_other_sizes(variant, side, gmacs):
    assert round(find_model("vit").macs(create_model("vit", variant), (side, side)) / 1e9, 1) == gmacs


def test_macs_equal_xlas_count():
    """Of the unrolled model, at a size where matrix products dwarf the rest."""
    model = create_model("vit", hidden_size=256, num_layers=2, num_heads=4, mlp_size=1024, num_classes=10)
    image = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    flops = jax.jit(model.apply).lower(variables, image).compile().cost_analysis()["flops"]
    macs = find_model("vit").macs(model, (64, 96))
    # The rest: softmax, norms, GELU and residuals.
    assert 1.0 <= flops / (2 * macs) < 1.06


def test_parameter_tree():
    _, variables = build()
    tree = jax.tree.map(jnp.shape, variables["params"])
    assert sorted(tree) == ["backbone", "head", "norm"]
    assert sorted(tree["backbone"]) == ["embedding", "encoder", "tokens"]
    assert tree["backbone"]["encoder"]["block_1"]["attention"]["out"]["kernel"] == (2, 4, 8)
    assert tree["backbone"]["tokens"] == {"cls_token": (1, 1, 8), "position_embedding": (1, 5, 8)}


def test_distilled():
    """In training one head each; in evaluation their mean (DeiT, section 4)."""
    model, variables = build(distilled=True)
    train = model.apply(variables, X, train=True)
    (other,) = train.auxiliary
    assert np.abs(train.logits - other).max() > 1e-3
    evaluated = model.apply(variables, X)
    assert evaluated.auxiliary == ()
    np.testing.assert_allclose(evaluated.logits, (train.logits + other) / 2, atol=1e-6)


def test_pooling():
    model, variables = build(pool="gap")
    output = model.apply(variables, X)
    head = variables["params"]["head"]
    want = output.features["tokens"][:, 1:].mean(1) @ head["kernel"] + head["bias"]
    np.testing.assert_allclose(output.logits, want, atol=1e-5)
    model, variables = build(pool="gap", cls_token=False)
    assert model.apply(variables, X).features["tokens"].shape == (2, 4, 8)
    with pytest.raises(UserError, match="use pool='gap'"):
        build(cls_token=False)
    with pytest.raises(UserError, match="did you mean 'gap'"):
        build(pool="gapp")
    with pytest.raises(UserError, match="needs cls_token=True"):
        build(pool="gap", cls_token=False, distilled=True)


@pytest.mark.parametrize("size", [(8, 16), (12, 4), (9, 15)])
def test_any_image_size(size):
    """Positions follow the image; sizes beside the patch are padded with zeros at the bottom and the right."""
    model, variables = build()
    images = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
    output = model.apply(variables, images)
    rows, columns = (-(-side // 4) for side in size)
    assert output.features["tokens"].shape == (2, 1 + rows * columns, 8)
    padded = np.pad(images, ((0, 0), (0, -size[0] % 4), (0, -size[1] % 4), (0, 0)))
    np.testing.assert_array_equal(output.logits, model.apply(variables, padded).logits)


def test_bfloat16():
    model, variables = build(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    output = model.apply(variables, X)
    assert output.logits.dtype == jnp.float32 and output.features["tokens"].dtype == jnp.bfloat16
    full = create_model("vit", **TINY, num_classes=5).apply(variables, X)
    np.testing.assert_allclose(output.logits, full.logits, atol=0.05)


def test_every_parameter_learns():
    model, variables = build(distilled=True, dropout=0.1, drop_path=0.1, scan=True, remat="full")

    def loss(params):
        output = model.apply({"params": params}, X, train=True, rngs={"dropout": jax.random.key(3)})
        return jnp.sum(jnp.sin(output.logits)) + jnp.sum(jnp.cos(output.auxiliary[0]))

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.all(np.isfinite(leaf)) and np.any(leaf), jax.tree_util.keystr(path)
