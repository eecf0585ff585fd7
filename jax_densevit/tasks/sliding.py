"""Sliding-window inference: a model of one input size applied all over a picture of any size.

Windows lie `stride` apart from the top left corner; the last of a row or column is shifted back to end at the border
(mmsegmentation's and SETR's grid: 8 windows of 768 with stride 512 on 2049x1025 pixels). Logits are added up and
divided by the number of windows over each pixel.

The model always sees one shape, `[B * windows_at_once, crop height, crop width, 3]`, so it compiles once whatever the
sizes of the pictures.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.layers.resize import resize_bilinear
from jax_densevit.models.output import DenseOutput


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Where windows of `crop` pixels start along a side of `length` pixels; one at 0 if the side is shorter."""
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride + crop, length) - crop, 0) for i in range(count)]


def slide(
    forward: Callable[[jax.Array], DenseOutput],
    images: jax.Array,
    size: tuple[int, int],
    crop: tuple[int, int],
    stride: tuple[int, int],
    windows_at_once: int = 1,
) -> jax.Array:
    """Logits of whole pictures from windows.

    Args:
      forward: jitted; images `[N, *crop, 3]` to a `DenseOutput`.
      images: normalised float `[B, H, W, 3]`, H and W at least the crop's. Beyond `size` it is 0, the mean colour: a
        picture smaller than the crop is padded by that.
      size: the true (height, width) of the pictures in their array.
      crop, stride: (height, width) in pixels.
      windows_at_once: windows per picture in one call of `forward`.

    Returns:
      float32 `[B, H, W, K]`; what lies beyond `size` has no meaning.
    """
    room = images.shape[1:3]
    starts = [
        (top, left)
        for top in window_starts(size[0], crop[0], stride[0])
        for left in window_starts(size[1], crop[1], stride[1])
    ]
    count = np.zeros(room, np.float32)
    for top, left in starts:
        count[top : top + crop[0], left : left + crop[1]] += 1
    canvas = None
    for i in range(0, len(starts), windows_at_once):
        group = starts[i : i + windows_at_once]
        used = np.arange(windows_at_once) < len(group)
        group = np.array(group + [group[-1]] * (windows_at_once - len(group)), np.int32)
        output = forward(_take(images, group, crop))
        if canvas is None:  # divided over devices as the pictures are, which a program that is exported does not know
            where = None if isinstance(images, jax.core.Tracer) else images.sharding
            canvas = jnp.zeros((*images.shape[:3], output.logits.shape[-1]), jnp.float32, device=where)
        canvas = _add(canvas, output, group, used, crop)
    return _divide(canvas, np.maximum(count, 1))


@functools.partial(jax.jit, static_argnames="crop")
def _take(images: jax.Array, starts: jax.Array, crop: tuple[int, int]) -> jax.Array:
    """Windows `[B * g, *crop, 3]`, those of one picture next to each other: the batch stays on its devices."""

    def window(start):
        return jax.lax.dynamic_slice(images, (0, start[0], start[1], 0), (len(images), *crop, images.shape[-1]))

    windows = jax.vmap(window, out_axes=1)(starts)
    return windows.reshape(-1, *windows.shape[2:])


@functools.partial(jax.jit, static_argnames="crop", donate_argnums=0)
def _add(canvas: jax.Array, output: DenseOutput, starts: jax.Array, used: jax.Array, crop) -> jax.Array:
    """The canvas `[B, H, W, K]` with the logits of the windows that are `used` added at their places."""
    windows = resize_bilinear(output.logits.astype(jnp.float32), output.covers)[:, : crop[0], : crop[1]]
    windows = windows.reshape(-1, len(starts), *windows.shape[1:])
    for i in range(len(starts)):
        corner = (0, starts[i, 0], starts[i, 1], 0)
        place = jax.lax.dynamic_slice(canvas, corner, (len(canvas), *crop, canvas.shape[-1]))
        canvas = jax.lax.dynamic_update_slice(canvas, place + jnp.where(used[i], windows[:, i], 0), corner)
    return canvas


@functools.partial(jax.jit, donate_argnums=0)
def _divide(canvas: jax.Array, count: jax.Array) -> jax.Array:
    return canvas / count[..., None]
