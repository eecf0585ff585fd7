"""Semantic segmentation: a class per pixel.

Training compares logits with labels at the labels' resolution, all heads one after the other and by blocks of rows.
Decoding is by whole pictures or sliding windows, at several scales, with or without the mirror image; labels are never
resized, logits are.
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
from jax_densevit.errors import UserError, did_you_mean
from jax_densevit.metrics.boundary import BoundaryIoU
from jax_densevit.metrics.confusion import ConfusionMatrix
from jax_densevit.metrics.metric import Metric
from jax_densevit.models.output import DenseOutput
from jax_densevit.tasks import pictures
from jax_densevit.tasks.answers import Answers, number, size_or_none
from jax_densevit.tasks.losses import DENOMINATORS, LOSSES, heads, segmentation_loss
from jax_densevit.tasks.registry import register_task
from jax_densevit.tasks.rooms import Samples, room_for, sample_axis
from jax_densevit.tasks.rows import automatic_rows, map_over_pixels
from jax_densevit.tasks.sliding import slide
from jax_densevit.tasks.task import Batch, LossTerm
from jax_densevit.tasks.views import enlarge, place, prepare, views

MODES = ("whole", "slide")


@register_task("segmentation")
@dataclasses.dataclass(frozen=True)
class SegmentationTask(Answers):
    """Semantic segmentation of the classes of `info`.

    Attributes:
      info: facts about the data.
      loss_function: "cross_entropy" or "bce" (a sigmoid per class).
      denominator: what the mean loss divides by: "all" pixels (SETR, mmsegmentation) or the "valid" ones (PyTorch).
      auxiliary_weight: factor on the loss of every auxiliary head, or one factor per head.
      class_weights: one factor per class, or empty.
      mode: "whole" feeds the picture as it is, "slide" feeds windows.
      crop: (height, width) of the windows, or one number.
      stride: distance of the windows, (vertical, horizontal) or one number; 0 = two thirds of the crop, as SETR on
        ADE20K.
      windows_at_once: windows per call of the model, over the whole batch.
      base_size: (long, short) box into which a picture is resized before decoding, aspect kept (SETR: (2049, 1025) on
        Cityscapes, (2048, 512) on ADE20K); (0, 0) leaves it at its own size.
      short_side_at_least: if above 0, the short side becomes max(short of the box, this) and the long side follows, at
        every scale (SETR's multi-scale testing, with the crop's side here).
      fixed_size: (height, width) to which every picture is resized before decoding, aspect not kept: for models that
        take images of one size only, such as ViTSeg. (0, 0) = off.
      scales: factors on the base size; class probabilities are averaged over scales and mirror images.
      flip: decode the mirror image as well.
      rotate90: decode the picture turned by 90, 180 and 270 degrees as well (and their mirror images, if `flip`), for
        pictures without an up: microscopes, satellites. Windows keep their (height, width).
      loss_rows: output rows per block of the fused resize and loss; 0 = by memory.
    """

    percent: ClassVar[bool] = True
    kind: ClassVar[str] = "segmentation"
    suffixes: ClassVar[tuple[str, ...]] = (".png", "_overlay.png", ".json")
    losses: ClassVar[tuple[str, ...]] = LOSSES

    info: DataInfo
    loss_function: str = "cross_entropy"
    denominator: str = "all"
    auxiliary_weight: float | tuple[float, ...] = 0.4
    class_weights: tuple[float, ...] = ()
    mode: str = "whole"
    crop: int | tuple[int, int] = 0
    stride: int | tuple[int, int] = 0
    windows_at_once: int = 8
    base_size: tuple[int, int] = (0, 0)
    short_side_at_least: int = 0
    fixed_size: tuple[int, int] = (0, 0)
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    rotate90: bool = False
    loss_rows: int = 0

    def __post_init__(self):
        one_of("loss_function", self.loss_function, self.losses)
        one_of("denominator", self.denominator, DENOMINATORS)
        one_of("mode", self.mode, MODES)
        set_ = functools.partial(object.__setattr__, self)
        size_or_none(self, "base_size", "(long, short)")
        size_or_none(self, "fixed_size")
        for name in ("class_weights", "scales"):
            value = getattr(self, name)
            set_(name, tuple(value) if isinstance(value, list | tuple) else (value,))
        if isinstance(self.auxiliary_weight, list):
            set_("auxiliary_weight", tuple(self.auxiliary_weight))
        set_("crop", _pair("crop", self.crop))
        set_("stride", _pair("stride", self.stride))
        if len(self.info.classes) < 2:
            raise UserError(
                f"Segmentation needs at least two classes (one may be the background); {self.info.name!r} has "
                f"{len(self.info.classes)}: name them in the data source."
            )
        if self.class_weights and len(self.class_weights) != len(self.info.classes):
            raise UserError(
                f"task.class_weights has {len(self.class_weights)} numbers for {len(self.info.classes)} classes; "
                "give one per class."
            )
        if self.mode == "slide" and not all(self.crop):
            raise UserError("Decoding with mode='slide' needs the size of the windows: set crop, e.g. crop=512.")
        if not all(self.stride):
            set_(
                "stride",
                tuple(stride or max(1, side * 2 // 3) for stride, side in zip(self.stride, self.crop, strict=True)),
            )
        if self.mode == "slide" and any(s > c for s, c in zip(self.stride, self.crop, strict=True)):
            raise UserError(
                f"stride {self.stride} leaves gaps between windows of {self.crop}; it must not exceed the crop."
            )
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"task.scales {self.scales} must be positive factors, e.g. (0.75, 1.0, 1.25).")
        if all(self.fixed_size) and (all(self.base_size) or self.short_side_at_least or self.scales != (1.0,)):
            raise UserError(
                f"task.fixed_size={self.fixed_size} resizes every picture to that size; leave base_size, "
                "short_side_at_least and scales out."
            )
        if self.windows_at_once < 1:
            raise UserError(f"task.windows_at_once is {self.windows_at_once}; it must be at least 1.")

    @property
    def num_outputs(self) -> int:
        """Channels that the model's logits must have."""
        return len(self.info.classes)

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        """The normalised images, float32 `[B, H, W, 3]`."""
        return (normalise(batch["image"], self.info.mean, self.info.std),)

    def loss(self, output: DenseOutput, batch: Batch) -> dict[str, LossTerm]:
        """One term per head: the task's name, then "auxiliary_1", ... with their coefficients."""
        return {
            name: self.head_loss(self._checked(logits), batch["labels"], output.covers, coefficient)
            for name, (logits, coefficient) in heads(output, self.kind, self.auxiliary_weight).items()
        }

    def head_loss(
        self, logits: jax.Array, labels: jax.Array, covers: tuple[int, int], coefficient: float = 1.0
    ) -> LossTerm:
        """The loss of one head: `[B, h, w, K]` that stretch over `covers`, against labels `[B, H, W]`."""
        return segmentation_loss(
            logits,
            labels,
            covers,
            loss=self.loss_function,
            denominator=self.denominator,
            ignore=self.info.ignore,
            class_weights=self.class_weights,
            coefficient=coefficient,
            rows=self.loss_rows,
        )

    def decode(
        self,
        forward: Callable[..., DenseOutput],
        batch: Batch,
        *,
        full: bool = False,
        probabilities: bool = False,
    ) -> Batch:
        """Label maps at the size of the pictures.

        Args:
          forward: jitted model, images `[N, h, w, 3]` to `DenseOutput`.
          batch: "image" uint8 `[B, H, W, 3]`; "size" (height, width), Python integers, where the pictures fill only the
            top left corner of it (`rooms.give_room`).
          full: also return "confidence", float32 `[B, H, W]`: the probability of the chosen class.
          probabilities: also return "probabilities", float32 `[B, H, W, K]`.

        Returns:
          `{"labels": int32 [B, H, W], ...}`; what lies beyond "size" has no meaning.
        """
        image = batch["image"]
        room = tuple(image.shape[1:3])
        size = tuple(batch.get("size", room))
        fed_sizes = [self.decoding_size(*size, scale) for scale in self.scales]
        passes = [(fed, view) for fed in fed_sizes for view in views(self.flip, self.rotate90)]
        upright, total = (image, size, room), None
        for fed, (transposed, *flip) in passes:
            image, size, room = upright
            if transposed:
                image, size, room, fed = image.swapaxes(1, 2), size[::-1], room[::-1], fed[::-1]
            if self.mode == "slide":
                images = prepare(self, image, size, fed, self._room_to_slide(fed, batch), flip)
                at_once = max(1, self.windows_at_once // len(images))
                logits = slide(forward, images, fed, self.crop, self.stride, at_once)
                at = place(fed, size, room, flip)
            else:
                output = forward(prepare(self, image, size, fed, fed, flip))
                logits, covers = output.logits, output.covers
                if fed == size and (covers == fed or not any(flip)):
                    at = place(logits.shape[1:3], covers, room, flip, cut=size)
                else:  # first to what the model was fed, then to the picture
                    logits = enlarge(logits, covers, fed)
                    at = place(fed, size, room, flip)
            self._checked(logits)
            if len(passes) == 1 and not probabilities:
                return _choose(self, logits, *at, full)
            total = _add(self, total, logits, *at, transposed)
        return _choose_from_mean(self, total, len(passes), full, probabilities)

    def choose(self, logits: jax.Array, full: bool = False) -> Batch:
        """The answer of every pixel from the model's outputs `[..., K]` there. Runs inside `jit`."""
        answer = {"labels": jnp.argmax(logits, -1).astype(jnp.int32)}
        if full:
            answer["confidence"] = self.averaged(logits).max(-1)
        return answer

    def averaged(self, logits: jax.Array) -> jax.Array:
        """What is averaged over scales and mirror images: class probabilities. Runs inside `jit`."""
        return jax.nn.sigmoid(logits) if self.loss_function == "bce" else jax.nn.softmax(logits, -1)

    def choose_from_mean(self, mean: jax.Array, full: bool = False, probabilities: bool = False) -> Batch:
        """The answer of every pixel from the mean `[..., K]` of what :meth:`averaged` gave. Runs inside `jit`."""
        answer = {"labels": jnp.argmax(mean, -1).astype(jnp.int32)}
        if full:
            answer["confidence"] = mean.max(-1)
        if probabilities:
            answer["probabilities"] = mean
        return answer

    def _room_to_slide(self, fed: tuple[int, int], batch: Batch) -> tuple[int, int]:
        room = room_for(fed) if "size" in batch else fed
        return max(room[0], self.crop[0]), max(room[1], self.crop[1])

    def decoding_size(self, height: int, width: int, scale: float = 1.0) -> tuple[int, int]:
        """(height, width) at which a picture is fed at `scale`."""
        if all(self.fixed_size):
            return self.fixed_size
        if all(self.base_size):
            box = [int(side * scale) for side in self.base_size]
            factor = min(max(box) / max(height, width), min(box) / min(height, width))
            if self.short_side_at_least:
                factor = max(min(box), self.short_side_at_least) / min(height, width)
        else:
            factor = max(scale, self.short_side_at_least / min(height, width))
        return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))

    def metrics(self) -> dict[str, Metric]:
        """The confusion matrix with its scores, and boundary IoU."""
        return {
            "segmentation": ConfusionMatrix(self.info.classes, self.info.ignore),
            "boundary": BoundaryIoU(self.info.classes, self.info.ignore),
        }

    def measure(self, predictions: Batch, batch: Batch) -> dict[str, Any]:
        """Counts of one batch by metric; examples whose mask is False count nothing."""
        return {
            name: metric.measure(batch["labels"], predictions["labels"], batch.get("mask"), batch.get("size"))
            for name, metric in self.metrics().items()
        }

    def summary(self, results: dict[str, dict[str, Any]]) -> dict[str, float]:
        """Scores in [0, 1], NaN where nothing was labelled; models are compared by the first."""
        scores = results["segmentation"]
        numbers = {
            "mIoU": scores["mIoU"],
            "pixel_accuracy": scores["pixel_accuracy"],
            "mean_accuracy": scores["mean_accuracy"],
            "fwIoU": scores["fwIoU"],
            "mean_dice": scores["mean_dice"],
            "boundary_IoU": results["boundary"]["mean_boundary_IoU"],
        }
        return {name: number(value) for name, value in numbers.items()}

    def protocol(self) -> dict[str, Any]:
        """How predictions are made, JSON-ready: whatever changes a score."""
        names = (
            "mode",
            "crop",
            "stride",
            "base_size",
            "short_side_at_least",
            "fixed_size",
            "scales",
            "flip",
            "rotate90",
        )
        return {"task": self.kind, "ignore": self.info.ignore, **{name: getattr(self, name) for name in names}}

    def charts(self, results: dict[str, dict[str, Any]]) -> dict[str, Image.Image]:
        """The confusion matrix as a picture."""
        scores = results["segmentation"]
        return {"confusion": pictures.confusion_picture(scores["confusion"], self.info.classes)}

    def sheet(self, examples: list[dict[str, np.ndarray]]) -> Image.Image:
        """One row per example: image, prediction, labels, errors; with a legend of the classes."""
        return pictures.sheet(examples, self.info)

    def files(self, image: np.ndarray, prediction: dict[str, np.ndarray], facts: dict[str, Any]) -> tuple[Any, ...]:
        """The label map (palette PNG whose indices are the ids), the colour overlay and the JSON of one image.

        `prediction`: "labels" integers `[H, W]`, "confidence" float `[H, W]` if it is known.
        """
        labels = np.asarray(prediction["labels"])
        report = pictures.report(labels, prediction.get("confidence"), self.info)
        return pictures.label_map(labels, self.info), pictures.overlay(image, labels, self.info), {**facts, **report}

    def _checked(self, logits: jax.Array) -> jax.Array:
        if logits.shape[-1] != self.num_outputs:
            raise UserError(
                f"The model has {logits.shape[-1]} outputs, but the task {self.kind!r} on {self.info.name!r} needs "
                f"{self.num_outputs}; leave model.num_classes out of the config, it is filled in from the data."
            )
        return logits


