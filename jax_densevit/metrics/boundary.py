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

    def measure(self, labels: jax.Array, predictions: jax.Array, mask: jax.Array | None = None) -> State:
        """Boundary pixels of one batch, int32 [K] each; arguments as in `ConfusionMatrix.measure`. Inside `jit`."""
        k = len(self.classes)
        width = boundary_width(*labels.shape[1:])
        labels, predictions = labels.astype(jnp.int32), predictions.astype(jnp.int32)
        scored = labels != self.ignore
        predictions = jnp.where(scored, predictions, self.ignore)
        if mask is not None:
            scored &= mask[:, None, None]
        truth_edge = scored & _near_another_label(labels, width)
        predicted_edge = scored & _near_another_label(predictions, width)

        def count(ids, where):
            bins = jnp.where(where & (ids >= 0) & (ids < k), ids, k).reshape(len(ids), -1)
            return jax.vmap(lambda b: jnp.zeros(k + 1, jnp.int32).at[b].add(1))(bins).sum(0)[:k]

        return {
            "both": count(labels, truth_edge & predicted_edge & (labels == predictions)),
            "truth": count(labels, truth_edge),
            "predicted": count(predictions, predicted_edge),
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


def boundary_width(height: int, width: int) -> int:
    """How many pixels wide the boundary is in a picture of this size."""
    return max(1, round(RATIO * math.sqrt(height * height + width * width)))


def _near_another_label(labels: jax.Array, d: int) -> jax.Array:
    """bool [B, H, W]: whether the (2d + 1)^2 window around a pixel holds a different label or leaves the picture."""
    padded = jnp.pad(labels, ((0, 0), (d, d), (d, d)), constant_values=-1)
    low, high = padded, padded
    for axis in (1, 2):
        low = _window(jnp.minimum, low, 2 * d + 1, axis)
        high = _window(jnp.maximum, high, 2 * d + 1, axis)
    return low != high


def _window(reduce, values: jax.Array, size: int, axis: int) -> jax.Array:
    """`reduce` over every run of `size` entries along `axis`, by doubling: log2(size) passes instead of size."""

    def cut(array, start, length):
        return jax.lax.slice_in_dim(array, start, start + length, axis=axis)

    span, out = 1, values
    while span < size:
        step = min(span, size - span)
        length = out.shape[axis] - step
        out = reduce(cut(out, 0, length), cut(out, step, length))
        span += step
    return out
