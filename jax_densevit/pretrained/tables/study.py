"""The comparison study's files (TheMoon2000/cs280-final-project): `model.pt` of its four models.

They are bare state dicts in the names of the repositories that the models come from. The study's DPT owns an auxiliary
head that is never called. All four saw RGB in [0, 1].
"""

from collections.abc import Sequence
from typing import Any

from jax_densevit.errors import UserError
from jax_densevit.pretrained.tables.convolutional import AXIAL, UFORMER, UNET
from jax_densevit.pretrained.tables.dpt import DPT
from jax_densevit.pretrained.tables.table import UNIT, Row, Source, Tensors, unwrap

_BY_MODEL = {source.models[0]: source for source in (UNET, DPT, AXIAL, UFORMER)}


def _rows(model: Any) -> Sequence[Row]:
    return _BY_MODEL[type(model)].rows(model)


def _prepare(tensors: Tensors, model: Any) -> Tensors:
    tensors = unwrap(tensors, model)
    if "input_conv.weight" in tensors:
        raise UserError(
            "This is the study's home-made UformerSimple, which is in none of its tables and has no model here; the "
            "Uformer of its tables is the one that it calls uformer_og."
        )
    return tensors


STUDY = Source(
    _rows,
    tuple(_BY_MODEL),
    "setr",
    tuple(pattern for source in _BY_MODEL.values() for pattern in source.unused) + (r"^auxlayer\.",),
    _prepare,
    normalisation=UNIT,
)
