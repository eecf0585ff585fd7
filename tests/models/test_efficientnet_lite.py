"""EfficientNet-Lite against its definition written out with XLA's grouped convolutions, and its published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.models import create_model
from jax_densevit.models.counts import count_parameters
from jax_densevit.models.efficientnet_lite import STRIDES, EfficientNetLite, LiteEncoder, lite_macs
from jax_densevit.models.registry import find_model

TINY = {"widths": (3, 4, 5, 6, 7, 8, 9), "repeats": (1, 1, 2, 1, 1, 1, 1), "stem_width": 4}
BLOCKS = ((1, 1), (2, 6), (2, 6), (1, 6), (2, 6), (1, 6), (2, 6), (1, 6))  # (stride, expansion)


def noise(model, *arrays):
    """Variables whose norms change something and keep the values within reach of the 6."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        low, high = {"scale": (0.8, 1.6), "var": (0.5, 1.5), "bias": (-0.5, 1), "mean": (-0.3, 0.3)}.get(
            path[-1].key, (-1.0, 1.0)
        )
        return rng.uniform(low, high, leaf.shape).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(model.init, jax.random.key(0), *arrays))


def written_out(variables, x):
    """The tiny encoder's maps by stride."""
    params, statistics = variables["params"], variables["batch_stats"]

    def step(x, path, stride=1, relu6=True, depthwise=False):
        p, s = params, statistics
        for name in path:
            p, s = p[name], s[name]
        conv = jax.lax.conv_general_dilated(
            x,
            p["conv"]["kernel"],
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1] if depthwise else 1,
        )
        scale = p["norm"]["scale"] / jnp.sqrt(s["norm"]["var"] + 1e-3)
        y = (conv - s["norm"]["mean"]) * scale + p["norm"]["bias"]
        return jnp.minimum(jnp.maximum(y, 0), 6) if relu6 else y

    x = step(x, ("stem",), 2)
    maps, reached = {}, 2
    for b, (stride, expansion) in enumerate(BLOCKS):
        y = step(x, (f"block_{b}", "expand")) if expansion > 1 else x
        y = step(y, (f"block_{b}", "depthwise"), stride, depthwise=True)
        y = step(y, (f"block_{b}", "project"), relu6=False)
        x = x + y if x.shape == y.shape else y
        reached *= stride
        maps[f"stride_{reached}"] = x
    return maps


@pytest.mark.parametrize("size", [(64, 96), (37, 50)])
def test_encoder_written_out(size):
    """Every map, at even and odd sizes (borders of strided convolutions lie at the end)."""
    model = LiteEncoder(**TINY)
    x = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
    variables = noise(model, x)
    got = jax.jit(model.apply)(variables, x)
    want = jax.jit(written_out)(variables, x)
    assert got.keys() == {f"stride_{stride}" for stride in STRIDES}
    for stride, width in zip(STRIDES, (3, 4, 5, 7, 9), strict=True):
        ours, theirs = got[f"stride_{stride}"], want[f"stride_{stride}"]
        assert ours.shape == (2, *(-(-side // stride) for side in size), width)
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(np.abs(theirs).max()))


def test_classifier_and_features():
    model = EfficientNetLite(**TINY, num_classes=3, head_width=10)
    x = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32)
    variables = noise(model, x)
    found = jax.jit(model.apply)(variables, x)
    assert found.logits.shape == (2, 3) and found.features["pool"].shape == (2, 10)
    head = variables["params"]["classifier"]
    np.testing.assert_allclose(found.logits, found.features["pool"] @ head["kernel"] + head["bias"], atol=1e-5)
    encoder = {kind: tree["encoder"] for kind, tree in variables.items()}
    maps = jax.jit(LiteEncoder(**TINY).apply)(encoder, x)
    for name, array in maps.items():
        np.testing.assert_allclose(found.features[name], array, atol=1e-4)


def test_train_normalises_by_the_batch():
    model = LiteEncoder(**TINY, momentum=0.9)
    x = np.random.default_rng(1).normal(3, 2, size=(2, 64, 64, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    train = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]))
    maps, updated = train(variables, x)
    before, after = variables["batch_stats"], updated["batch_stats"]
    assert all(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    # By the batch, the input's scale is of no account; by running averages it is.
    other, _ = train(variables, 5 * x + 7)
    inner = (slice(None), slice(1, -1), slice(1, -1))  # the zeros at the border do not scale
    assert np.abs(maps["stride_2"][inner] - other["stride_2"][inner]).mean() < 0.1 * np.abs(maps["stride_2"]).mean()


def test_published_counts():
    """4,652,008 parameters and 385 million multiply-accumulates, as every table of EfficientNet-Lite0 has them."""
    entry, model = find_model("efficientnet_lite"), create_model("efficientnet_lite")
    assert count_parameters(model, (64, 64)) == 4_652_008
    assert count_parameters(LiteEncoder(), (64, 64)) == 2_958_848
    assert entry.macs(model, (224, 224)) == 385_187_552
    maps = jax.eval_shape(lambda x: LiteEncoder().init_with_output(jax.random.key(0), x)[0], jnp.zeros((1, 64, 64, 3)))
    assert [maps[f"stride_{stride}"].shape[-1] for stride in STRIDES] == [16, 24, 40, 112, 320]


def test_macs_against_the_compiler():
    model = LiteEncoder(**TINY)
    x = jax.ShapeDtypeStruct((1, 96, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    flops = jax.jit(written_out).lower(variables, x).cost_analysis()["flops"]
    # XLA leaves out products with the zeros of the borders and counts norms.
    assert 0.8 < flops / 2 / lite_macs(model, (96, 64)) < 1.3
