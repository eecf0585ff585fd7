"""The published systems, one file each. Importing this package registers all of them and needs no TensorFlow."""

from jax_densevit.models import (
    axial,
    coltran,
    dpt,
    efficientnet_lite,
    hungarian_unet,
    inception,
    instance_seq2seg,
    queries,
    seq2seg,
    setr,
    spiral,
    uformer,
    unet,
    unet_lite,
    vit,
    vitseg,
)
from jax_densevit.models.output import ClassOutput, DenseOutput, QueryOutput
from jax_densevit.models.registry import create_model, registered_models

__all__ = [
    "ClassOutput",
    "DenseOutput",
    "QueryOutput",
    "create_model",
    "axial",
    "coltran",
    "dpt",
    "efficientnet_lite",
    "hungarian_unet",
    "inception",
    "instance_seq2seg",
    "queries",
    "registered_models",
    "seq2seg",
    "setr",
    "spiral",
    "uformer",
    "unet",
    "unet_lite",
    "vit",
    "vitseg",
]
