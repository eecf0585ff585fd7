"""SETR in the authors' names (fudan-zvg/SETR) and in mmsegmentation's."""

from typing import Any

from jax_densevit.errors import UserError
from jax_densevit.models.setr import Setr
from jax_densevit.pretrained.tables import layouts
from jax_densevit.pretrained.tables.table import BATCH_COUNTER, IMAGENET, Row, Source, affine, conv_norm, norm, unwrap
from jax_densevit.pretrained.tables.vit import timm_backbone

CONV_1X1 = layouts.CONV_1X1


def _check(model: Any, flavor: str) -> None:
    if model.flavor != flavor or model.blocks:
        raise UserError(
            f"These weights are of SETR's {flavor} flavor without a ResNet; the model is flavor={model.flavor!r}"
            f"{' with one' if model.blocks else ''}: set flavor={flavor!r}."
        )


def _official(model: Any) -> list[Row]:
    _check(model, "official")
    rows = timm_backbone("backbone.")
    if model.decoder == "mla":
        for i in range(4):  # p2 is the shallowest
            neck = f"backbone.mla.mla_p{i + 2}"
            rows += norm(f"backbone.norm_{i}", f"neck/norm_{i}")
            rows += conv_norm(f"{neck}_1x1.0", f"{neck}_1x1.1", f"neck/project_{i}")
            rows += conv_norm(f"{neck}.0", f"{neck}.1", f"neck/extract_{i}")
            head = f"decode_head.mlahead.head{i + 2}"
            for j in range(2):
                rows += conv_norm(f"{head}.{3 * j}", f"{head}.{3 * j + 1}", f"decode_head/branch_{i}_{j}")
        rows += affine("decode_head.cls", "decode_head/classifier", layouts.CONV)
        return rows + affine("auxiliary_head.{i}.aux", "auxiliary_head_{i}", CONV_1X1)
    for theirs, ours, auxiliary in (
        ("decode_head", "decode_head", False),
        ("auxiliary_head.{i}", "auxiliary_head_{i}", True),
    ):
        rows += norm(f"{theirs}.norm", f"{ours}/norm")
        scales = model.stack_head(None, auxiliary=auxiliary, parent=None).scales
        for n in range(len(scales)):
            rows += conv_norm(f"{theirs}.conv_{n}", f"{theirs}.syncbn_fc_{n}", f"{ours}/conv_{n}")
        rows += affine(f"{theirs}.conv_{len(scales)}", f"{ours}/classifier", CONV_1X1)
    return rows


def mmseg_backbone(theirs: str) -> list[Row]:
    """mmsegmentation's ViT. Its 1.x writes no bias of the patches unless told to: it is zero then."""
    block, ours = f"{theirs}layers.{{i}}", "backbone/encoder/block_{i}"
    qkv, patches = f"{ours}/attention/qkv", f"{theirs}patch_embed.projection"
    return [
        Row(f"{patches}.weight", "backbone/embedding/kernel", layouts.CONV),
        Row(f"{patches}.bias", "backbone/embedding/bias", absent=0.0),
        Row(f"{theirs}cls_token", "backbone/tokens/cls_token"),
        Row(f"{theirs}pos_embed", "backbone/tokens/position_embedding", layouts.POSITIONS),
        *norm(f"{block}.ln1", f"{ours}/norm1"),
        Row(f"{block}.attn.attn.in_proj_weight", f"{qkv}/kernel", layouts.QKV),
        Row(f"{block}.attn.attn.in_proj_bias", f"{qkv}/bias", layouts.FLAT),
        *affine(f"{block}.attn.attn.out_proj", f"{ours}/attention/out", layouts.OUT),
        *norm(f"{block}.ln2", f"{ours}/norm2"),
        *affine(f"{block}.ffn.layers.0.0", f"{ours}/mlp/fc1"),
        *affine(f"{block}.ffn.layers.1", f"{ours}/mlp/fc2"),
    ]


def _mmseg(model: Any) -> list[Row]:
    _check(model, "mmseg")
    rows = mmseg_backbone("backbone.")
    rows += affine("decode_head.conv_seg", "decode_head/classifier", CONV_1X1)
    if model.decoder == "mla":
        for i in range(4):
            rows += norm(f"neck.norm.{i}", f"neck/norm_{i}")
            for theirs, ours in (
                (f"neck.mla.channel_proj.{i}", f"neck/project_{i}"),
                (f"neck.mla.feat_extract.{3 - i}", f"neck/extract_{i}"),  # theirs counts from the deepest
                (f"decode_head.up_convs.{i}.0", f"decode_head/branch_{i}_0"),
                (f"decode_head.up_convs.{i}.1", f"decode_head/branch_{i}_1"),
            ):
                rows += conv_norm(f"{theirs}.conv", f"{theirs}.bn", ours)
        return rows + affine("auxiliary_head.{i}.conv_seg", "auxiliary_head_{i}", CONV_1X1)
    rows += affine("auxiliary_head.{i}.conv_seg", "auxiliary_head_{i}/classifier", CONV_1X1)
    for theirs, ours in (("decode_head", "decode_head"), ("auxiliary_head.{i}", "auxiliary_head_{i}")):
        rows += norm(f"{theirs}.norm", f"{ours}/norm")
        rows += conv_norm(f"{theirs}.up_convs.{{n}}.0.conv", f"{theirs}.up_convs.{{n}}.0.bn", f"{ours}/conv_{{n}}")
    return rows


# MLA's class token and its position are dropped before the first block.
_UNUSED = (BATCH_COUNTER, r"^backbone\.norm\.", r"^backbone\.ln1\.", r"^backbone\.cls_token$")
SETR = Source(_official, (Setr,), "setr", (*_UNUSED, r"(^|\.)conv_seg\."), unwrap, IMAGENET)
MMSEG_SETR = Source(_mmseg, (Setr,), "setr", _UNUSED, unwrap, IMAGENET)
