"""ColTran's TensorFlow checkpoints (google-research/coltran): variables by name, numbered as Keras numbers them."""

from typing import Any

import numpy as np

from jax_densevit.errors import UserError
from jax_densevit.models.coltran.colorizer import Colorizer
from jax_densevit.models.coltran.conditional import Conditioning
from jax_densevit.models.coltran.upsampler import Upsampler
from jax_densevit.pretrained.tables.table import Row, Source, Tensors

_SUFFIX = "/.ATTRIBUTES/VARIABLE_VALUE"
_AVERAGE = "/ExponentialMovingAverage"
_UPSAMPLERS = {3: "color_upsampler", 8: "spatial_upsampler"}  # by the bits of their symbols


def _number(name: str, n: int) -> str:
    """Keras's numbering: the first has none."""
    return f"{name}_{n}" if n else name


def _dense(theirs: str, ours: str) -> list[Row]:
    return [Row(f"{theirs}/{leaf}", f"{ours}/{leaf}") for leaf in ("kernel", "bias")]


def _attention(theirs: str, ours: str, axis: int) -> list[Row]:
    names = [("output", "out"), *((name, name) for name in ("q", "k", "v", "cond_q", "cond_k", "cond_v"))]
    rows = [Row(f"{theirs}/{there}/kernel", f"{ours}/{here}_kernel") for there, here in names]
    return [*rows, Row(f"{theirs}/relative_attention_bias_{axis}", f"{ours}/relative_bias")]


def _positions(theirs: str, ours: str) -> list[Row]:
    pairs = enumerate(("row_positions", "column_positions"))
    return [Row(f"{theirs}/position_embedding_{i}", f"{ours}/{name}") for i, name in pairs]


def _encoder(theirs: str, ours: str, layers: int, first_dense: int, first_norm: int) -> list[Row]:
    """Unconditioned layers: row attention, MLP, column attention, MLP, each with a norm behind it."""
    rows = _positions(f"{theirs}/position_embed", ours)
    for layer in range(layers):
        for half, (side, axis) in enumerate((("row", 1), ("column", 0))):
            n, here = 2 * layer + half, f"{ours}/layer_{layer}/{side}"
            rows += _attention(f"{theirs}/{_number('self_attention_nd', n)}", f"{here}_attention", axis)
            for i in (0, 1):  # the MLPs' names have no scope
                rows += _dense(f"dense_{first_dense + 2 * n + i}", f"{here}_mlp/fc{i + 1}")
            for i, part in enumerate(("attention", "mlp")):
                norm = f"{theirs}/{_number('layer_normalization', first_norm + 2 * n + i)}"
                rows += [Row(f"{norm}/gamma", f"{here}_{part}_norm/scale")]
                rows += [Row(f"{norm}/beta", f"{here}_{part}_norm/bias")]
    return rows


def _decoder(name: str, layers: int, sides: tuple, place: int, dense: int, norms: int, norm_dense: int) -> list[Row]:
    """Conditioned layers. `sides`: (ours, attention's name, axis, affine's name) of a layer's halves."""
    theirs = f"col_tran_core/{name}"
    rows = _positions(f"{theirs}/position_embed_{place}", name)
    for layer in range(layers):
        for half, (side, attention, axis, affine) in enumerate(sides):
            n, here = len(sides) * layer + half, f"{name}/layer_{layer}/{side}"
            rows += _attention(f"{theirs}/{attention}_{layer}", f"{here}_attention", axis)
            rows += _dense(f"{theirs}/{affine}_{layer}", f"{here}_mlp/cond")
            for i in (0, 1):
                rows += _dense(f"dense_{dense + 2 * n + i}", f"{here}_mlp/fc{i + 1}")
            for i, part in enumerate(("attention", "mlp")):
                norm = f"{theirs}/{_number('conditional_layer_norm', norms + 2 * n + i)}"
                rows += [Row(f"{norm}/spatial_average", f"{here}_{part}_norm/pool")]
                rows += _dense(f"{norm}/dense_{norm_dense + 2 * n + i}", f"{here}_{part}_norm")
    return rows


def _rows(model: Any) -> list[Row]:
    if not isinstance(model, Colorizer):
        if model.bits not in _UPSAMPLERS:
            raise UserError(f"ColTran's upsamplers have 3 or 8 bits, not {model.bits}.")
        theirs = _UPSAMPLERS[model.bits]
        return [
            Row(f"{theirs}/dense/kernel", "channel_embedding"),
            Row(f"{theirs}/dense_1/kernel", "gray_embedding"),
            *_dense(f"{theirs}/dense_2", "input"),
            *_dense(f"{theirs}/dense_3", "head"),
            *_encoder(f"{theirs}/factorized_attention", "stack", model.num_layers, 4, 0),
        ]
    if model.conditioning != Conditioning():
        raise UserError("Names of ColTran's colorizer are known for its full conditioning only, not for its ablations.")
    core, gray = "col_tran_core", "col_tran_core/gray_scale_encoder"
    encoder, outer, inner = model.encoder_layers, model.outer_layers, model.inner_layers
    first = 2 + 4 * encoder
    column = ("column", "mask_col_att", 0, "affine_c")
    rows = [
        Row(f"{gray}/dense_1/kernel", "gray_encoder/embedding"),
        Row(f"{gray}/dense_1/bias", "gray_encoder/bias"),
        Row(f"{core}/dense/kernel", "symbol_embedding/embedding"),
        Row(f"{core}/parallel_logits/kernel", "parallel/kernel"),
        *_dense(f"{core}/auto_logits", "head"),
        Row(f"{core}/layer_normalization/gamma", "final_norm/scale"),
        Row(f"{core}/layer_normalization/beta", "final_norm/bias"),
        *_encoder(f"{gray}/factorized_attention", "gray_encoder/stack", encoder, 2, 1),
    ]
    sides = (("row", "unmask_row_att", 1, "affine_r"), column)
    rows += _decoder("outer_decoder", outer, sides, 1, first, 0, first + 4 * outer)
    sides = (("row", "mask_row_att", 1, "affine_c"),)
    first += 8 * outer
    return rows + _decoder("inner_decoder", inner, sides, 2, first, 4 * outer, first + 2 * inner)


def _prepare(tensors: Tensors, model: Any) -> Tensors:
    """Variables' names without escapes; the moving average, which evaluation uses, in place of what it averages."""
    del model
    plain, average = {}, {}
    for name, array in tensors.items():
        if "/.OPTIMIZER_SLOT/" in name or name.startswith(("optimizer/", "save_counter")):
            continue
        name = name.removesuffix(_SUFFIX)
        name = "/".join(part.replace("..", ".") for part in name.split(".S")).removesuffix(":0")
        if name.endswith(_AVERAGE):
            average[name.removesuffix(_AVERAGE)] = array
        else:
            plain[name] = array
    for name, array in plain.items():
        frozen = {"normalize/gamma": 1.0, "normalize/beta": 0.0}.get("/".join(name.split("/")[-2:]))
        if frozen is not None and np.any(np.asarray(array) != frozen):
            raise UserError(f"{name} of a conditional norm is not {frozen:g} everywhere, as ColTran keeps it; refused.")
    return plain | average


COLTRAN = Source(_rows, (Colorizer, Upsampler), unused=(r"/normalize/(gamma|beta)$",), prepare=_prepare)
