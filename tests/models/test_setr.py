import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.errors import UserError
from jax_densevit.layers.resize import resize_bilinear
from jax_densevit.layers.transformer import stack_blocks, unstack_blocks
from jax_densevit.models import create_model
from jax_densevit.models.counts import count_like_paper, count_parameters
from jax_densevit.models.registry import find_model
from jax_densevit.models.setr import MlaNeck, published_taps

TINY = {
    "hidden_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_size": 12,
    "patch_size": 16,
    "image_size": 32,
    "num_classes": 3,
    "head_channels": 8,
}
# 40 x 56 pixels: rectangular and no multiple of 16; the model covers 48 x 64.
X = np.random.default_rng(0).normal(size=(2, 40, 56, 3)).astype(np.float32)


def draw(model):
    """Variables of a model: its shapes, filled by NumPy (drawing with JAX costs a compile per model)."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        near = float(path[-1].key in ("scale", "var"))
        return (near + (0.1 if near else 0.3) * rng.uniform(-1, 1, leaf.shape)).astype(leaf.dtype)

    shapes = jax.eval_shape(model.init, {"params": jax.random.key(0)}, X)
    return jax.tree_util.tree_map_with_path(fill, shapes)


# Parameters of the original modules in training at 512 x 512 and 150 classes (ADE20K), 768 x 768 and 19 (Cityscapes),
# 480 x 480 and 60 (Pascal Context); the first column's six are the published table.
OFFICIAL = {
    ("naive", "L/16"): (305_669_296, 306_576_536, 305_265_120),
    ("pup", "L/16"): (318_307_292, 319_113_662, 317_833_816),
    ("mla", "L/16"): (310_568_836, 310_805_618, 309_704_040),
    ("naive", "B/16"): (87_690_672, 88_270_232, 87_318_240),
    ("pup", "B/16"): (97_641_180, 98_119_870, 97_199_448),
    ("mla", "B/16"): (92_590_212, 92_499_314, 91_757_160),
}
# The same graphs without auxiliary heads and unused layers, as evaluation needs them.
INFERENCE = {
    ("naive", "L/16"): (304_450_966, 305_728_019, 304_300_860),
    ("pup", "L/16"): (308_319_894, 309_596_947, 308_169_788),
    ("mla", "L/16"): (310_030_486, 310_737_427, 309_488_700),
    ("naive", "B/16"): (86_670_486, 87_619_859, 86_552_124),
    ("pup", "B/16"): (90_015_126, 90_964_499, 89_896_764),
    ("mla", "B/16"): (92_051_862, 92_431_123, 91_541_820),
}
MMSEG = {"naive": (305_558_616, 306_536_524), "pup": (317_291_096, 318_467_148), "mla": (309_570_286, 310_679_135)}
DATA = ((512, 150), (768, 19), (480, 60))


@pytest.mark.parametrize("decoder,variant", OFFICIAL)
def test_official_counts(decoder, variant):
    rows = zip(DATA, OFFICIAL[decoder, variant], INFERENCE[decoder, variant], strict=True)
    for (side, classes), published, inference in rows:
        options = {"num_classes": classes, "image_size": side, "scan": True}
        model = create_model(f"setr_{decoder}", variant, **options)
        assert count_like_paper(model, (side, side)) == published
        # Ours is that without the unused 1x1 layers 512 -> K, one per head, and without MLA's unused class token.
        heads = {"naive": 4, "pup": 5, "mla": 5}[decoder]
        unused_token = 2 * model.hidden_size if decoder == "mla" else 0
        assert count_parameters(model, (side, side)) == published - heads * 513 * classes - unused_token
        bare = create_model(f"setr_{decoder}", variant, auxiliary=False, **options)
        assert count_parameters(bare, (side, side)) == inference - unused_token


@pytest.mark.parametrize("decoder", MMSEG)
def test_mmseg_counts(decoder):
    """With the bias of the patch embedding, which mmseg 1.x drops."""
    for (side, classes), total in zip(DATA[:2], MMSEG[decoder], strict=True):
        convs = 2 if decoder == "naive" and classes == 150 else 0
        options = {"num_classes": classes, "image_size": side, "auxiliary_convs": convs}
        model = create_model(f"setr_{decoder}", "L/16", flavor="mmseg", scan=True, **options)
        assert count_like_paper(model, (side, side)) == total


@pytest.mark.parametrize(
    "decoder,side,classes,gmacs", [("naive", 512, 150, 0.3), ("pup", 512, 150, 55.7), ("pup", 768, 19, 120.3)]
)
def test_macs_of_the_heads(decoder, side, classes, gmacs):
    macs = find_model(f"setr_{decoder}").macs(create_model(f"setr_{decoder}", num_classes=classes), (side, side))
    backbone = find_model("vit").macs(create_model("vit", "L/16", num_classes=0), (side, side))
    assert round((macs - backbone) / 1e9, 1) == gmacs


@pytest.mark.parametrize("decoder,flavor", [("pup", "official"), ("mla", "official"), ("mla", "mmseg")])
def test_macs_equal_xlas_count(decoder, flavor):
    options = {**TINY, "hidden_size": 128, "mlp_size": 512, "head_channels": 128, "num_classes": 64, "image_size": 128}
    model = create_model(f"setr_{decoder}", flavor=flavor, **options)
    image = jax.ShapeDtypeStruct((1, 128, 256, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    flops = jax.jit(model.apply).lower(variables, image).cost_analysis()["flops"]
    macs = find_model(f"setr_{decoder}").macs(model, (128, 256))
    # XLA leaves out products with the zero padding of 3x3 convolutions and counts the resizes.
    assert 0.93 < flops / (2 * macs) < 1.05


def test_published_taps():
    assert published_taps("naive", "official", 24) == (10, 15, 20)
    assert published_taps("pup", "official", 24) == (10, 15, 20, 24)
    assert published_taps("pup", "mmseg", 24) == (10, 15, 20)
    assert published_taps("pup", "official", 12) == (5, 8, 10, 12)
    assert published_taps("mla", "official", 24) == (6, 12, 18, 24)
    assert published_taps("mla", "mmseg", 12) == (3, 6, 9, 12)
    for layers in range(1, 14):
        for decoder in ("naive", "pup", "mla"):
            taps = published_taps(decoder, "official", layers)
            assert list(taps) == sorted(taps) and 1 <= taps[0] and taps[-1] <= layers
            assert decoder != "mla" or (len(taps) == 4 and taps[-1] == layers)


# Shapes of logits and auxiliary logits over the 3 x 4 grid of X, as multiples of that grid.
SCALES = {
    ("naive", "official"): (1, [1, 1]),
    ("naive", "mmseg"): (4, [4, 4]),
    ("pup", "official"): (8, [4, 4]),
    ("pup", "mmseg"): (8, [4]),
    ("mla", "official"): (4, [1, 1, 1, 1]),
    ("mla", "mmseg"): (4, [1, 1, 1, 1]),
}


def is_cancelled(names):
    """Biases that a batch norm behind a linear layer removes again: without gradient in the published heads too."""
    head_norm = names[-1] == "bias" and names[-2].startswith("norm") and names[0] != "backbone" and len(names) == 3
    return names[-2:] == ("conv", "bias") or head_norm


@pytest.mark.parametrize("decoder,flavor", SCALES)
def test_training_and_evaluation(decoder, flavor):
    """Shapes, statistics, a gradient for every parameter, and the scanned, rematerialised form equal to the plain."""
    model = create_model(f"setr_{decoder}", flavor=flavor, drop_path=0.2, **TINY)
    variables = draw(model)

    def step(params, model):
        def loss(params):
            output, updates = model.apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                X,
                train=True,
                rngs={"dropout": jax.random.key(1)},
                mutable=["batch_stats"],
            )
            total = sum(jnp.sum(jnp.sin(3 * logits)) for logits in (output.logits, *output.auxiliary))
            return total, (output, updates["batch_stats"])

        return jax.value_and_grad(loss, has_aux=True)(params)

    jitted = jax.jit(step, static_argnums=1)
    (total, (output, statistics)), gradient = jitted(variables["params"], model)
    scale, auxiliary = SCALES[decoder, flavor]
    assert output.covers == (48, 64)
    assert output.logits.shape == (2, 3 * scale, 4 * scale, 3) and output.logits.dtype == jnp.float32
    assert [a.shape for a in output.auxiliary] == [(2, 3 * s, 4 * s, 3) for s in auxiliary]
    for before, after in zip(*map(jax.tree.leaves, (variables["batch_stats"], statistics)), strict=True):
        assert not np.allclose(before, after)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        names = tuple(key.key for key in path)
        assert np.all(np.isfinite(leaf))
        assert np.abs(leaf).max() > 1e-3 or is_cancelled(names), names

    evaluated = jax.eval_shape(model.apply, variables, X)
    assert evaluated.auxiliary == () and evaluated.logits.shape == output.logits.shape
    if (decoder, flavor) not in (("pup", "official"), ("mla", "mmseg")):
        return

    other = create_model(f"setr_{decoder}", flavor=flavor, drop_path=0.2, **TINY, scan=True, remat="full")
    stacked = stack_blocks(variables["params"], other.head_taps)
    assert jax.tree.structure(stacked) == jax.tree.structure(
        jax.eval_shape(other.init, {"params": jax.random.key(0)}, X)["params"]
    )
    (other_total, (_, other_statistics)), other_gradient = jitted(stacked, other)
    np.testing.assert_allclose(other_total, total, rtol=1e-5)
    for pair in ((other_statistics, statistics), (unstack_blocks(other_gradient), gradient)):
        # Rounding is relative to the largest terms of the sums, which cancel in the biases before a batch norm.
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(pair[1]))
        for got, want in zip(*map(jax.tree.leaves, pair), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5 * largest)


@pytest.mark.parametrize("decoder", ["naive", "pup", "mla"])
def test_mmseg_heads_equal_the_published_order(decoder):
    """mmseg upsamples to the end and then classifies; ours classifies on the smaller map. The results are the same."""
    model = create_model(f"setr_{decoder}", flavor="mmseg", **TINY)
    rng = np.random.default_rng(3)
    maps = jnp.asarray(rng.normal(size=(2, 3, 4, 8)), jnp.float32)
    if decoder == "mla":
        head = model.mla_head(None, parent=None)
        maps = (maps, 2 * maps, -maps, maps**2)
    else:
        head = model.stack_head(None, parent=None)
    variables = head.init(jax.random.key(0), maps, False)
    got = resize_bilinear(head.apply(variables, maps, False), (48, 64))

    params = variables["params"]

    def conv_norm(x, p):
        # Fresh statistics: mean 0, variance 1.
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, p["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=numbers)
        return jax.nn.relu(x / np.sqrt(1 + 1e-5))

    def up(x, scale):
        return resize_bilinear(x, (x.shape[1] * scale, x.shape[2] * scale))

    def norm(x):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    if decoder == "naive":
        x = up(conv_norm(norm(maps), params["conv_0"]), 4)
    elif decoder == "pup":
        x = norm(maps)
        for i in range(4):
            x = up(conv_norm(x, params[f"conv_{i}"]), 2)
    else:
        branches = [
            up(conv_norm(conv_norm(x, params[f"branch_{i}_0"]), params[f"branch_{i}_1"]), 4) for i, x in enumerate(maps)
        ]
        x = jnp.concatenate(branches, -1)
    want = x @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    np.testing.assert_allclose(got, resize_bilinear(want, (48, 64)), atol=1e-5)


def test_mla_neck_sums_from_deep_to_shallow():
    """A change of the deepest tap reaches every level, of the shallowest only its own; mmseg hands them on reversed."""
    neck = MlaNeck(8)
    rng = np.random.default_rng(0)
    maps = tuple(jnp.asarray(rng.normal(size=(1, 2, 3, 8)), jnp.float32) for _ in range(4))
    variables = neck.init(jax.random.key(0), maps, False)
    apply = jax.jit(neck.apply, static_argnums=2)
    base = apply(variables, maps, False)
    deep = apply(variables, (*maps[:3], -maps[3]), False)
    assert all(np.any(a != b) for a, b in zip(base, deep, strict=True))
    shallow = apply(variables, (-maps[0], *maps[1:]), False)
    assert [bool(np.any(a != b)) for a, b in zip(base, shallow, strict=True)] == [True, False, False, False]


def test_bfloat16_is_finite():
    model = create_model("setr_mla", **TINY, dtype="bfloat16")
    variables = draw(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    def loss(params):
        output, _ = model.apply({**variables, "params": params}, X, train=True, mutable=["batch_stats"])
        return sum(jnp.sum(jnp.sin(logits)) for logits in (output.logits, *output.auxiliary)), output

    gradient, output = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert {logits.dtype for logits in (output.logits, *output.auxiliary)} == {jnp.dtype("float32")}
    assert all(np.all(np.isfinite(leaf)) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradient))


def test_padding_is_zeros_at_the_bottom_and_the_right():
    model = create_model("setr_naive", **TINY)
    variables = draw(model)
    padded = np.pad(X, ((0, 0), (0, 8), (0, 8), (0, 0)))
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply(variables, X).logits, apply(variables, padded).logits)


def test_other_patch_sizes_reach_the_image():
    """PUP doubles until the image's size: at patch 4 two stages, the last left to the task."""
    for patch, scale in ((4, 2), (8, 4), (2, 1)):
        options = {**TINY, "patch_size": patch, "image_size": 4 * patch}
        model = create_model("setr_pup", **options, auxiliary=False)
        image = jax.ShapeDtypeStruct((1, 3 * patch, 4 * patch, 3), jnp.float32)
        output, _ = jax.eval_shape(lambda key, x, model=model: model.init_with_output(key, x), jax.random.key(0), image)
        assert output.logits.shape == (1, 3 * scale, 4 * scale, 3)


def test_wrong_options_are_named():
    for options, message in (
        ({"flavor": "mmsg"}, "SETR flavor named 'mmsg'; did you mean 'mmseg'"),
        ({"decoder": "pupp"}, "did you mean 'pup'"),
        ({"taps": (9,)}, "no block 9 to tap"),
        ({"attention": "flash"}, "attention implementation named 'flash'"),
    ):
        model = create_model("setr_pup", **{**TINY, **options})
        with pytest.raises(UserError, match=message):
            jax.eval_shape(model.init, jax.random.key(0), X)
    with pytest.raises(UserError, match="reads four blocks"):
        jax.eval_shape(create_model("setr_mla", **TINY, taps=(1, 2, 3)).init, jax.random.key(0), X)
