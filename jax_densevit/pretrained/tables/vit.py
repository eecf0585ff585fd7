"""Plain transformers: Google's `.npz`, timm, DeiT, Hugging Face; as classifiers and as backbones of dense models."""

import re
from typing import Any

import numpy as np

from jax_densevit.errors import UserError
from jax_densevit.models.dpt import Dpt
from jax_densevit.models.setr import Setr
from jax_densevit.models.vit import ViT
from jax_densevit.pretrained.tables import layouts
from jax_densevit.pretrained.tables.table import HALF, IMAGENET, Row, Source, Tensors, affine, norm, unwrap

# What is a ViT or stands on one.
WITH_BACKBONE = (ViT, Setr, Dpt)


def timm_blocks(theirs: str) -> list[Row]:
    """The encoder's blocks in timm's names; `theirs` is what comes before `blocks`."""
    block, ours = f"{theirs}blocks.{{i}}", "backbone/encoder/block_{i}"
    return [
        *norm(f"{block}.norm1", f"{ours}/norm1"),
        *affine(f"{block}.attn.qkv", f"{ours}/attention/qkv", layouts.QKV, layouts.FLAT),
        *affine(f"{block}.attn.proj", f"{ours}/attention/out", layouts.OUT),
        *norm(f"{block}.norm2", f"{ours}/norm2"),
        *affine(f"{block}.mlp.fc1", f"{ours}/mlp/fc1"),
        *affine(f"{block}.mlp.fc2", f"{ours}/mlp/fc2"),
    ]


def timm_backbone(theirs: str = "") -> list[Row]:
    """Patches, tokens, positions and blocks in timm's names."""
    return [
        *affine(f"{theirs}patch_embed.proj", "backbone/embedding", layouts.CONV),
        Row(f"{theirs}cls_token", "backbone/tokens/cls_token"),
        Row(f"{theirs}dist_token", "backbone/tokens/distillation_token"),
        Row(f"{theirs}pos_embed", "backbone/tokens/position_embedding", layouts.POSITIONS),
        *timm_blocks(theirs),
    ]


def _timm(model: Any) -> list[Row]:
    # The norm behind the mean, where timm has it there, is called otherwise than the norm of tokens.
    final = "fc_norm" if getattr(model, "pool", "token") == "mean" else "norm"
    return [
        *timm_backbone(),
        *norm(final, "norm"),
        *affine("head", "head"),
        *affine("head_dist", "head_distilled"),
    ]


def hf_backbone(theirs: str) -> list[Row]:
    """Patches, tokens, positions and blocks in Hugging Face's names on disk; `theirs` ends with a dot or is empty."""
    block, ours = f"{theirs}encoder.layer.{{i}}", "backbone/encoder/block_{i}"
    three = [f"{block}.attention.attention.{part}" for part in ("query", "key", "value")]
    qkv = f"{ours}/attention/qkv"
    return [
        *affine(f"{theirs}embeddings.patch_embeddings.projection", "backbone/embedding", layouts.CONV),
        Row(f"{theirs}embeddings.cls_token", "backbone/tokens/cls_token"),
        Row(f"{theirs}embeddings.distillation_token", "backbone/tokens/distillation_token"),
        Row(f"{theirs}embeddings.position_embeddings", "backbone/tokens/position_embedding", layouts.POSITIONS),
        *norm(f"{block}.layernorm_before", f"{ours}/norm1"),
        Row(tuple(f"{name}.weight" for name in three), f"{qkv}/kernel", layouts.QKV_APART),
        Row(tuple(f"{name}.bias" for name in three), f"{qkv}/bias", layouts.QKV_BIAS_APART),
        *affine(f"{block}.attention.output.dense", f"{ours}/attention/out", layouts.OUT),
        *norm(f"{block}.layernorm_after", f"{ours}/norm2"),
        *affine(f"{block}.intermediate.dense", f"{ours}/mlp/fc1"),
        *affine(f"{block}.output.dense", f"{ours}/mlp/fc2"),
    ]


def _hf(model: Any) -> list[Row]:
    distilled = getattr(model, "distilled", False)
    head = "cls_classifier" if distilled else "classifier"
    return [
        *hf_backbone(""),
        *norm("layernorm", "norm"),
        *affine(head, "head"),
        *affine("distillation_classifier", "head_distilled"),
    ]


