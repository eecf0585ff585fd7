"""Segmentation by a model that writes labels one patch after the other: the true earlier ones are given in training."""

import dataclasses
from typing import ClassVar

import jax

from jax_densevit.tasks.registry import register_task
from jax_densevit.tasks.segmentation import SegmentationTask
from jax_densevit.tasks.task import Batch


@register_task("spiral")
@dataclasses.dataclass(frozen=True)
class SpiralTask(SegmentationTask):
    """Semantic segmentation with teacher forcing, for the model "spiral"; attributes as in `SegmentationTask`.

    The loss is that of segmentation, which for softmax cross-entropy is the negative log-likelihood of the label map.
    Decoding gives the model images alone, so it continues from its own labels: training accuracy says nothing about it.
    """

    kind: ClassVar[str] = "spiral"

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        """The normalised images, float32 `[B, H, W, 3]`, and in training the labels `[B, H, W]`."""
        images = super().inputs(batch)
        return (*images, batch["labels"]) if "labels" in batch else images
