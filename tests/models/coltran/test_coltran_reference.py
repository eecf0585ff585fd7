"""ColTran against outputs of the original TensorFlow code and its names (only with --reference-data)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from jax_densevit.layers import bits
from jax_densevit.layers.axial_attention import COLUMN, ROW, relative_bias
from jax_densevit.layers.resize import center_square, resize_area
from jax_densevit.models.coltran.colorizer import Colorizer, shift_down, shift_right
from jax_densevit.models.coltran.conditional import ConditionalAttention, ConditionalNorm, Conditioning
from jax_densevit.models.coltran.stack import ENCODER, AxialStack
from jax_densevit.models.registry import create_model, example_inputs, find_model

pytestmark = pytest.mark.reference

SUBLAYERS = {"row_att": "row_attention", "row_mlp": "row_mlp", "col_att": "column_attention", "col_mlp": "column_mlp"}
TOP = {
    "symbol_embed/kernel": "symbol_embedding/embedding",
    "parallel_head/kernel": "parallel/kernel",
    "auto_head": "head",
    "head": "head",
    "final_ln/gamma": "final_norm/scale",
    "final_ln/beta": "final_norm/bias",
    "channel_embed/kernel": "channel_embedding",
    "gray_embed/kernel": "gray_embedding",
    "input_dense": "input",
    "encoder/gray_embed/kernel": "gray_encoder/embedding",
    "encoder/gray_embed/bias": "gray_encoder/bias",
}


def path_of(role, encoder):
    """Our path of a role in the name map; `encoder` is where the encoder's stack lies. None for what is frozen."""
    for old, new in TOP.items():
        if role == old or role.startswith(f"{old}/"):
            return tuple((new + role[len(old) :]).split("/"))
    place, _, rest = role.partition("/")
    path = {"encoder": encoder, "outer": ("outer_decoder",), "inner": ("inner_decoder",)}[place]
    parts = rest.split("/")
    if parts[0] in ("pos_h", "pos_w"):
        return (*path, {"pos_h": "row_positions", "pos_w": "column_positions"}[parts[0]])
    path = (*path, parts[0].replace("layer", "layer_"))
    sublayer, leaf = SUBLAYERS[parts[1]], parts[2:]
    if leaf[0] == "post_ln":
        if leaf[1].startswith("frozen"):
            return None
        return (*path, f"{sublayer}_norm", {"gamma": "scale", "beta": "bias"}.get(leaf[-1], leaf[-1]))
    if sublayer.endswith("mlp"):
        return (*path, sublayer, {"in": "fc1", "out": "fc2", "cond": "cond"}[leaf[0]], leaf[1])
    return (*path, sublayer, "relative_bias" if leaf[0] == "rel_bias" else f"{leaf[0]}_kernel")


def weights(archive, key, prefix="", encoder=("stack",)):
    """The parameters of a recorded case. Its frozen scales and shifts of norms must be those that we leave out."""
    flat, at = {}, 0
    for _, role, shape, _ in json.loads(str(archive[f"{key}/w_index"])):
        value = archive[f"{key}/w_flat"][at : at + np.prod(shape, dtype=int)].reshape(shape)
        at += value.size
        path = path_of(prefix + role, encoder)
        if path is None:
            np.testing.assert_array_equal(value, float(role.endswith("gamma")))
        else:
            flat[path] = value
    assert at == archive[f"{key}/w_flat"].size
    return unflatten_dict(flat)


def wide(value, axis, size):
    """More input channels, of no effect: the originals were recorded with fewer channels in than out."""
    pad = [(0, 0)] * value.ndim
    pad[axis] = (0, size - value.shape[axis])
    return np.pad(value, pad)


@pytest.fixture(scope="module")
def layers(reference_data):
    return np.load(reference_data / "goldens/coltran/layers.npz", allow_pickle=False)


@pytest.fixture(scope="module")
def core(reference_data):
    return np.load(reference_data / "goldens/coltran/core.npz", allow_pickle=False)


@pytest.fixture(scope="module")
def names(reference_data):
    return json.loads((reference_data / "goldens/coltran/ckpt_name_map.json").read_text())


