"""Tables of names: round trips bit for bit, refusals that list the names, position tables, wrappers and numberings."""

import functools
import json
import re

import jax
import numpy as np
import pytest
from bundle_writer import write_bundle
from torch_writer import write_zip

from jax_densevit.errors import UserError
from jax_densevit.layers.embedding import resize_positions
from jax_densevit.models import create_model
from jax_densevit.models.registry import example_inputs
from jax_densevit.pretrained import SOURCES, check, convert, read, restore_names

VIT = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "mlp_size": 12, "image_size": 48}
SETR = {**VIT, "num_layers": 4, "num_classes": 3, "head_channels": 4}
DPT = {**VIT, "num_layers": 4, "reassemble": (2, 3, 4, 5), "features": 4, "num_classes": 3}
AXIAL = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "mlp_size": 12, "image_size": (8, 12)}
UFORMER = {"base": 2, "heads": (1,) * 9, "depths": (1,) * 9, "window": 4}
LITE = {"widths": (3, 4, 5, 6, 7, 8, 9), "repeats": (1, 1, 2, 1, 1, 1, 1), "stem_width": 4, "head_width": 8}
COLTRAN = {"image_size": (3, 4), "hidden_size": 8, "mlp_size": 12, "num_heads": 2}
CASES = {
    "vit_npz": ("vit_npz", "vit", {**VIT, "num_classes": 5}),
    "timm_vit": ("timm_vit", "vit", {**VIT, "num_classes": 5, "scan": True}),
    "deit": ("deit", "vit", {**VIT, "num_classes": 5, "distilled": True}),
    "hf_vit": ("hf_vit", "vit", {**VIT, "num_classes": 5}),
    "setr naive": ("setr", "setr_naive", SETR),
    "setr pup": ("setr", "setr_pup", {**SETR, "scan": True}),
    "setr mla": ("setr", "setr_mla", SETR),
    "mmseg naive": ("mmseg_setr", "setr_naive", {**SETR, "flavor": "mmseg", "auxiliary_convs": 2}),
    "mmseg mla": ("mmseg_setr", "setr_mla", {**SETR, "flavor": "mmseg"}),
    "dpt": ("dpt", "dpt", DPT),
    "dpt hybrid": ("dpt", "dpt", {**DPT, "image_size": 64, "blocks": (1, 1, 1), "stem_width": 4, "auxiliary": False}),
    "hf_dpt": ("hf_dpt", "dpt", {**DPT, "scan": True}),
    "hf_dpt depth": ("hf_dpt", "dpt_depth", {**DPT, "num_classes": 1}),
    "unet": ("unet", "unet", {"base": 2}),
    "axial": ("axial", "axial", {**AXIAL, "positions": True}),
    "axial residual": ("axial", "axial", {**AXIAL, "reversible": False, "scan": True}),
    "uformer": ("uformer", "uformer", {**UFORMER, "modulator": True}),
    "study unet": ("study", "unet", {"base": 2}),
    "study dpt": ("study", "dpt", DPT),
    "study axial": ("study", "axial", {**AXIAL, "head_kernel": 1}),
    "study uformer": ("study", "uformer", UFORMER),
    "efficientnet_lite": ("efficientnet_lite", "efficientnet_lite", LITE),
    "inception_fid": ("inception_fid", "inception_fid", {"divide": 16, "num_classes": 5}),
    "coltran colorizer": ("coltran", "coltran_colorizer", {**COLTRAN, "encoder_layers": 1}),
    "coltran color": ("coltran", "coltran_color_upsampler", {**COLTRAN, "num_layers": 2}),
    "coltran spatial": ("coltran", "coltran_spatial_upsampler", {**COLTRAN, "num_layers": 1}),
    "uformer conv, ffn": ("uformer", "uformer", {**UFORMER, "projection": "conv", "feed_forward": "ffn"}),
}


