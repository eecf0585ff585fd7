"""The study's axial transformer: published sizes, the formulas in NumPy, recorded numbers, constant memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.errors import UserError
from jax_densevit.layers.transformer import stack_blocks, unstack_blocks
from jax_densevit.models.axial import ChannelNorm
from jax_densevit.models.counts import count_parameters
from jax_densevit.models.registry import create_model, find_model
from jax_densevit.pretrained import convert

TINY = {"num_classes": 5, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "mlp_size": 12}
IMAGES = np.random.default_rng(0).normal(size=(2, 5, 7, 3)).astype(np.float32)


def tiny(**options):
    return create_model("axial", **{**TINY, **options})


@pytest.fixture(scope="module")
def variables():
    """Parameters away from their start, where norms are plain and biases small."""
    variables = jax.jit(tiny().init)(jax.random.key(0), IMAGES)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: (p + 0.2 * rng.normal(size=p.shape)).astype(np.float32), variables)


@pytest.mark.parametrize(
    ("num_classes", "options", "expected"),
    [
        (3, {"head_kernel": 1}, 19_944_323),  # the colorizer
        (40, {}, 19_990_056),  # the segmenter
        (3, {}, 19_947_395),
        (3, {"reversible": False}, 19_947_395),
        (3, {"positions": True, "image_size": (64, 48)}, 19_947_395 + 112 * 128),
    ],
)
def test_published_parameter_counts(num_classes, options, expected):
    for scan in (False, True):
        model = create_model("axial", num_classes=num_classes, scan=scan, **options)
        assert count_parameters(model, (8, 8)) == expected


@pytest.mark.parametrize(("side", "num_classes", "giga"), [(224, 3, 1045.9), (256, 3, 1374.6), (256, 40, 1377.4)])
def test_published_macs(side, num_classes, giga):
    macs = find_model("axial").macs(create_model("axial", num_classes=num_classes), (side, side))
    assert round(macs / 1e9, 1) == giga


def test_macs_are_those_the_compiler_counts():
    model = tiny(hidden_size=32, mlp_size=64)
    images = jnp.zeros((1, 24, 40, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    lowered = jax.jit(lambda v, x: model.apply(v, x).logits).lower(variables, images)
    counted = lowered.cost_analysis()["flops"] / 2
    # The compiler leaves out the products with the zeros of the borders, and counts norms and softmax.
    assert 0.85 < counted / find_model("axial").macs(model, (24, 40)) < 1.1


def by_hand(params, images, reversible):
    """The whole model in NumPy float64."""

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    def conv(x, p):
        size = p["kernel"].shape[0]
        padded = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
        shifts = [(a, b, padded[:, a : a + x.shape[1], b : b + x.shape[2]]) for a in range(size) for b in range(size)]
        return sum(shift @ p["kernel"][a, b] for a, b, shift in shifts) + p["bias"]

    def attention(p, x, lines):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        y = (x - mean) / np.sqrt(variance + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]
        q, k, v = np.moveaxis(np.einsum("bijc,cphd->bijphd", y, p["qkv"]["kernel"]), 3, 0)
        scores = np.einsum(f"{lines[0]},{lines[1]}->{lines[2]}", q, k) * q.shape[-1] ** -0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum(f"{lines[2]},{lines[1]}->{lines[0]}", weights, v)
        return np.einsum("bijhd,hdc->bijc", y, p["out"]["kernel"]) + p["out"]["bias"]

    def mlp(p, x):
        deviation = x.std(-1, keepdims=True) + 1e-5
        y = (x - x.mean(-1, keepdims=True)) / deviation * p["norm"]["scale"] + p["norm"]["bias"]
        y = conv(y, p["conv1"])
        return conv(np.where(y > 0, y, 0.01 * y), p["conv2"])

    x = dense(images.astype(np.float64), params["embedding"])
    first, second = x, x
    for i in range(len(params["layers"])):
        p = params["layers"][f"block_{i}"]
        for f, g in (
            (
                lambda x, p=p: attention(p["height"], x, ("bijhd", "bkjhd", "bjhik")),
                lambda x, p=p: attention(p["width"], x, ("bijhd", "bikhd", "bihjk")),
            ),
            (lambda x, p=p: mlp(p["mlp1"], x), lambda x, p=p: mlp(p["mlp2"], x)),
        ):
            if reversible:
                first = first + f(second)
                second = second + g(first)
            else:
                x = x + f(x)
                x = x + g(x)
    return conv((first + second) / 2 if reversible else x, params["head"])


@pytest.mark.parametrize("reversible", [True, False])
def test_equals_the_formulas(variables, reversible):
    out = jax.jit(tiny(reversible=reversible).apply)(variables, IMAGES)
    want = by_hand(jax.tree.map(np.float64, variables["params"]), IMAGES, reversible)
    assert out.logits.dtype == jnp.float32 and out.covers == (5, 7)
    np.testing.assert_allclose(out.logits, want, atol=2e-5)


def gradient(model, variables, images=IMAGES):
    def loss(variables):
        return jnp.square(model.apply(variables, images, train=True).logits - 1).mean()

    return jax.jit(jax.grad(loss))(variables)["params"]


@pytest.mark.parametrize("reversible", [True, False])
def test_scanned_equals_unrolled(variables, reversible):
    """In their gradients; every parameter learns."""
    unrolled = gradient(tiny(reversible=reversible), variables)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(unrolled))
    model = tiny(reversible=reversible, scan=True)
    scanned = unstack_blocks(gradient(model, {"params": stack_blocks(variables["params"])}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), scanned, unrolled)


def test_scanned_and_unrolled_start_alike():
    start = unstack_blocks(jax.jit(tiny(scan=True).init)(jax.random.key(0), IMAGES)["params"])
    jax.tree.map(np.testing.assert_array_equal, start, jax.jit(tiny().init)(jax.random.key(0), IMAGES)["params"])


def working_memory(num_layers, **options):
    """Bytes of temporaries of the compiled gradient, which parameters and their gradients are not among."""
    model = tiny(num_layers=num_layers, **options)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)

    def loss(variables, images):
        return jnp.square(model.apply(variables, images, train=True).logits).mean()

    return jax.jit(jax.grad(loss)).lower(variables, images).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_depth():
    """From the fourth layer on the reversible form takes nothing more; the plain form dozens of maps per layer."""
    one_map = 32 * 32 * TINY["hidden_size"] * 4

    def growth(**options):
        return working_memory(6, **options) - working_memory(4, **options)

    assert growth(reversible=False) > 2 * 20 * one_map
    assert growth() < one_map
    assert growth(scan=True) == 0


def test_positions_tell_pixels_apart_and_follow_the_size():
    model = tiny(positions=True, image_size=(5, 7), num_layers=1)
    variables = jax.jit(model.init)(jax.random.key(0), IMAGES)
    params = variables["params"]
    assert params["position_height"].shape == (1, 5, 8) and params["position_width"].shape == (1, 7, 8)
    assert 0.7 < np.std(np.concatenate([params["position_height"], params["position_width"]], 1)) < 1.3
    # They are added per row and per column: the embedding's bias and the tables move together.
    shifted = jax.tree.map(lambda p: p, params)
    shifted["embedding"]["bias"] = params["embedding"]["bias"] + 2.0
    shifted["position_height"] = params["position_height"] - 0.5
    shifted["position_width"] = params["position_width"] - 1.5
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(
        apply({"params": shifted}, IMAGES).logits, apply({"params": params}, IMAGES).logits, atol=1e-5
    )
    # A table that is a ramp stays one at twice the size: samples at pixel centres, clamped at the ends.
    ramp = {**params, "position_height": jnp.broadcast_to(jnp.arange(5.0)[None, :, None], (1, 5, 8))}
    doubled = {**params, "position_height": jnp.zeros((1, 10, 8)), "position_width": params["position_width"]}
    doubled["position_height"] += jnp.clip((jnp.arange(10.0) + 0.5) / 2 - 0.5, 0, 4)[None, :, None]
    tall = np.repeat(IMAGES, 2, axis=1)
    want = jax.jit(tiny(positions=True, image_size=(10, 7), num_layers=1).apply)({"params": doubled}, tall)
    np.testing.assert_allclose(apply({"params": ramp}, tall).logits, want.logits, atol=1e-5)


def test_channel_norm_of_equal_channels_has_a_gradient():
    x = jnp.ones((1, 2, 2, 4)).at[0, 0, 0].set(jnp.arange(4.0))
    norm = ChannelNorm()
    variables = norm.init(jax.random.key(0), x)
    y = norm.apply(variables, x)
    np.testing.assert_allclose(y[0, 0, 0], (np.arange(4) - 1.5) / (np.std(np.arange(4)) + 1e-5), rtol=1e-5)
    np.testing.assert_array_equal(y[0, 1], 0)
    assert np.isfinite(jax.grad(lambda x: jnp.sum(norm.apply(variables, x) ** 3))(x)).all()


def test_half_precision_computes_in_it_and_answers_in_float32(variables):
    exact = jax.jit(tiny().apply)(variables, IMAGES).logits
    out = jax.jit(tiny(dtype="bfloat16").apply)(variables, IMAGES)
    assert out.logits.dtype == out.features["body"].dtype == jnp.float32
    assert 0 < np.abs(out.logits - exact).max() < 0.1 * np.abs(exact).max()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient(tiny(dtype="bfloat16"), variables)))


def test_refusals():
    for options, message in (
        ({"num_heads": 3}, "num_heads=3 does not divide"),
        ({"head_kernel": 2}, "must be 1 or 3"),
        ({"remat": "full"}, "recompute everything already"),
        ({"reversible": False, "remat": "all"}, "rematerialisation policy"),
    ):
        with pytest.raises(UserError, match=message):
            tiny(**options).init(jax.random.key(0), IMAGES)


@pytest.mark.reference
@pytest.mark.parametrize("scan", [False, True])
def test_recorded_outputs_and_gradients(reference_data, scan):
    with np.load(reference_data / "goldens/axial/axial_tiny_reversible_out3x3.npz", allow_pickle=False) as file:
        recorded = {name: file[name] for name in file.files}
    model = create_model("axial", num_classes=5, hidden_size=16, num_layers=2, num_heads=4, mlp_size=64, scan=scan)
    state = {name[3:]: array for name, array in recorded.items() if name.startswith("sd/")}
    params = convert(state, "axial", model)["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 79_253
    images = recorded["in/x"].astype(np.float32).transpose(0, 2, 3, 1)

    def loss(params, images):
        out = model.apply({"params": params}, images, train=True)
        return jnp.square(out.logits).mean(), out

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, out), (gradients, to_images) = run(params, images)
    np.testing.assert_allclose(out.logits, recorded["out/y"].transpose(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(out.features["body"], recorded["act/body"].transpose(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(value, recorded["out/loss_mean_sq"], atol=1e-6)
    np.testing.assert_allclose(to_images, recorded["grad/in_x"].transpose(0, 2, 3, 1), atol=1e-6)
    gradients = unstack_blocks(gradients)
    first = gradients["layers"]["block_0"]
    for branch, name in (("height", "f"), ("width", "g")):
        qkv = np.asarray(first[branch]["qkv"]["kernel"]).reshape(16, 48).T
        fn = f"grad/layers.blocks.0.{name}.net.fn.fn"
        np.testing.assert_allclose(qkv[:16], recorded[f"{fn}.to_q.weight"], atol=1e-6)
        np.testing.assert_allclose(qkv[16:], recorded[f"{fn}.to_kv.weight"], atol=1e-6)
    for branch, name in (("mlp1", "f"), ("mlp2", "g")):
        scale = recorded[f"grad/layers.blocks.1.{name}.net.0.g"].ravel()
        np.testing.assert_allclose(first[branch]["norm"]["scale"], scale, atol=1e-6)
    head = np.asarray(gradients["head"]["kernel"]).transpose(3, 2, 0, 1)
    np.testing.assert_allclose(head, recorded["grad/output_project.weight"], atol=1e-6)
    embedding = recorded["grad/input_project.weight"][:, :, 0, 0].T
    np.testing.assert_allclose(gradients["embedding"]["kernel"], embedding, atol=1e-6)
