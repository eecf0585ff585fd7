"""Colorization by regression: colors for a gray picture, from a dense model's outputs, in one pass.

The picture is its own label: a formula makes it gray, rounded to whole 8-bit levels as in a file, so that no trace of
the colors is left in the input. The gray goes to the model in three equal channels, normalised as the data says. A
model predicts either

* the picture ("rgb"), in the units of its input, so that a model which adds its input to its output (Uformer) starts
  from the gray picture whatever the normalisation; or
* its CIELAB chroma ("lab_ab"), in units of 100; lightness then always is that of the input.

Regression answers doubt with the mean of what might be, which is pale and brownish: L1, PSNR and SSIM hardly see it,
colorfulness does. Every evaluation says beside its numbers what the gray picture itself would score.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jax_densevit.data.augment import normalise
from jax_densevit.data.source import DataInfo
from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.color import GRAYS, color_gray, rgb_to_lab, to_gray
from jax_densevit.layers.resize import resize_bilinear
from jax_densevit.metrics.image import PictureMetrics
from jax_densevit.metrics.metric import Metric
from jax_densevit.models.output import DenseOutput
from jax_densevit.tasks import color_pictures
from jax_densevit.tasks.answers import Answers, number, size_or_none
from jax_densevit.tasks.losses import heads
from jax_densevit.tasks.registry import register_task
from jax_densevit.tasks.regression import LOSSES, regression_loss
from jax_densevit.tasks.rooms import Samples, samples
from jax_densevit.tasks.rows import map_over_pixels
from jax_densevit.tasks.task import Batch, LossTerm

TARGETS = {"rgb": 3, "lab_ab": 2}
AB_UNIT = 100.0  # of a* and b* in outputs and losses
STEP = 32  # sides of pictures that are resized before decoding: few sizes are compiled, and most models pad nothing
SMALLEST = 32  # side of what a model is fed: U-Net halves four times, others five


@register_task("colorization")
@dataclasses.dataclass(frozen=True)
class ColorizationTask(Answers):
    """Colors by regression, for any dense model with three ("rgb") or two ("lab_ab") outputs.

    Attributes:
      info: facts about the data; only its normalisation matters.
      target: what the model predicts, "rgb" or "lab_ab".
      gray: how the input is made gray, a name of `layers.color.GRAYS`; pictures that are gray already stay as they are.
      loss_function: "charbonnier", "l1" or "l2", mean over pixels and channels; RGB in [0, 1], chroma in units of 100.
      epsilon: of the Charbonnier loss and metric.
      auxiliary_weight: factor on the loss of every auxiliary head, or one factor per head.
      keep_luminance: of an "rgb" prediction only the chroma is used; CIELAB lightness is that of the input.
      max_side: pictures whose longer side is above this are decoded at this size (to the nearest `STEP`) and get the
        chroma that is found there, with their own lightness at full resolution. 0: every picture at its own size.
      fixed_size: (height, width) at which every picture is decoded, for models that take images of one size only;
        chroma and lightness as above. (0, 0) = off.
      loss_rows: output rows per block of the fused resize and loss; 0 = by memory.
    """

    percent: ClassVar[bool] = False

    info: DataInfo
    target: str = "rgb"
    gray: str = "bt601"
    loss_function: str = "charbonnier"
    epsilon: float = 1e-3
    auxiliary_weight: float | tuple[float, ...] = 0.4
    keep_luminance: bool = False
    max_side: int = 0
    fixed_size: tuple[int, int] = (0, 0)
    loss_rows: int = 0

    def __post_init__(self):
        check_name("target of colorization", self.target, TARGETS)
        check_name("gray formula", self.gray, GRAYS)
        check_name("loss of colorization", self.loss_function, LOSSES)
        size_or_none(self, "fixed_size")
        if isinstance(self.auxiliary_weight, list):
            object.__setattr__(self, "auxiliary_weight", tuple(self.auxiliary_weight))
        if self.epsilon <= 0:
            raise UserError(f"task.epsilon is {self.epsilon}; it must be above 0, or the loss has no gradient at 0.")
        if self.max_side < 0 or 0 < self.max_side < SMALLEST:
            raise UserError(f"task.max_side is {self.max_side}; it must be at least {SMALLEST}, or 0 for any size.")

    @property
    def num_outputs(self) -> int:
        """Channels that the model's outputs must have."""
        return TARGETS[self.target]

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        """The normalised gray pictures, float32 `[B, H, W, 3]`."""
        return (self._normalised(self.make_gray(batch["image"])),)

    def make_gray(self, image: jax.Array) -> jax.Array:
        """uint8 `[B, H, W, 3]` to uint8 `[B, H, W]`."""
        return jnp.round(255 * to_gray(image.astype(jnp.float32) / 255, self.gray)).astype(jnp.uint8)

    def loss(self, output: DenseOutput, batch: Batch) -> dict[str, LossTerm]:
        """One term per head: "colorization", then "auxiliary_1", ... with their coefficients. Padding adds nothing."""
        image = batch["image"]
        inside = jnp.ones(image.shape[:3], bool)
        if "size" in batch:  # int32 [B, 2]: the part of a training crop that is no padding
            height, width = batch["size"][:, 0, None, None], batch["size"][:, 1, None, None]
            inside = (jnp.arange(image.shape[1])[:, None] < height) & (jnp.arange(image.shape[2]) < width)
        return {
            name: regression_loss(
                self._checked(outputs),
                image,
                inside,
                output.covers,
                self._difference,
                loss=self.loss_function,
                epsilon=self.epsilon,
                coefficient=coefficient,
                rows=self.loss_rows,
            )
            for name, (outputs, coefficient) in heads(output, "colorization", self.auxiliary_weight).items()
        }

    def decode(self, forward: Callable[..., DenseOutput], batch: Batch, *, full: bool = False) -> Batch:
        """Colored pictures at the size of the given ones.

        Args:
          forward: jitted model, images `[N, h, w, 3]` to `DenseOutput`.
          batch: "image" uint8 `[B, H, W, 3]`, in color or gray; "size" (height, width), Python integers, where the
            pictures fill only the top left corner of it (`rooms.give_room`).
          full: changes nothing.

        Returns:
          "image" uint8 `[B, H, W, 3]` and "gray", the input, uint8 `[B, H, W]`; what lies beyond "size" has no meaning.
        """
        room = tuple(batch["image"].shape[1:3])
        size = tuple(batch.get("size", room))
        fed = self.decoding_size(*size)
        shrink = None if fed == size else tuple(averages(size[i], fed[i], room[i]) for i in (0, 1))
        gray, images = _prepare(self, batch["image"], fed, shrink)
        output = forward(images)
        outputs, covers = self._checked(output.logits), output.covers
        if fed != size:  # first to what the model was fed, then to the picture
            outputs, covers = _enlarge(outputs, covers, fed), size
        place = tuple(samples(outputs.shape[1 + i], covers[i], room=room[i], cut=size[i]) for i in (0, 1))
        return {"image": _paint(self, outputs, gray, *place, self.keeps_luminance(fed == size)), "gray": gray}

    def decoding_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which a picture is fed."""
        if all(self.fixed_size):
            return self.fixed_size
        longest = max(height, width)
        if self.max_side and longest > self.max_side:
            height, width = (round(side * self.max_side / longest / STEP) * STEP for side in (height, width))
        return max(height, SMALLEST), max(width, SMALLEST)

    def keeps_luminance(self, own_size: bool = True) -> bool:
        """Whether lightness is the input's; always where a picture is not decoded at its own size."""
        return self.keep_luminance or self.target == "lab_ab" or not own_size

    def metrics(self) -> dict[str, Metric]:
        """Everything in `metrics.image`, for the prediction and for the gray input in its place."""
        return {"colorization": PictureMetrics(epsilon=self.epsilon), "all_gray": PictureMetrics(epsilon=self.epsilon)}

    def measure(self, predictions: Batch, batch: Batch) -> dict[str, Any]:
        """Counts of one batch by metric; examples whose mask is False count nothing."""
        gray = jnp.broadcast_to(predictions["gray"][..., None], batch["image"].shape)
        pictures = {"colorization": predictions["image"], "all_gray": gray}
        return {
            name: metric.measure(batch["image"], pictures[name], batch.get("mask"), batch.get("size"))
            for name, metric in self.metrics().items()
        }

    def summary(self, results: dict[str, dict[str, Any]]) -> dict[str, float]:
        """PSNR in dB, which decides, and the others; NaN where nothing was measured."""
        return _numbers(results["colorization"])

    def baselines(self, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
        """The numbers of :meth:`summary` for the gray input as it is."""
        return {"all gray": _numbers(results["all_gray"])}

    def protocol(self) -> dict[str, Any]:
        """How predictions are made and measured, JSON-ready: whatever changes a score."""
        names = ("target", "gray", "keep_luminance", "max_side", "fixed_size", "epsilon")
        return {
            "task": "colorization",
            **{name: getattr(self, name) for name in names},
            "luminance": "CIELAB lightness of the gray input" if self.keeps_luminance() else "predicted",
            "measured_on": "8-bit RGB, clipped, at the picture's own size",
        }

    def sheet(self, examples: list[dict[str, np.ndarray]]) -> Image.Image:
        """One row per example: gray, colored, true."""
        columns = dict(gray="predicted_gray", model="predicted_image", truth="image")
        return color_pictures.sheet(color_pictures.rows(examples, **columns))

    def files(self, image: np.ndarray, prediction: dict[str, np.ndarray], facts: dict[str, Any]) -> tuple[Any, ...]:
        """The colored picture, at its own size, and what the JSON says about it."""
        fed = self.decoding_size(*image.shape[:2])
        kept = self.keeps_luminance(fed == image.shape[:2])
        more = {"decoded_at": list(fed), "luminance": "CIELAB lightness of the gray input" if kept else "predicted"}
        return color_pictures.files(image, prediction["image"], {**facts, **more}, f" ({self.gray})")

    def _normalised(self, gray: jax.Array) -> jax.Array:
        return normalise(jnp.broadcast_to(gray[..., None], (*gray.shape, 3)), self.info.mean, self.info.std)

    def _rgb(self, outputs: jax.Array) -> jax.Array:
        """Outputs of an "rgb" model in [0, 1], or somewhat beyond."""
        return outputs * np.asarray(self.info.std, np.float32) + np.asarray(self.info.mean, np.float32)

    def _difference(self, outputs: jax.Array, pixels: jax.Array) -> jax.Array:
        pixels = pixels.astype(jnp.float32) / 255
        if self.target == "rgb":
            return self._rgb(outputs) - pixels
        return outputs - rgb_to_lab(pixels)[..., 1:] / AB_UNIT

    def _checked(self, outputs: jax.Array) -> jax.Array:
        if outputs.shape[-1] != self.num_outputs:
            raise UserError(
                f"The model has {outputs.shape[-1]} outputs, but task.target={self.target!r} needs {self.num_outputs}; "
                "leave model.num_classes out of the config, it is filled in from the task."
            )
        return outputs


def averages(given: int, length: int, room: int) -> np.ndarray:
    """float32 `[length, room]`: a side of `given` pixels resized to `length` by antialiased bilinear interpolation.

    Shrinking averages over a triangle as wide as two new pixels (Pillow's BILINEAR); enlarging interpolates. The side
    fills the first `given` entries of its array.
    """
    scale = given / length
    center = (np.arange(length)[:, None] + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(given) + 0.5 - center) / max(scale, 1))
    return np.pad(weights / weights.sum(1, keepdims=True), ((0, 0), (0, room - given))).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("task", "fed"))
