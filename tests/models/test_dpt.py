"""DPT: published sizes to the digit, every option, sizes of images, and the published code's recorded outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.data.source import DataInfo
from jax_densevit.errors import UserError
from jax_densevit.layers.transformer import stack_blocks, unstack_blocks
from jax_densevit.models import create_model
from jax_densevit.models.counts import count_like_paper, count_parameters
from jax_densevit.models.dpt import Readout, ResidualUnit
from jax_densevit.models.registry import find_model
from jax_densevit.pretrained import convert
from jax_densevit.tasks.segmentation import SegmentationTask

TINY = {
    "hidden_size": 8,
    "num_layers": 4,
    "num_heads": 2,
    "mlp_size": 12,
    "image_size": 64,
    "reassemble": (2, 3, 4, 5),
    "features": 4,
    "num_classes": 3,
}
HYBRID = {"blocks": (1, 1, 1), "stem_width": 4}
# 40 x 90 pixels: rectangular, no multiples; the model covers 64 x 96.
X = np.random.default_rng(0).normal(size=(2, 40, 90, 3)).astype(np.float32)


def draw(model, x=X):
    """Variables of a model: its shapes, filled by NumPy (drawing with JAX costs a compile per model)."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        near = float(path[-1].key in ("scale", "var"))
        return (near + (0.1 if near else 0.3) * rng.uniform(-1, 1, leaf.shape)).astype(leaf.dtype)

    shapes = jax.eval_shape(model.init, {"params": jax.random.key(0)}, x)
    return jax.tree_util.tree_map_with_path(fill, shapes)


# Parameters of the published modules, which own a classifier of 1000 classes, a final norm, an auxiliary head and a
# residual unit that they never call; and what of them is used, without auxiliary head.
PUBLISHED = {
    ("dpt", "base", 3): (112_501_422, 109_959_107),
    ("dpt", "base", 40): (112_520_440, 109_968_616),
    ("dpt", "base", 150): (112_576_980, 109_996_886),
    ("dpt", "large", 150): (344_985_364, 342_148_758),
    ("dpt", "hybrid", 150): (124_076_884, 121_496_790),
    ("dpt_depth", "base", 1): (111_647_081, 109_696_385),
    ("dpt_depth", "large", 1): (344_055_465, 341_848_257),
    ("dpt_depth", "hybrid", 1): (123_146_985, 121_196_289),
}


@pytest.mark.parametrize("name,variant,num_classes", PUBLISHED)
def test_counts(name, variant, num_classes):
    published, used = PUBLISHED[name, variant, num_classes]
    options = {"num_classes": num_classes, "scan": True}
    model = create_model(name, variant, **options)
    assert count_like_paper(model, (64, 64)) == published
    bare = create_model(name, variant, auxiliary=False, **options)
    assert count_parameters(bare, (64, 64)) == used
    assert count_like_paper(bare, (64, 64)) == published
    auxiliary = count_parameters(model, (64, 64)) - used
    assert auxiliary == (9 * 256**2 + 512 + 257 * num_classes if name == "dpt" else 0)
    if (name, variant) == ("dpt", "base") and num_classes != 150:
        # Hugging Face's module has no classifier of 1000 classes.
        assert published - 769_000 == {3: 111_732_422, 40: 111_751_440}[num_classes]


@pytest.mark.parametrize("size,num_classes,giga", [(224, 3, 38.6), (256, 3, 50.7), (256, 40, 50.8)])
def test_published_macs(size, num_classes, giga):
    macs = find_model("dpt").macs(create_model("dpt", num_classes=num_classes), (size, size))
    assert round(macs / 1e9, 1) == giga


