"""The published systems, one file each. Importing this package registers all of them and needs no TensorFlow."""

from jax_densevit.models import axial, coltran, dpt, setr, spiral, uformer, unet, vit, vitseg
from jax_densevit.models.output import ClassOutput, DenseOutput
from jax_densevit.models.registry import create_model, registered_models

__all__ = [
    "ClassOutput",
    "DenseOutput",
    "coltran",
    "create_model",
    "dpt",
    "axial",
    "registered_models",
    "setr",
    "spiral",
    "uformer",
    "unet",
    "vit",
    "vitseg",
]
