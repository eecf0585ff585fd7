"""ViT and SETR against outputs that the original implementations computed (only with --reference-data)."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.layers.embedding import resize_positions
from jax_densevit.layers.resize import resize_bilinear
from jax_densevit.layers.transformer import stack_blocks
from jax_densevit.models import create_model
from jax_densevit.models.vit import Backbone
from jax_densevit.pretrained import convert

pytestmark = pytest.mark.reference


def load(folder, name):
    with np.load(folder / "goldens" / "setr" / name, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


TINY = {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "mlp_size": 64, "patch_size": 16, "image_size": 64}


def official(weights, **options):
    """Parameters of a SETR from the authors' names; without a head among them its head is drawn."""
    model = create_model("setr_pup", **TINY, num_classes=3, head_channels=16, taps=(2,), auxiliary=False, **options)
    weights = {name: array for name, array in weights.items() if name.startswith("backbone.")}
    return convert(weights, "setr", model, leave_out=["decode_head"])["params"]


@pytest.mark.parametrize("scan", [False, True])
def test_official_backbone(reference_data, scan):
    golden = load(reference_data, "official_vit_backbone.npz")
    params = official(golden)["backbone"]
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
    options = {**TINY, "num_classes": 3, "head_channels": 16, "taps": (2,)}
    model = create_model("setr_pup", **options)
    named = {name: array for name, array in {**golden, **weights}.items() if "_head." in name or "backbone." in name}
    variables = convert(named, "setr", model)
    output = model.apply(variables, golden["x"].transpose(0, 2, 3, 1))
    assert output.covers == (64, 64) and output.logits.shape == (2, 32, 32, 3)
    logits = resize_bilinear(output.logits, output.covers)
    np.testing.assert_allclose(logits, weights["out"].transpose(0, 2, 3, 1), atol=1e-5)

    head = model.stack_head(None, auxiliary=True, parent=None)
    grid = weights["feat_aux"][:, 1:].reshape(2, 4, 4, 32)
    logits = head.apply({kind: tree["auxiliary_head_0"] for kind, tree in variables.items()}, grid, train=False)
    logits = resize_bilinear(logits, (64, 64))
    np.testing.assert_allclose(logits, weights["out_aux"].transpose(0, 2, 3, 1), atol=1e-5)


@pytest.mark.parametrize("flavor", ["tanh", "erf"])
def test_google_vit(reference_data, flavor):
    weights = load(reference_data, "google_vit_tiny_ckpt.npz")
    golden = load(reference_data, "google_vit_tiny_io.npz")

    sizes = {"hidden_size": 24, "num_layers": 3, "num_heads": 3, "mlp_size": 48, "patch_size": 8, "image_size": 32}
    model = create_model("vit", **sizes, gelu=flavor, num_classes=5)
    variables = convert(weights, "vit_npz", model)
    backbone = Backbone(**sizes, taps=(1, 2), gelu=flavor)
    outputs = backbone.apply({"params": variables["params"]["backbone"]}, golden["x_nhwc"])
    for i in range(3):
        np.testing.assert_allclose(outputs[i + 1], golden[f"block{i}_{flavor}"], atol=1e-5)
    output = model.apply(variables, golden["x_nhwc"])
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
