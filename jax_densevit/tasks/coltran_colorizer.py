"""ColTran's colorizer as a task: 512 coarse colors, one symbol a pixel, in bits per pixel.

The model is asked twice: autoregressively (a pixel given those before it) and in parallel (from the gray picture
alone). Evaluation measures both in bits. Its pictures are the most probable colors of the parallel head, which takes
one forward pass; samples of the autoregressive model come from a sampler, see :meth:`ColorizerTask.decode`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jax_densevit.data.source import DataInfo
from jax_densevit.errors import UserError
from jax_densevit.layers.bits import convert_bits, from_symbols, gray_from_int32, to_symbols
from jax_densevit.metrics.bits import Bits
from jax_densevit.metrics.image import PictureMetrics
from jax_densevit.metrics.metric import Metric
from jax_densevit.models.output import SymbolOutput
from jax_densevit.tasks import color_pictures, coltran
from jax_densevit.tasks.answers import number
from jax_densevit.tasks.registry import register_task
from jax_densevit.tasks.task import Batch, LossTerm

BITS, SYMBOLS = 3, 512


@register_task("coltran_colorizer")
@dataclasses.dataclass(frozen=True)
class ColorizerTask(coltran.StageAnswers):
    """Coarse colors of a gray picture, for the model of the same name.

    Attributes:
      info: facts about the data; its normalisation plays no part.
      image_size: (height, width) of what the model sees, or a side; the same as the model's.
      photo_size: (height, width) to which pictures are averaged before.
      autoregressive_weight, parallel_weight: of the two heads in the loss, 0.99 and 0.01 in the paper.
    """

    percent: ClassVar[bool] = False
    num_outputs: ClassVar[int] = SYMBOLS

    info: DataInfo
    image_size: tuple[int, int] = (64, 64)
    photo_size: tuple[int, int] = (256, 256)
    autoregressive_weight: float = 0.99
    parallel_weight: float = 0.01

    def __post_init__(self):
        coltran.pairs(self, "image_size", "photo_size")
        if min(self.autoregressive_weight, self.parallel_weight) < 0:
            raise UserError("task.autoregressive_weight and task.parallel_weight must not be negative.")

    def training_macs(self, count: Callable[[tuple[int, int]], int]) -> int:
        """Multiply-accumulates of one training example, from the model's count for a picture of a given size."""
        return count(self.image_size)

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        """(gray, symbols), int32 `[B, h, w]` each."""
        image = self._fitted(batch["image"])
        return gray_from_int32(image), to_symbols(convert_bits(image, 8, BITS))

    def loss(self, output: SymbolOutput, batch: Batch) -> dict[str, LossTerm]:
        """ "autoregressive" and "parallel", bits per pixel. Pixels that see padding count nothing."""
        _, symbols = self.inputs(batch)
        counted = coltran.inside(batch, self.image_size)
        weight = counted.sum(dtype=jnp.float32)
        coefficients = {"autoregressive": self.autoregressive_weight, "parallel": self.parallel_weight}
        heads = zip(coefficients, _heads(output), strict=True)
        return {
            name: LossTerm(jnp.where(counted, coltran.bits_of(logits, symbols), 0).sum(), weight, coefficients[name])
            for name, logits in heads
        }

    def decode(
        self,
        forward: Callable[..., SymbolOutput],
        batch: Batch,
        *,
        full: bool = False,
        sampler: Callable[[jax.Array], jax.Array] | None = None,
    ) -> Batch:
        """Coarse pictures at the model's size, and how many bits the true colors take.

        Args:
          forward: jitted model, (gray, symbols) to `SymbolOutput`.
          batch: "image" uint8 `[B, H, W, 3]`, in color or gray; "size" as in the task's contract.
          full: changes nothing.
          sampler: from gray int32 `[B, h, w]` to symbols int `[B, h, w]`. None takes the most probable symbol of the
            parallel head, every pixel by itself.

        Returns:
          "image" and "truth" uint8 `[B, h, w, 3]`, 3 bits a channel (the lower edges 0, 32, ..., 224); "gray" uint8
          `[B, h, w]`; "symbols" int32 `[B, h, w]`, the true ones; "autoregressive_bits" and "parallel_bits" float32
          `[B, h, w]`.

        Raises:
          UserError: pictures smaller than the model's.
        """
        gray, symbols = _prepare(self, coltran.given(batch, self.image_size))
        output = forward(gray, symbols)
        chosen = None if sampler is None else sampler(gray)
        return _answer(*_heads(output), gray, symbols, chosen)

    def metrics(self) -> dict[str, Metric]:
        """Bits of both heads, and everything in `metrics.image` for the coarse picture and for a gray one."""
        bits = {name: Bits(SYMBOLS) for name in ("autoregressive", "parallel")}
        return {**bits, "colorization": PictureMetrics(), "all_gray": PictureMetrics()}

    def measure(self, predictions: Batch, batch: Batch) -> dict[str, Any]:
        """Counts of one batch by metric; examples whose mask is False count nothing."""
        metrics, mask = self.metrics(), batch.get("mask")
        truth = predictions["truth"]
        gray = jnp.broadcast_to(_coarse(convert_bits(predictions["gray"], 8, BITS))[..., None], truth.shape)
        pictures = {"colorization": predictions["image"], "all_gray": gray}
        return {
            name: metrics[name].measure(predictions[f"{name}_bits"], predictions["symbols"], mask)
            for name in ("autoregressive", "parallel")
        } | {name: metrics[name].measure(truth, picture, mask) for name, picture in pictures.items()}

    def summary(self, results: dict[str, dict[str, Any]]) -> dict[str, float]:
        """Bits per pixel, the fewer the better, of both heads, and the numbers of the coarse pictures."""
        bits = {name: number(results[name]["bits"]) for name in ("autoregressive", "parallel")}
        pictures = coltran.picture_numbers(results["colorization"])
        return {"bits": bits["autoregressive"], "parallel_bits": bits["parallel"], **pictures}

    def baselines(self, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
        """The numbers of :meth:`summary` for all colors alike, for the best fixed distribution over colors (that of
        the very pictures that are evaluated), and for the gray picture as it is.
        """
        found = results["autoregressive"]
        bits = {"all colors alike": found["uniform_bits"], "how often each color occurs": found["marginal_bits"]}
        rows = {
            name: {**dict.fromkeys(("bits", "parallel_bits"), number(value)), **coltran.no_pictures()}
            for name, value in bits.items()
        }
        nothing = dict.fromkeys(("bits", "parallel_bits"), math.nan)
        return rows | {"all gray": {**nothing, **coltran.picture_numbers(results["all_gray"])}}

    def protocol(self) -> dict[str, Any]:
        """How predictions are made and measured, JSON-ready: whatever changes a score."""
        return {
            "task": "coltran_colorizer",
            "image_size": list(self.image_size),
            "photo_size": list(self.photo_size),
            "bits": "per pixel, of the true 9-bit color given those before it in raster order",
            "pictures": "the most probable color of the parallel head, every pixel by itself; nothing is sampled",
            "measured_on": "RGB of 3 bits a channel (0, 32, ..., 224), the true picture too, at image_size",
        }

    def sheet(self, examples: list[dict[str, np.ndarray]]) -> Image.Image:
        """One row per example: gray, coarse colors of the model, true coarse colors."""
        columns = dict(gray="predicted_gray", model="predicted_image", truth="predicted_truth")
        return color_pictures.sheet(color_pictures.rows(examples, **columns))

    def _fitted(self, image: jax.Array) -> jax.Array:
        return coltran.fit(image, self.photo_size, self.image_size)


def _heads(output: SymbolOutput) -> tuple[jax.Array, jax.Array]:
    if output.parallel is None:
        raise UserError("The task coltran_colorizer needs the parallel head: set model.parallel_head to True.")
    return output.logits, output.parallel


def _coarse(values: jax.Array) -> jax.Array:
    return convert_bits(values, BITS, 8).astype(jnp.uint8)


def _prepare(task: ColorizerTask, image: Any) -> tuple[jax.Array, jax.Array]:
    if isinstance(image, np.ndarray):  # averaged on the host, whatever the size: few shapes are compiled
        image = task._fitted(image)
        return _to_inputs(image)
    return _prepare_on_device(task, image)


@functools.partial(jax.jit, static_argnames="task")
def _prepare_on_device(task: ColorizerTask, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    return task.inputs({"image": image})


@jax.jit
def _to_inputs(image: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gray_from_int32(image), to_symbols(convert_bits(image, 8, BITS))


@jax.jit
def _answer(
    logits: jax.Array, parallel: jax.Array, gray: jax.Array, symbols: jax.Array, chosen: jax.Array | None
) -> Batch:
    chosen = jnp.argmax(parallel, -1) if chosen is None else chosen
    return {
        "image": _coarse(from_symbols(chosen)),
        "truth": _coarse(from_symbols(symbols)),
        "gray": gray.astype(jnp.uint8),
        "symbols": symbols,
        "autoregressive_bits": coltran.bits_of(logits, symbols),
        "parallel_bits": coltran.bits_of(parallel, symbols),
    }