def _prepare_hf(tensors: Tensors, model: Any) -> Tensors:
    """`vit.` or `deit.` before the backbone's names is there or not."""
    return {re.sub(r"^(vit|deit)\.", "", name): array for name, array in unwrap(tensors, model).items()}


# Linen's numbering of submodules to that of the released files, which counts all of a block's together.
_RENUMBER = (
    ("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"),
    ("LayerNorm_1", "LayerNorm_2"),
    ("MlpBlock_0", "MlpBlock_3"),
)
_PREFIXES = ("opt/target/", "target/", "params/img/", "params/", "img/")
_POSITIONS = "Transformer/posembed_input/pos_embedding"


def _npz(model: Any) -> list[Row]:
    del model
    block, ours = "Transformer/encoderblock_{i}", "backbone/encoder/block_{i}"
    attention, mlp = f"{block}/MultiHeadDotProductAttention_1", f"{block}/MlpBlock_3"
    three = [f"{attention}/{part}" for part in ("query", "key", "value")]
    rows = [
        Row("embedding/kernel", "backbone/embedding/kernel"),
        Row("embedding/bias", "backbone/embedding/bias"),
        Row("cls", "backbone/tokens/cls_token"),
        Row(_POSITIONS, "backbone/tokens/position_embedding", layouts.POSITIONS),
        Row(tuple(f"{n}/kernel" for n in three), f"{ours}/attention/qkv/kernel", layouts.stacked(1)),
        Row(tuple(f"{n}/bias" for n in three), f"{ours}/attention/qkv/bias", layouts.stacked(0)),
    ]
    for there, here, leaves in (
        (f"{block}/LayerNorm_0", f"{ours}/norm1", ("scale", "bias")),
        (f"{attention}/out", f"{ours}/attention/out", ("kernel", "bias")),
        (f"{block}/LayerNorm_2", f"{ours}/norm2", ("scale", "bias")),
        (f"{mlp}/Dense_0", f"{ours}/mlp/fc1", ("kernel", "bias")),
        (f"{mlp}/Dense_1", f"{ours}/mlp/fc2", ("kernel", "bias")),
        ("Transformer/encoder_norm", "norm", ("scale", "bias")),
        ("head", "head", ("kernel", "bias")),
    ):
        rows += [Row(f"{there}/{leaf}", f"{here}/{leaf}") for leaf in leaves]
    return rows


def _prepare_npz(tensors: Tensors, model: Any) -> Tensors:
    """Every form to that of the released files: prefixes, Linen's numbers, scanned blocks, grid-only positions."""
    prefix = next((p for p in _PREFIXES if f"{p}embedding/kernel" in tensors), "")
    named = {name[len(prefix) :]: array for name, array in tensors.items() if name.startswith(prefix)}
    linen = any("MultiHeadDotProductAttention_0/" in name for name in named)
    out: Tensors = {}
    for name, array in named.items():
        if linen:
            for old, new in _RENUMBER:
                name = name.replace(f"/{old}/", f"/{new}/")
        if name == "pos_embedding":
            name = _POSITIONS
        if name.startswith("Transformer/encoderblock/"):
            if array.ndim < 2:
                raise UserError(f"{name} of a scanned encoder has no axis of blocks.")
            rest = name.removeprefix("Transformer/encoderblock/")
            out |= {f"Transformer/encoderblock_{i}/{rest}": array[i] for i in range(len(array))}
        else:
            out[name] = array
    table = out.get(_POSITIONS)
    grid_only = not getattr(model, "cls_position", True)
    if (
        table is not None
        and grid_only
        and "cls" in out
        and round((table.shape[1] - 1) ** 0.5) ** 2 == table.shape[1] - 1
    ):
        # big_vision's rule: the class token's position becomes part of the token.
        out["cls"] = np.asarray(out["cls"]) + table[:, :1]
        out[_POSITIONS] = table[:, 1:]
    return out


VIT_NPZ = Source(_npz, WITH_BACKBONE, "google", prepare=_prepare_npz, normalisation=HALF)
TIMM_VIT = Source(_timm, WITH_BACKBONE, "timm", prepare=unwrap, normalisation=HALF)
# DeiT's fine-tuning resizes by PyTorch's bicubic.
DEIT = Source(_timm, WITH_BACKBONE, "hf", prepare=unwrap, normalisation=IMAGENET)
HF_VIT = Source(_hf, WITH_BACKBONE, "hf", (r"(^|\.)pooler\.",), _prepare_hf, normalisation=HALF)
