"""U-Net: published sizes to the digit, odd sizes, recorded outputs of the PyTorch form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.errors import UserError
from jax_densevit.models.registry import create_model, find_model
from jax_densevit.pretrained import convert


def parameters(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize(
    "variant,num_classes,expected",
    [
        ("64", 3, 31_037_763),
        ("64", 2, 31_037_698),
        ("64", 40, 31_040_168),
        ("32", 34, 7_764_130),
        ("bilinear-64", 3, 17_263_107),
    ],
)
def test_published_parameter_counts(variant, num_classes, expected):
    assert parameters(create_model("unet", variant, num_classes=num_classes)) == expected


@pytest.mark.parametrize(
    "size,num_classes,giga", [((224, 224), 3, 36.9), ((256, 256), 3, 48.2), ((256, 256), 40, 48.3)]
)
def test_published_macs(size, num_classes, giga):
    macs = find_model("unet").macs(create_model("unet", num_classes=num_classes), size)
    assert round(macs / 1e9, 1) == giga


@pytest.mark.parametrize("bilinear", [False, True])
def test_macs_are_those_the_compiler_counts(bilinear):
    """At tiny widths the rest (norms, interpolation) weighs more; the products must be within a few percent."""
    model = create_model("unet", "32", bilinear=bilinear, num_classes=5)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 48, 3)))
    lowered = jax.jit(lambda v, x: model.apply(v, x).logits).lower(variables, jnp.zeros((1, 32, 48, 3)))
    counted = lowered.cost_analysis()["flops"] / 2
    # The compiler leaves out the products with the zeros of the borders: a third of a 3x3 kernel at 2 x 3 pixels.
    assert 0.75 < counted / find_model("unet").macs(model, (32, 48)) < 1.03


@pytest.mark.parametrize("size,bilinear", [((33, 47), False), ((50, 38), True)])
def test_any_size_from_sixteen_pixels(size, bilinear):
    model = create_model("unet", base=2, bilinear=bilinear, num_classes=4)
    images = jax.random.normal(jax.random.key(0), (2, *size, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    out = jax.jit(model.apply)(variables, images)
    assert out.logits.shape == (2, *size, 4) and out.logits.dtype == jnp.float32
    assert out.covers == size and out.auxiliary == ()
    assert out.features["bottleneck"].shape[1:3] == (size[0] // 16, size[1] // 16)

    # Training touches every parameter and updates every statistic.
    def loss(params):
        out, updates = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return jnp.square(out.logits - 1).mean(), updates["batch_stats"]

    gradients, statistics = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients["head"]))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), statistics, variables["batch_stats"])
    assert all(jax.tree.leaves(moved))


def test_flip_moves_nothing_at_multiples_of_sixteen():
    """Pooling and upsampling on multiples of 16 keep the grid centred: mirrored kernels mirror the output."""
    model = create_model("unet", base=2, num_classes=2)
    images = jax.random.normal(jax.random.key(0), (1, 32, 48, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    mirrored = jax.tree.map(lambda leaf: leaf[:, ::-1] if leaf.ndim == 4 else leaf, variables)
    apply = jax.jit(model.apply)
    straight = apply(variables, images).logits
    np.testing.assert_allclose(apply(mirrored, images[:, :, ::-1]).logits[:, :, ::-1], straight, atol=1e-5)


def test_half_precision_computes_in_it_and_answers_in_float32():
    model = create_model("unet", base=4, num_classes=2, dtype="bfloat16")
    images = jax.random.normal(jax.random.key(0), (1, 16, 16, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    out = jax.jit(model.apply)(variables, images)
    assert out.features["bottleneck"].dtype == jnp.bfloat16 and out.logits.dtype == jnp.float32
    exact = jax.jit(create_model("unet", base=4, num_classes=2).apply)(variables, images).logits
    assert 0 < np.abs(out.logits - exact).max() < 0.1 * np.abs(exact).max()


def test_refusals():
    with pytest.raises(UserError, match="smaller than 16 x 16"):
        create_model("unet", base=2).init(jax.random.key(0), jnp.zeros((1, 15, 64, 3)))
    with pytest.raises(UserError, match="even with bilinear"):
        create_model("unet", base=3, bilinear=True).init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))


@pytest.mark.reference
def test_recorded_outputs(reference_data):
    recorded = np.load(reference_data / "goldens/unet/unet_tiny_deconv.npz", allow_pickle=False)
    model = create_model("unet", base=4, num_classes=5)
    state = {name[3:]: recorded[name] for name in recorded.files if name.startswith("sd/")}
    variables = convert(state, "unet", model)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 122_113
    apply = jax.jit(model.apply, static_argnames=("train", "mutable"))
    for size in ("48x32", "50x38"):
        images = jnp.asarray(recorded[f"in/x_{size}"], jnp.float32).transpose(0, 2, 3, 1)
        out = apply(variables, images)
        np.testing.assert_allclose(out.logits, recorded[f"out/eval_{size}"].transpose(0, 2, 3, 1), atol=1e-5)
        if size == "48x32":
            expected = recorded["act/down4"].transpose(0, 2, 3, 1)
            np.testing.assert_allclose(out.features["bottleneck"], expected, atol=1e-5)
    images = jnp.asarray(recorded["in/x_48x32"], jnp.float32).transpose(0, 2, 3, 1)
    out, after = apply(variables, images, train=True, mutable="batch_stats")
    np.testing.assert_allclose(out.logits, recorded["out/train_48x32"].transpose(0, 2, 3, 1), atol=1e-5)
    after = after["batch_stats"]
    for name, got in (
        ("inc.double_conv.1.running_mean", after["encoder_0"]["first"]["norm"]["mean"]),
        ("inc.double_conv.1.running_var", after["encoder_0"]["first"]["norm"]["var"]),
        ("up4.conv.double_conv.4.running_var", after["decoder_0"]["second"]["norm"]["var"]),
    ):
        np.testing.assert_allclose(got, recorded[f"after/{name}"], atol=1e-6, err_msg=name)
