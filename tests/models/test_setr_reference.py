"""ViT and SETR against outputs that the original implementations computed (only with --reference-data)."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.layers.embedding import resize_positions
from jax_densevit.layers.resize import resize_bilinear
from jax_densevit.layers.transformer import stack_blocks
from jax_densevit.models import create_model
from jax_densevit.models.vit import Backbone

pytestmark = pytest.mark.reference


def load(folder, name):
    with np.load(folder / "goldens" / "setr" / name, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def from_torch(weights, heads):
    """Parameters of `Backbone` from timm-style names."""

    def norm(name):
        return {"scale": weights[f"{name}.weight"], "bias": weights[f"{name}.bias"]}

    def dense(name):
        return {"kernel": weights[f"{name}.weight"].T, "bias": weights[f"{name}.bias"]}

    def block(i):
        name = f"backbone.blocks.{i}"
        qkv, out = dense(f"{name}.attn.qkv"), dense(f"{name}.attn.proj")
        width = out["bias"].shape[0]
        qkv = {"kernel": qkv["kernel"].reshape(width, 3, heads, -1), "bias": qkv["bias"].reshape(3, heads, -1)}
        out["kernel"] = out["kernel"].reshape(heads, -1, width)
        return {
            "norm1": norm(f"{name}.norm1"),
            "attention": {"qkv": qkv, "out": out},
            "norm2": norm(f"{name}.norm2"),
            "mlp": {"fc1": dense(f"{name}.mlp.fc1"), "fc2": dense(f"{name}.mlp.fc2")},
        }

    return {
        "embedding": {
            "kernel": weights["backbone.patch_embed.proj.weight"].transpose(2, 3, 1, 0),
            "bias": weights["backbone.patch_embed.proj.bias"],
        },
        "tokens": {
            "cls_token": weights["backbone.cls_token"],
            "position_embedding": weights["backbone.pos_embed"],
        },
        "encoder": {f"block_{i}": block(i) for i in range(4)},
    }


def head_from_torch(weights, name, convs):
    """Variables of `StackHead` from the official repository's names."""
    params = {"norm": {"scale": weights[f"{name}.norm.weight"], "bias": weights[f"{name}.norm.bias"]}}
    statistics = {}
    for i in range(convs):
        conv, norm = f"{name}.conv_{i}", f"{name}.syncbn_fc_{i}"
        params[f"conv_{i}"] = {
            "conv": {"kernel": weights[f"{conv}.weight"].transpose(2, 3, 1, 0), "bias": weights[f"{conv}.bias"]},
            "norm": {"scale": weights[f"{norm}.weight"], "bias": weights[f"{norm}.bias"]},
        }
        statistics[f"conv_{i}"] = {
            "norm": {"mean": weights[f"{norm}.running_mean"], "var": weights[f"{norm}.running_var"]}
        }
    last = f"{name}.conv_{convs}"
    params["classifier"] = {"kernel": weights[f"{last}.weight"][:, :, 0, 0].T, "bias": weights[f"{last}.bias"]}
    return {"params": params, "batch_stats": statistics}


TINY = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "mlp_size": 64, "patch_size": 16, "image_size": 64}


@pytest.mark.parametrize("scan", [False, True])
def test_official_backbone(reference_data, scan):
    golden = load(reference_data, "official_vit_backbone.npz")
    params = from_torch(golden, heads=4)
    if scan:
        params = stack_blocks(params, (1, 2, 3))
    backbone = Backbone(**TINY, taps=(1, 2, 3), pos_rule="setr", scan=scan)
    outputs = backbone.apply({"params": params}, golden["x"].transpose(0, 2, 3, 1))
    for i in range(4):
        np.testing.assert_allclose(outputs[i + 1], golden[f"out.block{i}"], atol=1e-5)