@functools.cache
def sample(case):
    """(source, model, variables of noise, the same under the source's names)."""
    source, name, options = CASES[case]
    model = create_model(name, **options)
    size = options.get("image_size", 96)
    inputs = example_inputs(model, (size, size) if isinstance(size, int) else size)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    return source, model, variables, restore_names(variables, source, model)


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_every_source_has_a_case():
    assert {source for source, _, _ in CASES.values()} == set(SOURCES)


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case, tmp_path):
    """Ours -> theirs -> a file -> ours -> theirs, bit for bit; every array once."""
    source, model, variables, names = sample(case)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert sum(array.size for array in names.values()) == count
    # Wrapped as training writes it, with what files have beside the weights.
    tree = {"state_dict": {f"module.{name}": array for name, array in names.items()}, "epoch": 3}
    tree["optimizer"] = {"state": {0: {"exp_avg": np.ones(3, np.float32)}}}
    tensors = names if source in ("vit_npz", "coltran") else read(write_zip(tmp_path / "a.pth", tree))
    back = convert(tensors, source, model)
    same(back, variables)
    again = restore_names(back, source, model)
    assert again.keys() == names.keys()
    for name, array in names.items():
        np.testing.assert_array_equal(again[name], array, err_msg=name)
        assert again[name].dtype == np.float32


@pytest.mark.parametrize("case", ["vit_npz", "hf_vit", "setr pup", "dpt", "unet", "uformer"])
def test_what_does_not_fit_is_named(case):
    source, model, _, names = sample(case)
    names = dict(names)
    first, last = list(names)[0], list(names)[-1]
    lacking = {name: array for name, array in names.items() if name != first}
    with pytest.raises(UserError, match=rf"1 missing \(\S+ \(there {re.escape(first)}\)\)"):
        convert(lacking, source, model)
    with pytest.raises(UserError, match=r"1 unexpected \(surplus\.weight\)"):
        convert(names | {"surplus.weight": np.zeros(3, np.float32)}, source, model)
    with pytest.raises(UserError, match=rf"1 of another shape \({re.escape(last)} is float32\[7, 7\], not \["):
        convert(names | {last: np.zeros((7, 7), np.float32)}, source, model)
    with pytest.raises(UserError, match=rf"{re.escape(last)} is int32"):
        convert(names | {last: names[last].astype(np.int32)}, source, model)
    with pytest.raises(UserError) as caught:
        convert({}, source, model)
    assert str(caught.value).count(". ") == 0 and "\n" not in str(caught.value) and "and " in str(caught.value)


def test_another_variant_is_refused():
    source, _, _, names = sample("setr naive")
    for name, options, cause in (
        ("setr_naive", {"num_layers": 3, "taps": (1,)}, r"32 unexpected \("),
        ("setr_naive", {"num_classes": 4}, r"of another shape \(auxiliary_head\.0\.conv_1\.bias"),
        ("setr_pup", {}, r"missing \(auxiliary_head_3/"),
        ("setr_naive", {"flavor": "mmseg"}, "set flavor='official'"),
        ("setr_naive", {"blocks": (1, 1, 1, 1)}, "without a ResNet"),
    ):
        with pytest.raises(UserError, match=cause):
            convert(names, source, create_model(name, **{**SETR, **options}))
    with pytest.raises(UserError, match="for UNet, not for Setr"):
        convert(names, "unet", create_model("setr_naive", **SETR))
    with pytest.raises(UserError, match="did you mean 'timm_vit'"):
        convert(names, "tim_vit", create_model("setr_naive", **SETR))


def test_leaving_out():
    """A classifier of other classes is drawn anew, the rest is loaded; patterns without effect are errors."""
    source, _, variables, names = sample("setr naive")
    model = create_model("setr_naive", **{**SETR, "num_classes": 7})
    got = convert(names, source, model, leave_out=["classifier"])
    assert got["params"]["decode_head"]["classifier"]["kernel"].shape == (4, 7)
    assert np.any(got["params"]["decode_head"]["classifier"]["kernel"])
    same(got["params"]["backbone"], variables["params"]["backbone"])
    report = check(names, source, model, leave_out=["classifier"])
    assert (
        report.fits and sorted(report.left_out)[0] == "auxiliary_head_0/classifier/bias" and len(report.left_out) == 8
    )
    with pytest.raises(UserError, match="'clasifier' matches neither"):
        convert(names, source, model, leave_out=["clasifier"])
    with pytest.raises(UserError, match="not a regular expression"):
        convert(names, source, model, leave_out=["("])


