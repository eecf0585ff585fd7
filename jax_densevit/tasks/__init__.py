"""What is learned: loss, decoding, metrics and picture sheet, one file per task."""

from jax_densevit.tasks import (
    colorization,
    coltran_colorizer,
    coltran_upsamplers,
    instances,
    palette,
    segmentation,
    spiral,
)
from jax_densevit.tasks.registry import create_task

__all__ = [
    "colorization",
    "coltran_colorizer",
    "coltran_upsamplers",
    "create_task",
    "instances",
    "palette",
    "segmentation",
    "spiral",
]