@pytest.mark.parametrize("name,variant", [("dpt", "base"), ("dpt_depth", "base"), ("dpt", "hybrid")])
def test_macs_are_those_the_compiler_counts(name, variant):
    """But for the products saved by doing 1x1 convolutions before enlargements and the class token's part once."""
    model = create_model(name, variant)
    image = jax.ShapeDtypeStruct((1, 192, 320, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    flops = jax.jit(model.apply).lower(variables, image).cost_analysis()["flops"]
    macs = find_model(name).macs(model, (192, 310))
    grid, width, inner = 12 * 20, 768, 256
    levels = 2 if variant == "hybrid" else 4
    saved = levels * (grid - 1) * width**2 + 3 * grid * (16 + 4 + 1 + 0.25) * inner**2
    # XLA leaves out products with the zeros of the borders and counts the rest (norms, resizes, softmax).
    assert 0.95 < flops / 2 / (macs - saved) < 1.05


def test_readouts():
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(2, 1 + 5, 4)).astype(np.float32)
    params = {"kernel": rng.normal(size=(8, 4)).astype(np.float32), "bias": rng.normal(size=4).astype(np.float32)}
    got = {kind: Readout(kind).apply({"params": params}, tokens) for kind in ("ignore", "add", "project")}
    np.testing.assert_array_equal(got["ignore"], tokens[:, 1:])
    np.testing.assert_allclose(got["add"], tokens[:, 1:] + tokens[:, :1], atol=1e-6)
    pairs = np.concatenate([tokens[:, 1:], np.repeat(tokens[:, :1], 5, axis=1)], axis=-1)
    want = jax.nn.gelu(pairs @ params["kernel"] + params["bias"], approximate=False)
    np.testing.assert_allclose(got["project"], want, atol=1e-5)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_residual_unit_activates_before_convolving(batch_norm):
    """The identity of the input, un-activated, is what is left when the second convolution is zero."""
    unit = ResidualUnit(batch_norm)
    x = jax.random.normal(jax.random.key(0), (1, 4, 5, 3))
    variables = unit.init(jax.random.key(1), x, False)
    leaves = {tuple(k.key for k in path[1:]) for path, _ in jax.tree_util.tree_leaves_with_path(variables)}
    assert (("conv1", "bias") in leaves) != batch_norm and (("norm1", "scale") in leaves) == batch_norm
    silent = {**variables, "params": jax.tree.map(jnp.zeros_like, variables["params"])}
    np.testing.assert_array_equal(unit.apply(silent, x, False), x)
    # Negative inputs reach nothing but the sum.
    negative = -jnp.abs(x)
    changed = unit.apply(variables, 2 * negative, False) - unit.apply(variables, negative, False)
    np.testing.assert_allclose(changed, negative, atol=1e-6)


OPTIONS = {
    "base": ("dpt", {}),
    "add, biases": ("dpt", {"readout": "add", "batch_norm": False}),
    "hybrid": ("dpt", HYBRID),
    "depth": ("dpt_depth", {"num_classes": 1, "readout": "ignore", "non_negative": False}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_training_and_evaluation(case):
    """Shapes, statistics, a gradient for every parameter, and the scanned, rematerialised form equal to the plain."""
    name, options = OPTIONS[case]
    options = {**TINY, **options, "drop_path": 0.2}
    model = create_model(name, **options)
    variables = draw(model)

    def step(params, model):
        def loss(params):
            output, updates = model.apply(
                {**variables, "params": params},
                X,
                train=True,
                rngs={"dropout": jax.random.key(1)},
                mutable="batch_stats",
            )
            total = sum(jnp.sum(jnp.sin(3 * logits)) for logits in (output.logits, *output.auxiliary))
            return total, (output, updates.get("batch_stats", {}))

        return jax.value_and_grad(loss, has_aux=True)(params)

    jitted = jax.jit(step, static_argnums=1)
    (total, (output, statistics)), gradient = jitted(variables["params"], model)
    classes = options["num_classes"]
    assert output.covers == (64, 96) and output.logits.dtype == jnp.float32
    assert output.logits.shape == (2, 64, 96, classes)
    assert [a.shape for a in output.auxiliary] == ([(2, 32, 48, classes)] if name == "dpt" else [])
    for before, after in zip(*map(jax.tree.leaves, (variables.get("batch_stats", {}), statistics)), strict=True):
        assert not np.allclose(before, after)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.all(np.isfinite(leaf)) and np.abs(leaf).max() > 1e-4, path

    evaluated = jax.eval_shape(model.apply, variables, X)
    assert evaluated.auxiliary == () and evaluated.logits.shape == output.logits.shape
    if case != "hybrid":
        return
    other = create_model(name, **options, scan=True, remat="full")
    stacked = stack_blocks(variables["params"], other.head_taps)
    assert jax.tree.structure(stacked) == jax.tree.structure(
        jax.eval_shape(other.init, {"params": jax.random.key(0)}, X)["params"]
    )
    (other_total, (_, other_statistics)), other_gradient = jitted(stacked, other)
    np.testing.assert_allclose(other_total, total, rtol=1e-4)
    for pair in ((other_statistics, statistics), (unstack_blocks(other_gradient), gradient)):
        largest = max((np.abs(leaf).max() for leaf in jax.tree.leaves(pair[1])), default=0)
        for got, want in zip(*map(jax.tree.leaves, pair), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4 * largest)


def test_the_auxiliary_head_is_trained_by_the_task():
    """Its term has the task's weight, and reaches the head and, through the fused map, everything before it."""
    model = create_model("dpt", **TINY)
    variables = draw(model)
    task = SegmentationTask(DataInfo("tiny", classes=("a", "b", "c")), denominator="valid", auxiliary_weight=0.2)
    rng = np.random.default_rng(2)
    batch = {
        "image": rng.integers(0, 256, (2, 40, 90, 3)).astype(np.uint8),
        "labels": rng.integers(0, 3, (2, 40, 90)).astype(np.int32),
    }
    coefficients = {}

    def losses(params):
        output, _ = model.apply(
            {**variables, "params": params},
            *task.inputs(batch),
            train=True,
            rngs={"dropout": jax.random.key(0)},
            mutable="batch_stats",
        )
        terms = task.loss(output, batch)
        coefficients.update({name: term.coefficient for name, term in terms.items()})
        return {name: term.sum / term.weight for name, term in terms.items()}

    gradients = jax.jit(jax.jacrev(losses))(variables["params"])
    assert coefficients == {"segmentation": 1.0, "auxiliary_1": 0.2}
    for name, trained, other in (("segmentation", "head", "auxiliary_head"), ("auxiliary_1", "auxiliary_head", "head")):
        gradient = gradients[name]
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient[other]))
        rest = {key: tree for key, tree in gradient.items() if key != other}
        assert trained in rest and all(np.any(leaf) for leaf in jax.tree.leaves(rest))


def test_depth_is_the_inverse_of_a_line():
    options = {**TINY, "num_classes": 1}
    variables = draw(create_model("dpt_depth", **options))

    def depth(**more):
        return jax.jit(create_model("dpt_depth", **options, **more).apply)(variables, X).logits

    bias = variables["params"]["head"]["classifier"]["bias"]
    bias -= np.median(depth(non_negative=False))
    plain, signed = depth(), depth(non_negative=False)
    assert signed.min() < 0 < signed.max()
    np.testing.assert_allclose(plain, np.maximum(signed, 0), atol=1e-6)
    inverse = depth(invert=True, scale=0.5, shift=0.25)
    np.testing.assert_allclose(inverse, 1 / np.maximum(0.5 * plain + 0.25, 1e-8), rtol=1e-5)
    assert np.isfinite(depth(invert=True, scale=0.0)).all()  # at most 1e8


@pytest.mark.parametrize("options", [{}, HYBRID])
def test_padding_is_zeros_at_the_bottom_and_the_right(options):
    model = create_model("dpt", **TINY, **options)
    variables = draw(model)
    padded = np.pad(X, ((0, 0), (0, 24), (0, 6), (0, 0)))
    apply = jax.jit(model.apply)
    np.testing.assert_array_equal(apply(variables, X).logits, apply(variables, padded).logits)


def test_tall_images_are_wide_images_turned():
    """Kernels, positions and image transposed transpose the output: no axis is taken for the other."""
    model = create_model("dpt", **TINY)
    variables = draw(model)

    def turn(path, leaf):
        names = [key.key for key in path]
        if names[-1] == "position_embedding":
            grid = leaf[:, 1:].reshape(1, 4, 4, -1).swapaxes(1, 2).reshape(1, 16, -1)
            return np.concatenate([leaf[:, :1], grid], axis=1)
        return leaf.swapaxes(0, 1) if leaf.ndim == 4 and "attention" not in names else leaf

    turned = jax.tree_util.tree_map_with_path(turn, variables)
    apply = jax.jit(model.apply)
    want = apply(variables, X).logits
    np.testing.assert_allclose(apply(turned, X.swapaxes(1, 2)).logits.swapaxes(1, 2), want, atol=1e-4)


@pytest.mark.parametrize("options", [{}, HYBRID])
def test_bfloat16_is_near(options):
    options = {**TINY, **options}
    variables = draw(create_model("dpt", **options))
    half = jax.jit(create_model("dpt", **options, dtype="bfloat16").apply)(variables, X).logits
    exact = jax.jit(create_model("dpt", **options).apply)(variables, X).logits
    assert half.dtype == jnp.float32
    assert 0 < np.abs(half - exact).max() < 0.1 * np.abs(exact).max()


def test_wrong_options_are_named():
    for options, message in (
        ({"readout": "projct"}, "DPT readout named 'projct'; did you mean 'project'"),
        ({"head": "depht"}, "did you mean 'depth'"),
        ({"reassemble": (1, 2, 3)}, "has 4 levels"),
        ({"taps": (1, 2)}, "makes 4 levels of blocks"),
        ({"blocks": (1, 1)}, "three stages and patches of 16"),
        ({"blocks": (1, 1, 1), "patch_size": 8}, "three stages and patches of 16"),
    ):
        with pytest.raises(UserError, match=message):
            jax.eval_shape(create_model("dpt", **{**TINY, **options}).init, jax.random.key(0), X)


@pytest.mark.reference
def test_recorded_outputs(reference_data):
    with np.load(reference_data / "goldens/dpt/dpt_seed_tiny.npz", allow_pickle=False) as archive:
        recorded = {name: archive[name] for name in archive.files}
    state = {name[3:]: value for name, value in recorded.items() if name.startswith("sd/")}
    sizes = {"hidden_size": 16, "num_layers": 4, "num_heads": 2, "mlp_size": 32, "image_size": 64, "taps": (1, 2, 3, 4)}
    options = {**sizes, "reassemble": (4, 6, 8, 10), "features": 8, "num_classes": 5}
    model = create_model("dpt", **options)
    variables = convert(state, "dpt", model)
    assert count_like_paper(model, (64, 64)) - 1000 * 17 + 7 * 17 == 38_597  # its ViT classifies 7 classes, not 1000

    def images(name):
        return jnp.asarray(recorded[f"in/{name}"], jnp.float32).transpose(0, 2, 3, 1)

    def compare(got, name):
        np.testing.assert_allclose(got, recorded[name].transpose(0, 2, 3, 1), atol=1e-5, err_msg=name)

    output, kept = jax.jit(lambda v, x: model.apply(v, x, capture_intermediates=True))(variables, images("x_64x64"))
    kept = kept["intermediates"]
    for i in range(4):
        compare(kept[f"reassemble_{i}"]["__call__"][0], f"act/reassemble{i + 1}")
    for i in (3, 2, 1):
        compare(kept[f"fusion_{i}"]["__call__"][0], f"act/path{i + 1}")
    compare(output.logits, "out/y_64x64")
    head = {kind: tree["auxiliary_head"] for kind, tree in variables.items()}
    fused = kept["fusion_0"]["__call__"][0]
    compare(model.segmentation_head(None, parent=None).apply(head, fused, False), "act/aux")
    compare(jax.jit(model.apply)(variables, images("x_96x64")).logits, "out/y_96x64")

    for readout in ("add", "ignore"):
        other = create_model("dpt", **options, readout=readout)
        params = {name: tree for name, tree in variables["params"].items() if not name.startswith("readout")}
        assert set(params) == set(jax.eval_shape(other.init, jax.random.key(0), images("x_64x64"))["params"])
        output = jax.jit(other.apply)({**variables, "params": params}, images("x_64x64"))
        compare(output.logits, f"out/y_64x64_readout_{readout}")