def _prepare(
    task: ColorizationTask, image: jax.Array, fed: tuple[int, int], shrink: Any
) -> tuple[jax.Array, jax.Array]:
    """The gray pictures in their arrays, and the model's input of size `fed`."""
    gray = task.make_gray(image)
    if shrink is None:
        return gray, task._normalised(gray[:, : fed[0], : fed[1]])
    high = jax.lax.Precision.HIGHEST
    small = jnp.einsum("ih,bhw->biw", shrink[0], gray.astype(jnp.float32), precision=high)
    return gray, task._normalised(jnp.einsum("jw,biw->bij", shrink[1], small, precision=high))


@functools.partial(jax.jit, static_argnames=("covers", "size"))
def _enlarge(outputs: jax.Array, covers: tuple[int, int], size: tuple[int, int]) -> jax.Array:
    return resize_bilinear(outputs.astype(jnp.float32), covers)[:, : size[0], : size[1]]


@functools.partial(jax.jit, static_argnames=("task", "keep"))
def _paint(
    task: ColorizationTask, outputs: jax.Array, gray: jax.Array, down: Samples, across: Samples, keep: bool
) -> jax.Array:
    """The pictures uint8 `[B, H, W, 3]`, by blocks of rows: a photo of 20 million pixels fits too."""

    def pixels(block, gray):
        if task.target == "lab_ab":
            rgb = color_gray(gray.astype(jnp.float32) / 255, block * AB_UNIT)
        else:
            rgb = jnp.clip(task._rgb(block), 0, 1)
            if keep:
                rgb = color_gray(gray.astype(jnp.float32) / 255, rgb_to_lab(rgb)[..., 1:])
        return jnp.round(255 * rgb).astype(jnp.uint8)

    return map_over_pixels(pixels, outputs.astype(jnp.float32), down, across, gray)


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    names = ("PSNR", "L1", "charbonnier", "SSIM", "CIEDE2000", "colorfulness", "delta_colorfulness")
    return {name: number(found[name]) for name in names}
