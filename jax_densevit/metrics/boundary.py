"""Boundary IoU (Cheng et al. 2021, "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation").

The boundary of a class's mask is the mask minus its erosion: its pixels within d of something else, the picture's
frame included (3x3 erosion, d times, after padding with zeros). `d = round(0.02 * diagonal)`, at least 1. The score of
a class is the IoU of the two boundaries, with intersections and unions summed over the data set.

A pixel lies in its class's boundary exactly when the (2d + 1)^2 window around it holds another label or the outside, so
one minimum and one maximum filter over the label map serve all classes at once.

Pixels labelled `ignore` are taken out of the prediction as well: what borders on unlabelled ground does so in both
maps, and a perfect prediction scores 1.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.metrics.metric import State

RATIO = 0.02


class BoundaryIoU:
    """Streaming boundary IoU per class.

    Args:
      classes: the class names; their number is K.
      ignore: the label value that is not scored.
    """

    def __init__(self, classes: Sequence[str], ignore: int = 255):
        self.classes = tuple(classes)
        self.ignore = ignore

    def empty(self) -> State:
        """`both`, `truth` and `predicted`: boundary pixels per class, int64 [K]."""
        return {key: np.zeros(len(self.classes), np.int64) for key in ("both", "truth", "predicted")}

    def measure(
        self, labels: jax.Array, predictions: jax.Array, mask: jax.Array | None = None, size: Any = None
    ) -> State:
        """Boundary pixels of one batch, int32 [K] each; runs inside `jit`.

        Args:
          labels, predictions, mask: as in `ConfusionMatrix.measure`.
          size: (height, width) of the pictures where they fill only the top left corner of their arrays; integers, or
            traced ones. None: all of it.
        """
        k, room = len(self.classes), labels.shape[1:]
        height, width = room if size is None else size
        inside = (jnp.arange(room[0])[:, None] < height) & (jnp.arange(room[1]) < width)
        labels, predictions = labels.astype(jnp.int32), predictions.astype(jnp.int32)
        scored = (labels != self.ignore) & inside
        predictions = jnp.where(scored, predictions, self.ignore)
        # 0 is the outside, as for the erosion of a mask over a frame of zeros.
        ids = jnp.where(inside, jnp.stack([labels, predictions]) + 1, 0)
        edges = scored & _near_another_id(ids, boundary_width(height, width, room), _most(room))
        if mask is not None:
            edges &= mask[:, None, None]

        def count(ids, where):
            bins = jnp.where(where & (ids >= 0) & (ids < k), ids, k).reshape(len(ids), -1)
            return jax.vmap(lambda b: jnp.zeros(k + 1, jnp.int32).at[b].add(1))(bins).sum(0)[:k]

        return {
            "both": count(labels, edges[0] & edges[1] & (labels == predictions)),
            "truth": count(labels, edges[0]),
            "predicted": count(predictions, edges[1]),
        }

    def merge(self, a: State, b: State) -> State:
        """The sum, in int64 on the host."""
        return {key: np.asarray(a[key], np.int64) + np.asarray(b[key], np.int64) for key in a}

    def compute(self, state: State) -> dict[str, Any]:
        """`mean_boundary_IoU` over the classes that occur, and `per_class` (None where a class is absent from both)."""
        union = state["truth"] + state["predicted"] - state["both"]
        per_class = [
            {"class": name, "boundary_IoU": float(state["both"][i] / union[i]) if union[i] else None}
            for i, name in enumerate(self.classes)
        ]
        defined = [row["boundary_IoU"] for row in per_class if row["boundary_IoU"] is not None]
        return {"mean_boundary_IoU": float(np.mean(defined)) if defined else None, "per_class": per_class}


def boundary_width(height: Any, width: Any, room: tuple[int, int]) -> jax.Array:
    """int32 []: how many pixels wide the boundary is in a picture of (height, width), traced or not, at most `room`."""
    # The smallest squared diagonals that round to 2, 3, ... in float64: the device then compares integers.
    least = []
    while (wide := len(least) + 2) <= _most(room):
        square = (50 * wide - 25) ** 2
        least.append(square if round(RATIO * math.sqrt(square)) >= wide else square + 1)
    square = jnp.asarray(height, jnp.int32) ** 2 + jnp.asarray(width, jnp.int32) ** 2
    return 1 + jnp.sum(square >= jnp.array(least, jnp.int32), dtype=jnp.int32)


def _most(room: tuple[int, int]) -> int:
    return max(1, round(RATIO * math.hypot(*room)))


def _near_another_id(ids: jax.Array, d: jax.Array, most: int) -> jax.Array:
    """bool like `ids` [.., H, W]: whether the (2d + 1)^2 window around a pixel holds a different id; 1 <= d <= most."""
    both = jnp.stack([ids, -ids])  # one maximum filter gives maximum and minimum
    for axis in (both.ndim - 2, both.ndim - 1):
        both = _window_maximum(both, d, most, axis)
    return both[0] != -both[1]


def _window_maximum(values: jax.Array, d: jax.Array, most: int, axis: int) -> jax.Array:
    """The maximum over the window of 2d + 1 entries around each, with 0 outside, by doubling."""
    length, window = values.shape[axis], 2 * most + 1
    values = jnp.pad(values, [(most, most + window) if i == axis else (0, 0) for i in range(values.ndim)])
    span, reached = jnp.int32(1), 1
    while reached < window:
        step = jnp.minimum(span, 2 * d + 1 - span)
        shifted = jnp.pad(values, [(0, reached) if i == axis else (0, 0) for i in range(values.ndim)])
        values = jnp.maximum(values, jax.lax.dynamic_slice_in_dim(shifted, step, values.shape[axis], axis))
        span, reached = span + step, 2 * reached
    return jax.lax.dynamic_slice_in_dim(values, most - d, length, axis)
