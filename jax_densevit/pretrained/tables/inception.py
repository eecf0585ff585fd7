"""The FID network: `pt_inception-2015-12-05-6726825d.pth`, in torchvision's names (flat, as pytorch-fid loads it)."""

from typing import Any

from jax_densevit.models.inception import Inception, unit_names
from jax_densevit.pretrained.tables.table import BATCH_COUNTER, HALF, Row, Source, affine, conv_norm, unwrap


def _inception(model: Any) -> list[Row]:
    del model
    rows = affine("fc", "classifier")
    for theirs, ours in unit_names().items():
        rows += conv_norm(f"{theirs}.conv", f"{theirs}.bn", ours)
    return rows


INCEPTION_FID = Source(_inception, (Inception,), unused=(BATCH_COUNTER,), prepare=unwrap, normalisation=HALF)