def test_symbols_and_gray_are_exact(reference_data):
    golden = np.load(reference_data / "goldens/coltran/utils.npz", allow_pickle=False)
    for source, target in ((8, 3), (8, 5), (8, 4), (3, 8), (5, 8)):
        case = f"convert_bits/{source}to{target}"
        np.testing.assert_array_equal(
            bits.convert_bits(golden[f"{case}/in"], source, target), golden[f"{case}/out"], case
        )
    np.testing.assert_array_equal(bits.from_symbols(golden["bins/bins"]), golden["bins/labels"])
    np.testing.assert_array_equal(bits.to_symbols(golden["bins/labels"]), golden["bins/labels_to_bins"])
    np.testing.assert_array_equal(jax.jit(bits.gray_from_int32)(golden["gray/rgb"]), golden["gray/from_int32"])


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_area_resize_is_exact(reference_data, kind):
    golden = np.load(reference_data / "goldens/coltran/utils.npz", allow_pickle=False)
    cases = [
        key.removesuffix("/in") for key in golden.files if key.startswith(("area", "square")) and key[-3:] == "/in"
    ]
    assert len(cases) == 10
    for case in cases:
        x, expected = kind(golden[f"{case}/in"]), golden[f"{case}/out"]
        x = center_square(x) if case.startswith("square") else x
        np.testing.assert_array_equal(resize_area(x, expected.shape[:2]), expected, case)
    small = resize_area(kind(golden["down_up/targets"]), (4, 4))
    np.testing.assert_array_equal(small, golden["down_up/targets_4"])
    np.testing.assert_array_equal(resize_area(small, (16, 16)), golden["down_up/targets_4_up_back"])


def test_relative_bias_and_shifts(reference_data, layers):
    golden = np.load(reference_data / "goldens/coltran/utils.npz", allow_pickle=False)
    found = relative_bias(jnp.asarray(golden["relbias/in"]))
    np.testing.assert_array_equal(found.swapaxes(0, 1), golden["relbias/out"])
    np.testing.assert_array_equal(shift_down(layers["shift/in"]), layers["shift/down"])
    np.testing.assert_array_equal(shift_right(layers["shift/in"]), layers["shift/right"])


def test_positions(layers):
    tables = weights(layers, "pos_embed", "encoder/")["stack"]
    stack = AxialStack(0, ENCODER, 4, 4, 1, (3, 5))
    np.testing.assert_allclose(
        stack.apply({"params": tables}, layers["pos_embed/in/x"]), layers["pos_embed/out/y"], atol=1e-6
    )


def test_conditional_norm(layers):
    cases = sorted({"/".join(key.split("/")[:2]) for key in layers.files if key.startswith("cond_ln/")})
    assert len(cases) == 7
    for case in cases:
        pool, sequence, act = case.removeprefix("cond_ln/").split("_")
        x, z = layers[f"{case}/in/x"], wide(layers[f"{case}/in/cond"], -1, 6)
        params, at = {}, 0
        for _, role, shape, _ in json.loads(str(layers[f"{case}/w_index"])):
            value = layers[f"{case}/w_flat"][at : at + np.prod(shape, dtype=int)].reshape(shape)
            params[role.split("/")[-1]] = value
            at += value.size
        np.testing.assert_array_equal(params.pop("frozen_gamma"), 1)
        np.testing.assert_array_equal(params.pop("frozen_beta"), 0)
        params["kernel"] = wide(params["kernel"], 0, 6)
        conditioning = Conditioning(norm_pool=pool, norm_sequence=sequence, norm_act=act)
        norm = ConditionalNorm(6, (3, 5), conditioning).bind({"params": params})
        np.testing.assert_allclose(norm(x, norm.condition(z)), layers[f"{case}/out/y"], atol=1e-5, err_msg=case)
        recorded = f"{case}/out/y_row1_official_sampling"
        if recorded in layers.files:
            y = norm(x, norm.condition(z, by_row=True))
            np.testing.assert_allclose(y[:, 1:2], layers[recorded], atol=1e-5)
            assert np.abs(y[:, 1:2] - layers[f"{case}/out/y"][:, 1:2]).max() > 0.01


