"""The published systems, one file each. Importing this package registers all of them and needs no TensorFlow."""

from jax_densevit.models import axial, coltran, dpt, seq2seg, setr, spiral, uformer, unet, vit, vitseg
from jax_densevit.models.output import ClassOutput, DenseOutput
from jax_densevit.models.registry import create_model, registered_models

__all__ = [
    "ClassOutput",
    "DenseOutput",
    "create_model",
    "axial",
    "coltran",
    "dpt",
    "registered_models",
    "seq2seg",
    "setr",
    "spiral",
    "uformer",
    "unet",
    "vit",
    "vitseg",
]
