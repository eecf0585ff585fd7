"""What ColTran's three stages (Kumar et al. 2021, https://arxiv.org/abs/2102.04432) have in common as tasks.

A picture of any size becomes what a stage sees by the paper's preprocessing, in whole numbers: the largest square in
the middle (or the largest window of the stage's own proportions), averaged by area to `photo_size`, and from there to
the size of the stage. Gray is the formula of training, floored (`layers.bits.gray_from_int32`). Losses are in bits: per
pixel for the colorizer, whose symbol is a pixel's whole color, and per sub-pixel for the upsamplers.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.errors import UserError
from jax_densevit.layers.resize import largest_window, resize_area
from jax_densevit.tasks import color_pictures
from jax_densevit.tasks.answers import Answers, number
from jax_densevit.tasks.task import Batch

NUMBERS = ("PSNR", "L1", "SSIM", "CIEDE2000", "colorfulness", "delta_colorfulness")  # of pictures, in a summary


def bits_of(logits: jax.Array, truth: jax.Array) -> jax.Array:
    """-log2 of the probability of the true value: logits `[..., K]`, int `[...]` -> float32 `[...]`."""
    logits = logits.astype(jnp.float32)
    # Not a gather, whose gradient would be a scatter.
    picked = jnp.where(truth[..., None] == jnp.arange(logits.shape[-1]), logits, 0).sum(-1)
    return (jax.nn.logsumexp(logits, -1) - picked) * np.float32(1 / math.log(2))


def fit(image: jax.Array, *sizes: tuple[int, int]) -> jax.Array:
    """The :func:`middle` of pictures `[B, H, W, 3]` in the proportions of the first of `sizes`, averaged by area to one
    size after the other: int32 `[B, h, w, 3]`.
    """
    image = middle(image, sizes[0])
    for size in sizes:
        image = resize_area(image, size)
    return image


def middle(image: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The middle of pictures `[B, H, W, 3]`, as large as it can be in the proportions of `shape`."""
    (top, left), (height, width) = _window(image.shape[1:3], shape)
    return image[:, top : top + height, left : left + width]


def inside(batch: Batch, size: tuple[int, int]) -> jax.Array:
    """bool `[B, h, w]`: the pixels of fitted training pictures that see no padding (`batch["size"]`)."""
    image = batch["image"]
    if "size" not in batch:
        return jnp.ones((len(image), *size), bool)
    starts, lengths = _window(image.shape[1:3], size)
    rows, columns = (
        (start * count + (jnp.arange(count) + 1) * length)[None] <= batch["size"][:, i, None] * count
        for i, (start, length, count) in enumerate(zip(starts, lengths, size, strict=True))
    )
    return rows[:, :, None] & columns[:, None]


def given(batch: Batch, smallest: tuple[int, int]) -> Any:
    """The pictures of an evaluation batch without the room around them.

    Raises:
      UserError: pictures smaller than `smallest`, what the answer will have; or too large to be averaged on a device.
    """
    image = batch["image"]
    height, width = batch.get("size", image.shape[1:3])
    way_out = f"give the data source largest_crop={tuple(smallest)}, which resizes them when they are read."
    if height < smallest[0] or width < smallest[1]:
        raise UserError(f"Pictures of {height} x {width} are smaller than the model's; enlarge them, or {way_out}")
    if isinstance(image, jax.Array) and height * width > 2**23:
        raise UserError(f"Pictures of {height} x {width} are too large for a device; {way_out}")
    return image[:, :height, :width]


def pairs(task: Any, *names: str) -> None:
    """Makes (height, width) of fields that hold a side or a list; all must be of the same proportions."""
    for name in names:
        size = getattr(task, name)
        size = (size, size) if isinstance(size, int) else tuple(size)
        if len(size) != 2 or min(size) < 1:
            raise UserError(f"task.{name} is {size}; it must be (height, width) in pixels, or the side of a square.")
        object.__setattr__(task, name, size)
        first = getattr(task, names[0])
        if size[0] * first[1] != size[1] * first[0]:
            raise UserError(f"task.{name} {size} and task.{names[0]} {first} must have the same proportions.")


def picture_numbers(found: dict[str, Any]) -> dict[str, float]:
    """The numbers of `PictureMetrics` that go into a summary; NaN where nothing was measured."""
    return {name: number(found[name]) for name in NUMBERS}


def no_pictures() -> dict[str, float]:
    """The same for an answer that is no picture."""
    return dict.fromkeys(NUMBERS, math.nan)


class StageAnswers(Answers):
    """The files of a stage."""

    def files(self, image: np.ndarray, prediction: dict[str, np.ndarray], facts: dict[str, Any]) -> tuple[Any, ...]:
        """The predicted picture, at the size of the stage, and a JSON about it and what it was made from."""
        return color_pictures.files(image, prediction["image"], facts)


@functools.lru_cache(maxsize=256)
def _window(size: tuple[int, int], shape: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """((top, left), (height, width)) of the largest window in the middle."""
    window = largest_window(size, shape)
    return ((size[0] - window[0]) // 2, (size[1] - window[1]) // 2), window
