"""Panoptic quality (Kirillov et al. 2019, "Panoptic Segmentation"), by the rules of panopticapi.

Per class over the whole data set: `PQ = sum of IoU over TP / (TP + FP / 2 + FN / 2) = SQ * RQ`, `SQ` the mean IoU of
true positives, `RQ = TP / (TP + FP / 2 + FN / 2)`.

* A predicted and a true segment of one class match when their IoU is strictly above 1/2, so at most one of each can.
* Void in the truth is taken out of the union: `|P| + |G| - |P and G| - |P and void|`. Void in the prediction is an
  error like any other, unlike in torchmetrics.
* True segments marked as crowd are never matched and never missed.
* An unmatched prediction is no false positive when strictly more than half of it lies on void or on crowd of its class.
  All crowd segments of an image count; panopticapi forgets all but the last of each class.
* Classes without TP, FP and FN are left out of the means.

True areas are counted from the map, where panopticapi believes the JSON. Decisions are made in whole numbers, and a
state keeps intersection and union of every true positive: any merging gives the same digits.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.metrics.metric import State

_PAIRS = ("tp_class", "tp_intersection", "tp_union")
_GROUPS = (("things", True), ("stuff", False))
_SCORES = ("PQ", "SQ", "RQ")


class PanopticQuality:
    """Streaming PQ, SQ and RQ per class, and their means over all classes, things and stuff.

    Args:
      classes: the class names; their number is K.
      things: of each class, whether it is countable.
    """

    def __init__(self, classes: Sequence[str], things: Sequence[bool]):
        if len(classes) != len(things):
            raise ValueError(f"{len(classes)} classes, but {len(things)} marks of things")
        self.classes, self.things = tuple(classes), tuple(bool(thing) for thing in things)

    def empty(self) -> State:
        """`tp_class`, `tp_intersection`, `tp_union` int64 [number of TP]; `fp`, `fn` int64 [K]."""
        k = len(self.classes)
        return {**{name: np.zeros(0, np.int64) for name in _PAIRS}, **{n: np.zeros(k, np.int64) for n in ("fp", "fn")}}

    def measure(
        self,
        truth: jax.Array,
        truth_class: jax.Array,
        truth_crowd: jax.Array,
        predicted: jax.Array,
        predicted_class: jax.Array,
        mask: jax.Array | None = None,
    ) -> State:
        """Matches and errors of one batch, int32; runs inside `jit`.

        Args:
          truth: integers `[B, H, W]`: 0 void, s + 1 for the segment in slot s; what lies beyond a picture is void.
          truth_class: int `[B, S]`: the class in slot s; what is in a slot without pixels does not matter.
          truth_crowd: bool `[B, S]`.
          predicted: integers `[B, H, W]`: 0 void, s + 1 for the segment in slot s.
          predicted_class: int `[B, N]`.
          mask: bool `[B]`; examples where it is False count nothing. None counts all.
        """
        k = len(self.classes)
        common = contingency(truth, predicted, truth_class.shape[1] + 1, predicted_class.shape[1] + 1)
        if mask is not None:
            common = jnp.where(mask[:, None, None], common, 0)
        truth_area, predicted_area = common.sum(2)[:, 1:], common.sum(1)[:, 1:]
        void, both = common[:, 0, 1:], common[:, 1:, 1:]
        same = truth_class[:, :, None] == predicted_class[:, None]
        union = truth_area[:, :, None] + predicted_area[:, None] - both - void[:, None]
        hit = same & ~truth_crowd[:, :, None] & (2 * both > union)
        on_crowd = jnp.where(same & truth_crowd[:, :, None], both, 0).sum(1)
        spurious = (predicted_area > 0) & ~hit.any(1) & (2 * (void + on_crowd) <= predicted_area)
        missed = (truth_area > 0) & ~truth_crowd & ~hit.any(2)

        def count(classes, where):
            bins = jnp.where(where & (classes >= 0) & (classes < k), classes, k)
            return jax.vmap(lambda b: jnp.zeros(k + 1, jnp.int32).at[b].add(1))(bins.astype(jnp.int32)).sum(0)[:k]

        hits = {
            "tp_class": jnp.broadcast_to(truth_class.astype(jnp.int32), hit.shape[:2]),
            "tp_intersection": jnp.where(hit, both, 0).sum(2),
            "tp_union": jnp.where(hit, union, 0).sum(2),
        }
        errors = {"fp": count(predicted_class, spurious), "fn": count(truth_class, missed)}
        return {name: values.reshape(-1) for name, values in hits.items()} | errors

    def merge(self, a: State, b: State) -> State:
        """The true positives of both, and the sums of the errors, in int64 on the host."""
        kept = [np.asarray(state["tp_union"]) > 0 for state in (a, b)]
        merged = {
            name: np.concatenate([np.asarray(s[name], np.int64)[keep] for s, keep in zip((a, b), kept, strict=True)])
            for name in _PAIRS
        }
        return merged | {name: np.asarray(a[name], np.int64) + np.asarray(b[name], np.int64) for name in ("fp", "fn")}

    def compute(self, state: State) -> dict[str, Any]:
        """`PQ`, `SQ`, `RQ` in [0, 1] (None where undefined), the same of `things` and `stuff`, and `per_class`."""
        rows = []
        for i, name in enumerate(self.classes):
            mine = (state["tp_class"] == i) & (state["tp_union"] > 0)
            iou = math.fsum(state["tp_intersection"][mine] / state["tp_union"][mine])
            tp, fp, fn = int(mine.sum()), int(state["fp"][i]), int(state["fn"][i])
            weight = tp + fp / 2 + fn / 2
            rows.append(
                {
                    "class": name,
                    "thing": self.things[i],
                    "PQ": iou / weight if weight else None,
                    "SQ": (iou / tp if tp else 0.0) if weight else None,
                    "RQ": tp / weight if weight else None,
                    "IoU_sum": iou,
                    "TP": tp,
                    "FP": fp,
                    "FN": fn,
                }
            )
        groups = {kind: [row for row in rows if row["thing"] == thing] for kind, thing in _GROUPS}
        return {**_means(rows), **{kind: _means(group) for kind, group in groups.items()}, "per_class": rows}


def contingency(first: jax.Array, second: jax.Array, rows: int, columns: int) -> jax.Array:
    """How many pixels carry each pair of ids: int `[B, H, W]` twice -> int32 `[B, rows, columns]`.

    Ids outside 0..rows-1 and 0..columns-1 count as 0.
    """
    first = jnp.where((first >= 0) & (first < rows), first, 0).astype(jnp.int32)
    second = jnp.where((second >= 0) & (second < columns), second, 0).astype(jnp.int32)
    bins = (first * columns + second).reshape(len(first), -1)
    # Per example: a batch sharded over devices is counted where it lies.
    counts = jax.vmap(lambda b: jnp.zeros(rows * columns, jnp.int32).at[b].add(1))(bins)
    return counts.reshape(-1, rows, columns)


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    defined = [row for row in rows if row["PQ"] is not None]
    means = {key: math.fsum(row[key] for row in defined) / len(defined) if defined else None for key in _SCORES}
    return means | {"classes": len(defined)}
