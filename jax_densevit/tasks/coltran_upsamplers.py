"""ColTran's two upsamplers as tasks: all 256 values of every sub-pixel from a coarse picture, in bits per sub-pixel.

Training takes one random channel of every picture, drawn from the example's seed; everything else all three. The coarse
picture is the true one, made coarse: stages are trained apart from each other, and measured so. Their pictures are the
most probable values.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jax_densevit.data.source import DataInfo
from jax_densevit.errors import UserError
from jax_densevit.layers.bits import convert_bits, gray_from_int32
from jax_densevit.layers.resize import resize_area
from jax_densevit.metrics.bits import Bits
from jax_densevit.metrics.image import PictureMetrics
from jax_densevit.metrics.metric import Metric
from jax_densevit.models.output import ChannelOutput
from jax_densevit.tasks import color_pictures, coltran
from jax_densevit.tasks.answers import number
from jax_densevit.tasks.registry import register_task
from jax_densevit.tasks.task import Batch, LossTerm

VALUES = 256


@dataclasses.dataclass(frozen=True)
class UpsamplerTask(coltran.StageAnswers):
    """Fine values of each color channel; see the subclasses.

    Attributes:
      info: facts about the data; its normalisation plays no part.
      image_size: (height, width) of what the model sees and answers, or a side; the same as the model's.
      coarse_size: (height, width) of the coarse picture, whose pixels are repeated to `image_size`.
      bits: of a value of the coarse picture, the same as the model's.
      photo_size: (height, width) to which pictures are averaged before.
    """

    percent: ClassVar[bool] = False
    num_outputs: ClassVar[int] = VALUES
    name: ClassVar[str] = ""

    info: DataInfo
    image_size: tuple[int, int] = (0, 0)
    coarse_size: tuple[int, int] = (0, 0)
    bits: int = 8
    photo_size: tuple[int, int] = (256, 256)

    def __post_init__(self):
        coltran.pairs(self, "image_size", "coarse_size", "photo_size")
        if not 1 <= self.bits <= 8:
            raise UserError(f"task.bits is {self.bits}; a coarse value has 1 to 8 bits.")

    def training_macs(self, count: Callable[[tuple[int, int]], int]) -> int:
        """Multiply-accumulates of one training example: one of the three channels that the model's count is for."""
        return count(self.image_size) // 3

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        """(values `[B, C, h, w]`, gray `[B, h, w]`, channels `[B, C]`), int32.

        C is 1, a random channel of each example, where the batch has seeds ("seed" uint32 `[B, 2]`): in training. Else
        all 3.
        """
        values, gray, channels, _ = self._examples(batch)
        return values, gray, channels

    def loss(self, output: ChannelOutput, batch: Batch) -> dict[str, LossTerm]:
        """ "upsampling", bits per sub-pixel. What sees padding counts nothing."""
        *_, truth = self._examples(batch)
        counted = jnp.broadcast_to(coltran.inside(batch, self.image_size)[:, None], truth.shape)
        bits = jnp.where(counted, coltran.bits_of(output.logits, truth), 0)
        return {"upsampling": LossTerm(bits.sum(), counted.sum(dtype=jnp.float32))}

    def decode(
        self,
        forward: Callable[..., ChannelOutput],
        batch: Batch,
        *,
        full: bool = False,
        coarse: jax.Array | None = None,
    ) -> Batch:
        """Fine pictures at the model's size, and how many bits the true values take.

        Args:
          forward: jitted model, (values, gray, channels) to `ChannelOutput`.
          batch: "image" uint8 `[B, H, W, 3]`; "size" as in the task's contract.
          full: changes nothing.
          coarse: what to start from, 8-bit values `[B, *coarse_size, 3]`, such as the stage before answered; of fewer
            bits only the highest are used. None makes the true picture coarse.

        Returns:
          "image", "coarse" (what the model saw, of fewer bits the lower edges) and "truth" uint8 `[B, h, w, 3]`;
          "gray" uint8 `[B, h, w]`; "bits" float32 `[B, 3, h, w]`.

        Raises:
          UserError: pictures smaller than the model's.
        """
        image = coltran.given(batch, self.image_size)
        image = self._fitted(image) if isinstance(image, np.ndarray) else _fit_on_device(self, image)
        values, gray, channels, truth = _all_channels(self, image, coarse)
        return _answer(self, forward(values, gray, channels).logits, values, gray, truth)

    def metrics(self) -> dict[str, Metric]:
        """Bits, and everything in `metrics.image` for the fine picture and for the coarse one in its place."""
        return {"upsampling": Bits(*self._known()), "pictures": PictureMetrics(), "coarse": PictureMetrics()}

    def measure(self, predictions: Batch, batch: Batch) -> dict[str, Any]:
        """Counts of one batch by metric; examples whose mask is False count nothing."""
        metrics, mask, truth = self.metrics(), batch.get("mask"), predictions["truth"]
        symbols = jnp.moveaxis(truth.astype(jnp.int32) + VALUES * np.arange(3), -1, 1)
        return {
            "upsampling": metrics["upsampling"].measure(predictions["bits"], symbols, mask),
            "pictures": metrics["pictures"].measure(truth, predictions["image"], mask),
            "coarse": metrics["coarse"].measure(truth, predictions["coarse"], mask),
        }

    def summary(self, results: dict[str, dict[str, Any]]) -> dict[str, float]:
        """Bits per sub-pixel, the fewer the better, and the numbers of the most probable pictures."""
        bits = number(results["upsampling"]["bits"])
        return {"bits": bits, **coltran.picture_numbers(results["pictures"])}

    def baselines(self, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
        """The numbers of :meth:`summary` for all values alike and for the best fixed distribution over values (that of
        the very pictures that are evaluated), both by channel and given the coarse bits; and for the coarse picture.
        """
        found = results["upsampling"]
        bits = {"all values alike": found["uniform_bits"], "how often each value occurs": found["marginal_bits"]}
        rows = {name: {"bits": number(value), **coltran.no_pictures()} for name, value in bits.items()}
        return rows | {"coarse input": {"bits": math.nan, **coltran.picture_numbers(results["coarse"])}}

    def protocol(self) -> dict[str, Any]:
        """How predictions are made and measured, JSON-ready: whatever changes a score."""
        return {
            "task": self.name,
            "image_size": list(self.image_size),
            "coarse_size": list(self.coarse_size),
            "coarse_bits": self.bits,
            "photo_size": list(self.photo_size),
            "bits": "per sub-pixel, given the true coarse picture and the true gray one",
            "pictures": "the most probable value of every sub-pixel, from the true coarse picture",
            "measured_on": "8-bit RGB at image_size",
        }

    def sheet(self, examples: list[dict[str, np.ndarray]]) -> Image.Image:
        """One row per example: gray, coarse, fine, true."""
        columns = dict(
            gray="predicted_gray", coarse="predicted_coarse", model="predicted_image", truth="predicted_truth"
        )
        return color_pictures.sheet(color_pictures.rows(examples, **columns))

    def _known(self) -> tuple[int, int]:
        """(values, contexts) of a sub-pixel given its channel and, where they are fewer than all, its coarse bits."""
        groups = 2**self.bits if self.bits < 8 else 1
        return VALUES // groups, 3 * groups

    def _fitted(self, image: Any) -> Any:
        return coltran.fit(image, self.photo_size, self.image_size)

    def _channels(self, image: jax.Array, coarse: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """(values, gray, truth) of all three channels from fitted pictures, and the coarse ones where given."""
        coarse = resize_area(image, self.coarse_size) if coarse is None else coarse
        # By area also upwards, which repeats pixels where the factor is whole.
        values = resize_area(convert_bits(coarse, 8, self.bits), self.image_size)
        return jnp.moveaxis(values, -1, 1), gray_from_int32(image), jnp.moveaxis(jnp.asarray(image), -1, 1)

    def _examples(self, batch: Batch) -> tuple[jax.Array, ...]:
        """(values, gray, channels, truth) of the channels that are computed."""
        values, gray, truth = self._channels(self._fitted(batch["image"]))
        if "seed" not in batch:
            return values, gray, jnp.broadcast_to(jnp.arange(3), (gray.shape[0], 3)), truth
        channels = random_channels(batch["seed"])[:, None]
        values, truth = (jnp.take_along_axis(x, channels[..., None, None], axis=1) for x in (values, truth))
        return values, gray, channels, truth


@register_task("coltran_color_upsampler")
@dataclasses.dataclass(frozen=True)
class ColorUpsamplerTask(UpsamplerTask):
    """From 3 bits a channel to 8 at 64 x 64; fields as in :class:`UpsamplerTask`."""

    name: ClassVar[str] = "coltran_color_upsampler"

    image_size: tuple[int, int] = (64, 64)
    coarse_size: tuple[int, int] = (64, 64)
    bits: int = 3


@register_task("coltran_spatial_upsampler")
@dataclasses.dataclass(frozen=True)
class SpatialUpsamplerTask(UpsamplerTask):
    """From 64 x 64 pixels to 256 x 256; fields as in :class:`UpsamplerTask`."""

    name: ClassVar[str] = "coltran_spatial_upsampler"

    image_size: tuple[int, int] = (256, 256)
    coarse_size: tuple[int, int] = (64, 64)
    bits: int = 8


def random_channels(seeds: jax.Array) -> jax.Array:
    """A channel for every example, 0, 1 or 2, from its seed alone: uint32 `[B, 2]` -> int32 `[B]`."""
    stream = zlib.crc32(b"channel")  # other draws from the same seed are independent of it

    def draw(seed):
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), stream)
        return jax.random.randint(key, (), 0, 3)

    return jax.vmap(draw)(seeds)


@functools.partial(jax.jit, static_argnames="task")
def _fit_on_device(task: UpsamplerTask, image: jax.Array) -> jax.Array:
    return task._fitted(image)


@functools.partial(jax.jit, static_argnames="task")
def _all_channels(task: UpsamplerTask, image: jax.Array, coarse: jax.Array | None) -> tuple[jax.Array, ...]:
    values, gray, truth = task._channels(image, coarse)
    return values, gray, jnp.broadcast_to(jnp.arange(3), (gray.shape[0], 3)), truth


@functools.partial(jax.jit, static_argnames="task")
def _answer(task: UpsamplerTask, logits: jax.Array, values: jax.Array, gray: jax.Array, truth: jax.Array) -> Batch:
    pictures = {"image": jnp.argmax(logits, -1), "coarse": convert_bits(values, task.bits, 8), "truth": truth}
    return {
        **{name: jnp.moveaxis(picture, 1, -1).astype(jnp.uint8) for name, picture in pictures.items()},
        "gray": gray.astype(jnp.uint8),
        "bits": coltran.bits_of(logits, truth),
    }