@pytest.mark.parametrize("source", ["vit_npz", "timm_vit", "deit", "hf_vit"])
def test_backbones_of_dense_models(source):
    """A classifier's file starts a SETR: head and final norm stay behind, heads are drawn."""
    case = sample(source)
    variables, names = case[2], case[3]
    model = create_model("setr_naive", **{**SETR, "num_layers": 2, "taps": (1,), "image_size": 96})
    leave = ["decode_head", "auxiliary_head", r"^(head|norm|layernorm|classifier|head_dist)\b|encoder_norm|dist_token"]
    if source in ("vit_npz", "timm_vit", "hf_vit"):
        leave[-1] = leave[-1].removesuffix("|dist_token")
    got = convert(names, source, model, leave_out=leave)
    ours = variables["params"]["backbone"]
    np.testing.assert_array_equal(got["params"]["backbone"]["embedding"]["kernel"], ours["embedding"]["kernel"])
    table = ours["tokens"]["position_embedding"]
    if source == "deit":  # the distillation token's row goes, as in SETR's own loader
        table = np.concatenate([table[:, :1], table[:, 2:]], axis=1)
    rule = {"vit_npz": "google", "timm_vit": "timm"}.get(source, "hf")
    want = resize_positions(table, (3, 3), (6, 6), rule, prefix=1)
    np.testing.assert_allclose(got["params"]["backbone"]["tokens"]["position_embedding"], want, atol=1e-6)
    assert f"to 37 rows (rule '{rule}')" in str(check(names, source, model, leave_out=leave))
    other = convert(names, source, model, leave_out=leave, pos_rule="setr")
    want = resize_positions(table, (3, 3), (6, 6), "setr", prefix=1)
    np.testing.assert_allclose(other["params"]["backbone"]["tokens"]["position_embedding"], want, atol=1e-6)


def test_position_tables_that_are_no_squares():
    source, _, _, names = sample("timm_vit")
    name = "pos_embed"
    model = create_model("vit", **{**VIT, "num_classes": 5, "image_size": 64})
    with pytest.raises(UserError, match="pos_embed has 7 rows, which are no square grid with 1 class tokens, not 17"):
        convert({**names, name: np.zeros((1, 7, 8), np.float32)}, source, model)
    with pytest.raises(UserError, match="has 9 rows"):
        convert({**names, name: np.zeros((1, 9, 8), np.float32)}, source, model)


def test_numberings_of_google_files():
    """Linen's numbers, prefixes and scanned blocks are the same weights."""
    source, model, variables, names = sample("vit_npz")
    linen = {}
    for name, array in names.items():
        for old, new in (("Attention_1", "Attention_0"), ("LayerNorm_2", "LayerNorm_1"), ("MlpBlock_3", "MlpBlock_0")):
            name = name.replace(old, new)
        linen[name] = array
    assert linen.keys() != names.keys()
    scanned = {name: array for name, array in linen.items() if "encoderblock" not in name}
    for name in [name for name in linen if "encoderblock_0/" in name]:
        blocks = [linen[name.replace("block_0/", f"block_{i}/")] for i in range(2)]
        scanned[name.replace("block_0/", "block/")] = np.stack(blocks)
    for form in (linen, scanned):
        same(convert(form, source, model), variables)
        for prefix in ("opt/target/", "params/", "params/img/"):
            wrapped = {prefix + name: array for name, array in form.items()}
            same(convert({**wrapped, "opt/state/step": np.zeros(())}, source, model), variables)


def test_positions_without_a_class_in_google_files():
    """big_vision: a table of the grid alone at the top; an older file's class row becomes part of the token."""
    source, _, _, names = sample("vit_npz")
    model = create_model("vit", **VIT, num_classes=5, cls_position=False)
    got = convert(names, source, model)["params"]["backbone"]["tokens"]
    table = names["Transformer/posembed_input/pos_embedding"]
    np.testing.assert_array_equal(got["position_embedding"], table[:, 1:])
    np.testing.assert_array_equal(got["cls_token"], names["cls"] + table[:, :1])
    plain = {name: array for name, array in names.items() if "pos_embedding" not in name}
    got = convert(plain | {"pos_embedding": table[:, 1:]}, source, model)["params"]["backbone"]["tokens"]
    np.testing.assert_array_equal(got["position_embedding"], table[:, 1:])
    np.testing.assert_array_equal(got["cls_token"], names["cls"])


