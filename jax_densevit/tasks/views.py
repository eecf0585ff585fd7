"""The views of a picture that are decoded and averaged: sizes, mirror images, turns; there and back.

A view is a picture with rows and columns exchanged or not, then resized, each axis mirrored or not. Going there and
coming back are both samples of rows and columns (`rooms.py`), so a picture inside a larger array needs no special case.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_densevit.layers.resize import resize_bilinear
from jax_densevit.tasks.rooms import Samples, sample_axis, samples


def views(flip: bool, rotate90: bool) -> list[tuple[bool, bool, bool]]:
    """The views of a picture as (rows and columns exchanged, then the order of rows reversed, that of columns)."""
    turns = [(False, False, False)]
    if rotate90:  # clockwise by 90, 180 and 270 degrees
        turns += [(True, False, True), (False, True, True), (True, True, False)]
    return [
        (*turn, columns ^ mirrored) for *turn, columns in turns for mirrored in ((False, True) if flip else (False,))
    ]


def place(given, length, room, mirrored, cut=(0, 0)) -> tuple[Samples, ...]:
    """Samples of rows and columns: `given` values that stretch over `length`, read at the pixels of `room` up to `cut`,
    each axis mirrored if asked; arguments are pairs (rows, columns), see `rooms.samples`.
    """
    sides = zip(given, length, room, cut, mirrored, strict=True)
    return tuple(samples(g, n, room=r, cut=c, mirrored=m) for g, n, r, c, m in sides)


def prepare(task: Any, image: jax.Array, size, fed, room, flip) -> jax.Array:
    """What the model is fed: uint8 `[B, H, W, 3]` as the task normalises it, float32.

    Args:
      task: its `inputs` normalises.
      image: the pictures fill the top left `size` of it.
      size, fed: (height, width) of the pictures and of what is fed.
      room: (height, width) of the result; 0 beyond `fed`.
      flip: whether (the order of rows, that of columns) is reversed.
    """
    same = tuple(image.shape[1:3]) == size == fed == room and not any(flip)
    return _normalise(task, image, None if same else place(size, fed, room, flip))


@functools.partial(jax.jit, static_argnames="task")
def _normalise(task: Any, image: jax.Array, place: tuple[Samples, Samples] | None) -> jax.Array:
    (images,) = task.inputs({"image": image})
    return images if place is None else sample_axis(sample_axis(images, place[0], 1), place[1], 2)


@functools.partial(jax.jit, static_argnames=("covers", "size"))
def enlarge(logits: jax.Array, covers: tuple[int, int], size: tuple[int, int]) -> jax.Array:
    """Logits that stretch over `covers`, float32 at every pixel of `size`."""
    return resize_bilinear(logits.astype(jnp.float32), covers)[:, : size[0], : size[1]]