def test_official_pup(reference_data):
    """The whole model, and the auxiliary head, after the last resize that the task does."""
    weights = load(reference_data, "official_pup_head.npz")
    golden = load(reference_data, "official_vit_backbone.npz")
    model = create_model("setr_pup", **TINY, num_classes=3, head_channels=16, taps=(2,), auxiliary=False)
    head = head_from_torch(weights, "decode_head", 4)
    variables = {
        "params": {"backbone": from_torch(golden, heads=4), "decode_head": head["params"]},
        "batch_stats": {"decode_head": head["batch_stats"]},
    }
    output = model.apply(variables, golden["x"].transpose(0, 2, 3, 1))
    assert output.covers == (64, 64) and output.logits.shape == (2, 32, 32, 3)
    logits = resize_bilinear(output.logits, output.covers)
    np.testing.assert_allclose(logits, weights["out"].transpose(0, 2, 3, 1), atol=1e-5)

    head = model.stack_head(None, auxiliary=True, parent=None)
    grid = weights["feat_aux"][:, 1:].reshape(2, 4, 4, 32)
    logits = head.apply(head_from_torch(weights, "auxiliary_head.0", 1), grid, train=False)
    logits = resize_bilinear(logits, (64, 64))
    np.testing.assert_allclose(logits, weights["out_aux"].transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("flavor", ["tanh", "erf"])
def test_google_vit(reference_data, flavor):
    weights = load(reference_data, "google_vit_tiny_ckpt.npz")
    golden = load(reference_data, "google_vit_tiny_io.npz")

    def block(i):
        name = f"Transformer/encoderblock_{i}"
        attention = f"{name}/MultiHeadDotProductAttention_1"
        part = {w: [weights[f"{attention}/{p}/{w}"] for p in ("query", "key", "value")] for w in ("kernel", "bias")}

        def both(path, first, second):
            return {first: weights[f"{path}/{first}"], second: weights[f"{path}/{second}"]}

        return {
            "norm1": both(f"{name}/LayerNorm_0", "scale", "bias"),
            "attention": {
                "qkv": {"kernel": np.stack(part["kernel"], 1), "bias": np.stack(part["bias"])},
                "out": both(f"{attention}/out", "kernel", "bias"),
            },
            "norm2": both(f"{name}/LayerNorm_2", "scale", "bias"),
            "mlp": {
                "fc1": both(f"{name}/MlpBlock_3/Dense_0", "kernel", "bias"),
                "fc2": both(f"{name}/MlpBlock_3/Dense_1", "kernel", "bias"),
            },
        }

    sizes = {"hidden_size": 24, "num_layers": 3, "num_heads": 3, "mlp_size": 48, "patch_size": 8, "image_size": 32}
    params = {
        "embedding": {"kernel": weights["embedding/kernel"], "bias": weights["embedding/bias"]},
        "tokens": {
            "cls_token": weights["cls"],
            "position_embedding": weights["Transformer/posembed_input/pos_embedding"],
        },
        "encoder": {f"block_{i}": block(i) for i in range(3)},
    }
    outputs = Backbone(**sizes, taps=(1, 2), gelu=flavor).apply({"params": params}, golden["x_nhwc"])
    for i in range(3):
        np.testing.assert_allclose(outputs[i + 1], golden[f"block{i}_{flavor}"], atol=1e-5)
    params = {
        "backbone": params,
        "norm": {key: weights[f"Transformer/encoder_norm/{key}"] for key in ("scale", "bias")},
        "head": {key: weights[f"head/{key}"] for key in ("kernel", "bias")},
    }
    output = create_model("vit", **sizes, gelu=flavor, num_classes=5).apply({"params": params}, golden["x_nhwc"])
    np.testing.assert_allclose(output.features["tokens"], golden[f"encoded_{flavor}"], atol=1e-5)
    np.testing.assert_allclose(output.logits, golden[f"logits_{flavor}"], atol=1e-5)


@pytest.mark.parametrize("size", [(6, 6), (3, 3), (5, 7)])
@pytest.mark.parametrize(
    "rule,key",
    [
        ("setr", "official_bilinear"),
        ("setr", "mmseg_bilinear"),
        ("mmseg", "mmseg_bicubic"),
        ("timm", "timm_bicubic_antialias"),
        ("google", "google_zoom_order1"),
    ],
)
def test_positions(reference_data, size, rule, key):
    golden = load(reference_data, "posembed_interp.npz")
    want = golden.get(f"{key}_{size[0]}x{size[1]}")
    if want is None:
        assert (key, size) == ("official_bilinear", (5, 7))  # the official rule knows squares only
        return
    table = resize_positions(jnp.asarray(golden["pos_cls_4x4"]), (4, 4), size, rule, prefix=1)
    np.testing.assert_allclose(table, want, atol=1e-5)
