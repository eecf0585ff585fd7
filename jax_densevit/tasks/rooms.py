"""Few array shapes for pictures of many sizes, so that decoding compiles a few times and not once per size.

A picture lies in the top left corner of an array with some room to spare, whose size is one of few. What depends on the
true size comes as arrays computed on the host: the two neighbours and weights of every output row and column
(:class:`Samples`), which also express mirroring and what lies outside.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Samples(NamedTuple):
    """Where the entries of an enlarged axis come from: `x[low] * low_weight + x[high] * high_weight`, each `[n]`."""

    low: np.ndarray  # int32
    high: np.ndarray  # int32
    low_weight: np.ndarray  # float32, 0 beyond the true length
    high_weight: np.ndarray


def samples(given: int, length: int, *, room: int = 0, cut: int = 0, mirrored: bool = False) -> Samples:
    """Bilinear samples (corners not aligned, as in `resize_bilinear`) from `given` entries to `length`.

    Args:
      given: true length of the axis that is sampled.
      length: the length it stretches over.
      room: how many entries to return; those beyond `length` are 0. By default `length`.
      cut: keep only the first so many of `length`; 0 = all.
      mirrored: sample the axis from its other end.
    """
    position = np.clip((np.arange(length) + 0.5) * given / length - 0.5, 0, given - 1)[: cut or length]
    low = np.floor(position).astype(np.int32)
    high = np.minimum(low + 1, given - 1)
    share = (position - low).astype(np.float32)
    if mirrored:
        low, high = given - 1 - low, given - 1 - high
    fill = (0, max(room - len(low), 0))
    return Samples(*(np.pad(values, fill) for values in (low, high, 1 - share, share)))


def sample_axis(x: jax.Array, at: Samples, axis: int) -> jax.Array:
    """Samples one axis of a float array. Meant for decoding: as a layer, its gradient would be a scatter."""
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    low = jnp.take(x, at.low, axis, mode="clip") * at.low_weight.reshape(shape)
    return low + jnp.take(x, at.high, axis, mode="clip") * at.high_weight.reshape(shape)


def room_for(size: tuple[int, int]) -> tuple[int, int]:
    """A size at least as large: sides rounded up in steps of an eighth of their power of two, at least 16."""

    def up(side: int) -> int:
        step = max(16, 2 ** (side.bit_length() - 4))
        return -(-side // step) * step

    return up(size[0]), up(size[1])


def give_room(batch: Mapping[str, np.ndarray], fill: Mapping[str, int]) -> dict[str, Any]:
    """A batch of NumPy arrays whose pictures have room, with their true (height, width) under "size".

    Arrays of at least three axes are filled up at the bottom and the right with `fill[name]` (0 where it is not named).
    """
    size = tuple(batch["image"].shape[1:3])
    room = room_for(size)
    more = ((0, 0), (0, room[0] - size[0]), (0, room[1] - size[1]))

    def widen(name: str, array: np.ndarray) -> np.ndarray:
        if array.ndim < 3:
            return array
        return np.pad(array, more + ((0, 0),) * (array.ndim - 3), constant_values=fill.get(name, 0))

    return {**{name: widen(name, array) for name, array in batch.items()}, "size": size}


def cut(arrays: Any, room: tuple[int, int], size: tuple[int, int]) -> Any:
    """What is left of one picture's arrays without the room: those that begin with its two axes are cut to `size`."""
    return jax.tree.map(lambda x: x[: size[0], : size[1]] if x.shape[:2] == tuple(room) else x, arrays)
