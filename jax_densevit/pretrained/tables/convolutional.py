"""U-Net (milesial/Pytorch-UNet and the study's), Uformer (the authors') and the axial transformer (lucidrains)."""

from typing import Any

from jax_densevit.models.axial import Axial
from jax_densevit.models.uformer import Uformer
from jax_densevit.models.unet import UNet
from jax_densevit.pretrained.tables import layouts
from jax_densevit.pretrained.tables.layouts import Layout
from jax_densevit.pretrained.tables.table import BATCH_COUNTER, UNIT, Row, Source, affine, conv_norm, norm, unwrap


def _unet(model: Any) -> list[Row]:
    del model
    rows = affine("outc.conv", "head", layouts.CONV_1X1)
    blocks = [(f"down{i}.maxpool_conv.1" if i else "inc", f"encoder_{i}") for i in range(5)]
    for i in range(4):
        rows += affine(f"up{4 - i}.up", f"upsample_{i}", layouts.UPSAMPLE)
        blocks.append((f"up{4 - i}.conv", f"decoder_{i}"))
    for theirs, ours in blocks:
        for name, n in (("first", 0), ("second", 3)):
            rows += conv_norm(f"{theirs}.double_conv.{n}", f"{theirs}.double_conv.{n + 1}", f"{ours}/{name}")
    return rows


def _square() -> Layout:
    """A table of a window's tokens `[w * w, C]` as our `[w, w, C]`."""
    return Layout(lambda arrays, shape: arrays[0].reshape(shape), lambda x: [x.reshape(-1, x.shape[-1])])


def _uformer(model: Any) -> list[Row]:
    del model
    rows = affine("input_proj.proj.0", "input", layouts.CONV)
    rows += affine("output_proj.proj.0", "output", layouts.CONV)
    rows += affine("dowsample_{i}.conv.0", "downsample_{i}", layouts.CONV)  # spelt so
    rows += affine("upsample_{i}.deconv.0", "upsample_{i}", layouts.UPSAMPLE)
    stages = (("encoderlayer_{s}", "encoder_{s}"), ("conv", "bottleneck"), ("decoderlayer_{s}", "decoder_{s}"))
    for there, here in stages:
        theirs, ours = f"{there}.blocks.{{i}}", f"{here}/block_{{i}}"
        qkv, attention = f"{theirs}.attn.qkv", f"{ours}/attention"
        rows += norm(f"{theirs}.norm1", f"{ours}/norm1")
        rows += norm(f"{theirs}.norm2", f"{ours}/norm2")
        rows += [
            Row(f"{theirs}.modulator.weight", f"{ours}/modulator", _square()),
            Row(f"{theirs}.attn.relative_position_bias_table", f"{attention}/position_bias"),
            Row((f"{qkv}.to_q.weight", f"{qkv}.to_kv.weight"), f"{attention}/qkv/kernel", layouts.Q_KV_APART),
            Row((f"{qkv}.to_q.bias", f"{qkv}.to_kv.bias"), f"{attention}/qkv/bias", layouts.Q_KV_BIAS_APART),
        ]
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):  # convolutional projections
            rows += affine(f"{qkv}.to_{letter}.depthwise", f"{attention}/{name}/depthwise", layouts.CONV)
            pointwise = Layout(
                lambda arrays, shape: arrays[0][:, :, 0, 0].T.reshape(shape),
                lambda x: [x.reshape(len(x), -1).T[:, :, None, None]],
            )
            rows += affine(f"{qkv}.to_{letter}.pointwise", f"{attention}/{name}/pointwise", pointwise, layouts.FLAT)
        rows += affine(f"{theirs}.attn.proj", f"{attention}/out", layouts.OUT)
        rows += affine(f"{theirs}.mlp.linear1.0", f"{ours}/feed_forward/fc1")
        rows += affine(f"{theirs}.mlp.dwconv.0", f"{ours}/feed_forward/depthwise", layouts.CONV)
        rows += affine(f"{theirs}.mlp.linear2.0", f"{ours}/feed_forward/fc2")
    return rows


def _uformer_ffn(model: Any) -> list[Row]:
    """With plain feed-forward layers instead of LeFF their linear layers have other names."""
    rows = _uformer(model)
    if model.feed_forward != "ffn":
        return rows
    plain = {"mlp.linear1.0": "mlp.fc1", "mlp.linear2.0": "mlp.fc2"}
    out = []
    for row in rows:
        theirs = row.theirs
        for old, new in plain.items():
            theirs = theirs.replace(old, new) if isinstance(theirs, str) else theirs
        out.append(Row(theirs, row.ours, row.layout))
    return out


def _per_channel(*ones: int) -> Layout:
    """A vector that they hold with further axes of one, such as [1, C, 1, 1]."""
    return Layout(lambda arrays, shape: arrays[0].reshape(shape), lambda x: [x.reshape([-1 if n else 1 for n in ones])])


def _axis_table(axis: int) -> Layout:
    """Positions [1, C, H, 1] or [1, C, 1, W] as our [1, length, C]."""
    return Layout(
        lambda arrays, shape: arrays[0].squeeze(5 - axis).transpose(0, 2, 1).reshape(shape),
        lambda x: [x.transpose(0, 2, 1)[..., None] if axis == 2 else x.transpose(0, 2, 1)[:, :, None]],
    )


def _axial(model: Any) -> list[Row]:
    head = layouts.CONV
    rows = affine("input_project", "embedding", layouts.CONV_1X1) + affine("output_project", "head", head)
    rows += [Row(f"pos_emb.param_{i}", f"position_{n}", _axis_table(i + 2)) for i, n in enumerate(("height", "width"))]
    for d in range(model.num_layers):
        for n, branches in ((2 * d, ("height", "width")), (2 * d + 1, ("mlp1", "mlp2"))):
            for letter, branch in zip(("f.net", "g.net") if model.reversible else ("0", "1"), branches, strict=True):
                theirs, ours = f"layers.blocks.{n}.{letter}", f"layers/block_{d}/{branch}"
                if branch.startswith("mlp"):
                    rows += [Row(f"{theirs}.0.g", f"{ours}/norm/scale", _per_channel(0, 1, 0, 0))]
                    rows += [Row(f"{theirs}.0.b", f"{ours}/norm/bias", _per_channel(0, 1, 0, 0))]
                    rows += affine(f"{theirs}.1", f"{ours}/conv1", layouts.CONV)
                    rows += affine(f"{theirs}.3", f"{ours}/conv2", layouts.CONV)
                    continue
                rows += norm(f"{theirs}.fn.norm", f"{ours}/norm")
                qkv = (f"{theirs}.fn.fn.to_q.weight", f"{theirs}.fn.fn.to_kv.weight")
                rows += [Row(qkv, f"{ours}/qkv/kernel", layouts.Q_KV_APART)]
                rows += affine(f"{theirs}.fn.fn.to_out", f"{ours}/out", layouts.OUT)
    return rows


UNET = Source(_unet, (UNet,), unused=(BATCH_COUNTER, r"^mask_values"), prepare=unwrap, normalisation=UNIT)
UFORMER = Source(_uformer_ffn, (Uformer,), unused=(r"relative_position_index$",), prepare=unwrap, normalisation=UNIT)
AXIAL = Source(_axial, (Axial,), prepare=unwrap, normalisation=UNIT)