def test_mmseg_without_a_bias_of_patches():
    """mmsegmentation 1.x leaves it out: zero computes what it computes. 0.x's is kept."""
    source, model, variables, names = sample("mmseg naive")
    name = "backbone.patch_embed.projection.bias"
    np.testing.assert_array_equal(convert(names, source, model)["params"]["backbone"]["embedding"]["bias"], names[name])
    without = {key: array for key, array in names.items() if key != name}
    assert not np.any(convert(without, source, model)["params"]["backbone"]["embedding"]["bias"])
    assert "1 filled in (backbone/embedding/bias)" in str(check(without, source, model))


def test_layers_that_published_modules_never_call():
    for case, names in (
        ("setr naive", ("decode_head.conv_seg.weight", "auxiliary_head.1.conv_seg.bias", "backbone.norm.weight")),
        ("setr mla", ("backbone.cls_token", "decode_head.mlahead.head2.1.num_batches_tracked")),
        ("dpt", ("pretrained.model.head.weight", "scratch.refinenet4.resConfUnit1.conv1.weight")),
        ("hf_dpt", ("dpt.layernorm.weight", "neck.fusion_stage.layers.0.residual_layer1.convolution1.weight")),
        ("uformer", ("encoderlayer_0.blocks.0.attn.relative_position_index",)),
        ("study uformer", ("conv.blocks.0.attn.relative_position_index",)),
        ("study dpt", ("pretrained.model.head.weight", "scratch.refinenet1.resConfUnit1.bn1.num_batches_tracked")),
    ):
        source, model, variables, tensors = sample(case)
        extra = {name: np.zeros(3, np.int64) for name in names}
        assert check(tensors | extra, source, model).unused == names
        same(convert(tensors | extra, source, model), variables)


def test_half_precision_files_become_float32():
    source, model, _, names = sample("unet")
    halves = {name: array.astype(np.float16) for name, array in names.items()}
    for name, leaf in restore_names(convert(halves, source, model), source, model).items():
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, halves[name].astype(np.float32))


def test_tensorflow_names_of_coltran(tmp_path):
    """A bundle as the published ones are: escaped names, moving averages, slots of the optimizer, frozen norms."""
    source, model, variables, names = sample("coltran colorizer")

    def key(name, suffix=":0"):
        return name.replace("/", ".S") + f"{suffix}/.ATTRIBUTES/VARIABLE_VALUE"

    stored = {key(name): np.zeros_like(array) for name, array in names.items()}
    stored |= {key(name, ".SExponentialMovingAverage:0"): array for name, array in names.items()}
    slot = next(iter(names)).replace("/", ".S") + ":0/.OPTIMIZER_SLOT/optimizer/rms/.ATTRIBUTES/VARIABLE_VALUE"
    stored |= {slot: np.ones(3, np.float32), "save_counter/.ATTRIBUTES/VARIABLE_VALUE": np.array(7, np.int64)}
    norm = "col_tran_core/outer_decoder/conditional_layer_norm/normalize"
    stored |= {key(f"{norm}/gamma"): np.ones(8, np.float32), key(f"{norm}/beta"): np.zeros(8, np.float32)}
    same(convert(read(write_bundle(tmp_path / "model-1", stored)), source, model), variables)
    with pytest.raises(UserError, match="is not 1 everywhere"):
        convert({**stored, key(f"{norm}/gamma"): np.full(8, 2.0, np.float32)}, source, model)
    other = create_model("coltran_colorizer", "ColTran-B", **COLTRAN)
    with pytest.raises(UserError, match="full conditioning only"):
        convert(stored, source, other)


@pytest.mark.reference
@pytest.mark.parametrize("stage", ["colorizer", "color_upsampler", "spatial_upsampler"])
def test_names_and_shapes_of_published_coltran_checkpoints(reference_data, stage):
    """At full size every variable of the original has its place, and its shape, and no other is asked for."""
    rows = json.loads((reference_data / "goldens/coltran/ckpt_name_map.json").read_text())[stage]
    stored = {}
    for name, _, shape, trainable in rows:
        value = np.float32(not trainable and "gamma" in name)
        stored[f"{name.replace('/', '.S')}/.ATTRIBUTES/VARIABLE_VALUE"] = np.broadcast_to(value, shape)
    report = check(stored, "coltran", create_model(f"coltran_{stage}"))
    assert report.fits and len(report.loaded) == sum(trainable for *_, trainable in rows)
