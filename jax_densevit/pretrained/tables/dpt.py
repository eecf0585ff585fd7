"""DPT in the authors' names (isl-org/DPT, and the study's) and in Hugging Face's."""

from typing import Any

from jax_densevit.errors import UserError
from jax_densevit.models.dpt import Dpt
from jax_densevit.pretrained.tables import layouts
from jax_densevit.pretrained.tables.table import BATCH_COUNTER, HALF, Row, Source, affine, conv_norm, norm, unwrap
from jax_densevit.pretrained.tables.vit import hf_backbone, timm_backbone


def _resize(level: int) -> layouts.Layout:
    return layouts.UPSAMPLE if level < 2 else layouts.CONV


def _heads(pairs: tuple[tuple[str, str], ...]) -> list[Row]:
    """Segmentation heads are numbered 0, 1 (norm) and 4, the depth head 0, 2 and 4."""
    rows = []
    for theirs, ours in pairs:
        rows += conv_norm(f"{theirs}.0", f"{theirs}.1", f"{ours}/conv")
        rows += affine(f"{theirs}.0", f"{ours}/conv1", layouts.CONV)
        rows += affine(f"{theirs}.2", f"{ours}/conv2", layouts.CONV)
        rows += affine(f"{theirs}.4", f"{ours}/classifier", layouts.CONV_1X1)
    return rows


def _published(model: Any) -> list[Row]:
    del model
    rows = timm_backbone("pretrained.model.")
    # The hybrid's stem, timm's ResNetV2.
    stem, block = "pretrained.model.patch_embed.backbone", "stages.{s}.blocks.{b}"
    rows += [Row(f"{stem}.stem.conv.weight", "stem/stem/conv/kernel", layouts.CONV)]
    rows += norm(f"{stem}.stem.norm", "stem/stem/norm")
    for theirs, number, ours in (("", "{n}", "conv{n}"), ("downsample.", "", "shortcut")):
        there, here = f"{stem}.{block}.{theirs}", f"stem/stage_{{s}}_block_{{b}}/{ours}"
        rows += [Row(f"{there}conv{number}.weight", f"{here}/conv/kernel", layouts.CONV)]
        rows += norm(f"{there}norm{number}", f"{here}/norm")
    for i in range(4):
        post, fusion = f"pretrained.act_postprocess{i + 1}", f"scratch.refinenet{i + 1}"
        rows += affine(f"{post}.0.project.0", f"readout_{i}")
        rows += affine(f"{post}.3", f"reassemble_{i}/project", layouts.CONV_1X1)
        rows += affine(f"{post}.4", f"reassemble_{i}/resize", _resize(i))
        rows += [Row(f"scratch.layer{i + 1}_rn.weight", f"level_{i}/kernel", layouts.CONV)]
        rows += affine(f"{fusion}.out_conv", f"fusion_{i}/project", layouts.CONV_1X1)
        for n, unit in ((1, "skip"), (2, "refine")):
            there, here = f"{fusion}.resConfUnit{n}", f"fusion_{i}/{unit}"
            rows += affine(f"{there}.conv{{n}}", f"{here}/conv{{n}}", layouts.CONV)
            rows += norm(f"{there}.bn{{n}}", f"{here}/norm{{n}}")
    return rows + _heads((("scratch.output_conv", "head"), ("auxlayer", "auxiliary_head")))


def _hf(model: Any) -> list[Row]:
    if model.blocks:
        raise UserError("Hugging Face's hybrid DPT has no table of names; the authors' file of it has (source 'dpt').")
    rows = hf_backbone("dpt.")
    for i in range(4):
        stage, fusion = "neck.reassemble_stage", f"neck.fusion_stage.layers.{3 - i}"  # from the deepest
        rows += affine(f"{stage}.readout_projects.{i}.0", f"readout_{i}")
        rows += affine(f"{stage}.layers.{i}.projection", f"reassemble_{i}/project", layouts.CONV_1X1)
        rows += affine(f"{stage}.layers.{i}.resize", f"reassemble_{i}/resize", _resize(i))
        rows += [Row(f"neck.convs.{i}.weight", f"level_{i}/kernel", layouts.CONV)]
        rows += affine(f"{fusion}.projection", f"fusion_{i}/project", layouts.CONV_1X1)
        for n, unit in ((1, "skip"), (2, "refine")):
            there, here = f"{fusion}.residual_layer{n}", f"fusion_{i}/{unit}"
            rows += affine(f"{there}.convolution{{n}}", f"{here}/conv{{n}}", layouts.CONV)
            rows += norm(f"{there}.batch_norm{{n}}", f"{here}/norm{{n}}")
    return rows + _heads((("head.head", "head"), ("auxiliary_head.head", "auxiliary_head")))


# Layers that the published modules never call: the ViT's classifier and final norm, the deepest fusion's first unit.
DPT = Source(
    _published,
    (Dpt,),
    "setr",
    (BATCH_COUNTER, r"^pretrained\.model\.(head|norm|fc_norm)\.", r"^scratch\.refinenet4\.resConfUnit1\."),
    unwrap,
    HALF,
)
HF_DPT = Source(
    _hf,
    (Dpt,),
    "hf",
    (BATCH_COUNTER, r"^dpt\.(layernorm|pooler)\.", r"^neck\.fusion_stage\.layers\.0\.residual_layer1\."),
    unwrap,
    HALF,
)