def test_conditional_attention(layers):
    cases = sorted({"/".join(key.split("/")[:2]) for key in layers.files if key.startswith("attn/")})
    cases = [case for case in cases if "future_present" not in case]
    assert len(cases) == 16
    for case in cases:
        axis, mask, *_ = case.removeprefix("attn/").split("_")
        hp = json.loads(str(layers[f"{case}/hp"]))
        axis = {"row": ROW, "col": COLUMN}[axis]
        params, at = {}, 0
        for _, role, shape, _ in json.loads(str(layers[f"{case}/w_index"])):
            value = layers[f"{case}/w_flat"][at : at + np.prod(shape, dtype=int)].reshape(shape)
            at += value.size
            name = "relative_bias" if role == "rel_bias" else f"{role}_kernel"
            params[name] = wide(value, 0, 6) if role in "qkv" else value
        conditioned = tuple(name for name in "qkv" if hp.get(f"cond_{name}"))
        conditioning = Conditioning(
            attention=conditioned,
            attention_scale=hp.get("cond_scale", True),
            attention_act=hp.get("cond_act", "identity"),
        )
        attention = ConditionalAttention(6, 2, (3, 5)[axis - 1], axis, mask == "future", 7, conditioning)
        attention = attention.bind({"params": params})
        context = layers[f"{case}/in/cond"] if conditioned else None
        y = attention(wide(layers[f"{case}/in/x"], -1, 6), attention.condition(context))
        np.testing.assert_allclose(y, layers[f"{case}/out/y"], atol=1e-5, err_msg=case)


def test_encoder_stack(layers):
    params = weights(layers, "factorized", "encoder/")["stack"]
    y = AxialStack(2, ENCODER, 8, 12, 2, (3, 5)).apply({"params": params}, layers["factorized/in/x"])
    np.testing.assert_allclose(y, layers["factorized/out/y"], atol=1e-5)


def recorded_colorizer(core, key):
    hp = json.loads(str(core[f"{key}/hp"]))
    taken = {name: value for name, value in hp.items() if name.startswith(("cond_", "skip"))}
    return Colorizer(
        image_size=(3, 5),
        hidden_size=hp["hidden_size"],
        mlp_size=hp["ff_size"],
        num_heads=hp["num_heads"],
        encoder_layers=hp["num_encoder_layers"],
        outer_layers=hp["num_outer_layers"],
        inner_layers=hp["num_inner_layers"],
        **taken,
    )


def test_gray_encoder(core):
    params = weights(core, "gray_encoder", "encoder/", ("gray_encoder", "stack"))
    z = recorded_colorizer(core, "gray_encoder").apply(
        {"params": params}, core["gray_encoder/in/gray"][..., 0], method="encode"
    )
    np.testing.assert_allclose(z, core["gray_encoder/out/z"], atol=1e-5)


VARIANTS = "full addition_only no_cln no_cmlp no_catt shift_mlp shift_att mean_ln cs_tanh_ln no_skip tanh_all".split()


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoders(core, variant):
    key = f"outer/{variant}"
    model, params = recorded_colorizer(core, key), weights(core, key, "outer/")
    u = jax.jit(lambda p, e, z: model.apply({"params": p}, e, z, method="outer"))(
        params, core[f"{key}/in/emb"], core[f"{key}/in/z"]
    )
    np.testing.assert_allclose(u, core[f"{key}/out/upper"], atol=1e-5)

    key = f"inner/{variant}"
    model, params = recorded_colorizer(core, key), weights(core, key, "inner/")
    inputs = [core[f"{key}/in/{name}"] for name in ("emb", "upper", "z")]
    for by_row, recorded in ((False, "h"), (True, "h_rowwise_official_sampling")):
        h = jax.jit(lambda p, x, by_row=by_row: model.apply({"params": p}, *x, by_row, method="inner"))(params, inputs)
        np.testing.assert_allclose(h, core[f"{key}/out/{recorded}"], atol=1e-5, err_msg=recorded)


@pytest.mark.parametrize(
    "name,key,encoder,trainable,frozen",
    [
        ("coltran_colorizer", "colorizer", ("gray_encoder", "stack"), 46_310_400, 12_288),
        ("coltran_color_upsampler", "color_upsampler", ("stack",), 13_476_608, 0),
        ("coltran_spatial_upsampler", "spatial_upsampler", ("stack",), 10_910_464, 0),
    ],
)
def test_every_tensor_of_a_checkpoint_is_one_parameter(names, name, key, encoder, trainable, frozen):
    model = create_model(name)
    inputs = example_inputs(model, find_model(name).image_size)
    ours = {
        path: leaf.shape
        for path, leaf in flatten_dict(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]).items()
    }
    theirs = {path_of(role, encoder): tuple(shape) for _, role, shape, trained in names[key] if trained}
    assert theirs == ours
    assert len(theirs) == sum(row[3] for row in names[key])
    assert sum(np.prod(shape) for shape in ours.values()) == trainable
    untrained = [row for row in names[key] if not row[3]]
    assert all(path_of(row[1], encoder) is None for row in untrained)
    assert sum(np.prod(row[2], dtype=int) for row in untrained) == frozen