@functools.partial(jax.jit, static_argnames=("task", "full"))
def _choose(task: SegmentationTask, logits: jax.Array, down: Samples, across: Samples, full: bool) -> Batch:
    """The answer of a single pass, by blocks of rows: full-size logits never exist."""
    width, channels = len(across.low), max(logits.shape[-1], len(task.info.classes))
    rows = automatic_rows(width, channels, len(down.low))
    return map_over_pixels(lambda block: task.choose(block, full), logits.astype(jnp.float32), down, across, rows=rows)


@functools.partial(jax.jit, static_argnames=("task", "transposed"), donate_argnums=1)
def _add(task, total: jax.Array | None, logits: jax.Array, down: Samples, across: Samples, transposed: bool):
    """The sum `[B, H, W, K]` of what is averaged over passes, with that of one more pass."""
    values = task.averaged(sample_axis(sample_axis(logits.astype(jnp.float32), down, 1), across, 2))
    values = values.swapaxes(1, 2) if transposed else values
    return values if total is None else total + values


@functools.partial(jax.jit, static_argnames=("task", "passes", "full", "probabilities"))
def _choose_from_mean(task, total: jax.Array, passes: int, full: bool, probabilities: bool) -> Batch:
    return task.choose_from_mean(total / passes, full, probabilities)


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises :class:`UserError` unless the option `name` of the task is one of `known`."""
    if value not in known:
        raise UserError(f"task.{name}={value!r} does not exist{did_you_mean(value, known)}")


def _pair(name: str, value: Any) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(side, int) and side >= 0 for side in pair):
        raise UserError(f"task.{name} {value!r} must be one number of pixels or (height, width).")
    return pair
