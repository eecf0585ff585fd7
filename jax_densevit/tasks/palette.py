"""Semantic segmentation by regression: the model paints every pixel in the colour of its class.

The form in which ViTSeg was published: three output channels, pushed into [0, 1] by a hard sigmoid and compared with
the label's colour by the mean absolute error. A class is found again as the palette's colour that is nearest to the
painted one, at the resolution of the labels, so that scores are those of segmentation and comparable with it.

What such a score costs against classification is worth knowing: colours between two classes' colours may mean a third,
and close colours (Cityscapes' bus and train) are close classes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jax_densevit.errors import UserError
from jax_densevit.tasks import pictures
from jax_densevit.tasks.losses import pixel_weight
from jax_densevit.tasks.registry import register_task
from jax_densevit.tasks.rows import sum_over_pixels
from jax_densevit.tasks.segmentation import SegmentationTask, one_of
from jax_densevit.tasks.task import Batch, LossTerm

LOSSES: dict[str, Callable[[jax.Array], jax.Array]] = {"mae": jnp.abs, "mse": jnp.square}
# From the model's outputs to colours. Outputs that a hard one cuts off have no gradient.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "hard_sigmoid": lambda x: jnp.clip(0.2 * x + 0.5, 0, 1),  # Keras up to version 2
    "hard_sigmoid_6": lambda x: jnp.clip(x / 6 + 0.5, 0, 1),  # Keras 3, JAX, PyTorch
    "sigmoid": jax.nn.sigmoid,
    "linear": lambda x: x,
}


@register_task("palette")
@dataclasses.dataclass(frozen=True)
class PaletteTask(SegmentationTask):
    """Segmentation of the classes of `info` by painting their colours; for any dense model with three outputs.

    Attributes:
      loss_function: "mae" (the report's; mean over pixels and channels) or "mse", on colours in [0, 1].
      denominator: "valid", since pixels that are ignored have no colour; "all" counts them in the denominator.
      activation: of the model's outputs, a name of `ACTIVATIONS`; "hard_sigmoid" is the report's.
      Others: see `SegmentationTask`. Over scales and mirror images, colours are averaged.
    """

    kind: ClassVar[str] = "palette"
    suffixes: ClassVar[tuple[str, ...]] = (*SegmentationTask.suffixes, "_colors.png")
    losses: ClassVar[tuple[str, ...]] = tuple(LOSSES)

    loss_function: str = "mae"
    denominator: str = "valid"
    activation: str = "hard_sigmoid"

    def __post_init__(self):
        super().__post_init__()
        one_of("activation", self.activation, tuple(ACTIVATIONS))
        owner: dict[tuple[int, ...], str] = {}
        for name, color in zip(self.info.classes, map(tuple, pictures.colors(self.info).tolist()), strict=True):
            if color in owner:
                raise UserError(
                    f"The palette of {self.info.name!r} paints {owner[color]!r} and {name!r} in the same colour "
                    f"{color}, so they could not be told apart; give each class its own."
                )
            owner[color] = name

    @property
    def num_outputs(self) -> int:
        """Red, green and blue."""
        return 3

    @property
    def palette(self) -> np.ndarray:
        """float32 `[K, 3]` in [0, 1]: the colours of the data, or those that its pictures are drawn in."""
        return pictures.colors(self.info).astype(np.float32) / 255

    def head_loss(
        self, logits: jax.Array, labels: jax.Array, covers: tuple[int, int], coefficient: float = 1.0
    ) -> LossTerm:
        """The loss of one head: `[B, h, w, 3]` that stretch over `covers`, against the colours of labels `[B, H, W]`.

        As in segmentation, a label that is neither a class nor ignored makes it NaN.
        """
        ignore, palette = self.info.ignore, self.palette
        weights = np.asarray(self.class_weights or (1.0,) * len(palette), np.float32)
        labels = labels.astype(jnp.int32)

        def pixels(block, ids):
            known = (ids >= 0) & (ids < len(palette))
            of = jnp.where(known, ids, 0)
            error = LOSSES[self.loss_function](ACTIVATIONS[self.activation](block) - jnp.asarray(palette)[of]).mean(-1)
            error = jnp.where(known, jnp.asarray(weights)[of] * error, jnp.nan)
            return jnp.where(ids != ignore, error, 0).sum((1, 2))

        total = sum_over_pixels(
            pixels, logits.astype(jnp.float32), labels, covers, fill=ignore, rows=self.loss_rows
        ).sum()
        return LossTerm(total, pixel_weight(labels, self.denominator, ignore, weights), coefficient)

    def averaged(self, logits: jax.Array) -> jax.Array:
        """The colours `[..., 3]`."""
        return ACTIVATIONS[self.activation](logits)

    def choose(self, logits: jax.Array, full: bool = False) -> Batch:
        """The class of the nearest colour and the colour itself, "colors" uint8 `[..., 3]`."""
        return self.choose_from_mean(self.averaged(logits), full)

    def choose_from_mean(self, mean: jax.Array, full: bool = False, probabilities: bool = False) -> Batch:
        """As :meth:`choose`, from colours `[..., 3]`. There is no confidence."""
        if probabilities:
            raise UserError("The task 'palette' predicts colours and has no probabilities; use 'segmentation'.")
        # Differences, not a matrix product: accelerators would round its factors to fewer bits than colours have.
        distance = sum(jnp.square(mean[..., i, None] - self.palette[:, i]) for i in range(3))
        return {
            "labels": jnp.argmin(distance, -1).astype(jnp.int32),
            "colors": jnp.round(jnp.clip(mean, 0, 1) * 255).astype(jnp.uint8),
        }

    def protocol(self) -> dict[str, Any]:
        """How predictions are made, JSON-ready."""
        return {**super().protocol(), "activation": self.activation}

    def files(self, image: np.ndarray, prediction: dict[str, np.ndarray], facts: dict[str, Any]) -> tuple[Any, ...]:
        """As in segmentation, and "colors" as a picture."""
        return *super().files(image, prediction, facts), Image.fromarray(np.asarray(prediction["colors"]))
