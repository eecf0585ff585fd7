"""Accuracy of the classes of matched objects and Dice of their masks, as the study of scattered digits reports them.

Every true object is matched to one prediction beforehand, whatever its score; it is right when the likeliest class of
that prediction, "no object" being one, is its own. An object without a prediction is wrong, and its Dice loss is 1.
The report does not say on which masks it computes Dice; here masks are cut at one half, at the size of the picture.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.metrics.metric import State

_COUNTS = ("label", "right", "both", "areas")


class MatchedObjects:
    """Streaming accuracy and Dice loss, `1 - (2 both + 1) / (areas + 1)`, per class and over all objects.

    Args:
      classes: the class names.
    """

    def __init__(self, classes: Sequence[str]):
        self.classes = tuple(classes)

    def empty(self) -> State:
        """int64 [objects]: "label", "right" (0 or 1), "both" and "areas" in pixels."""
        return {name: np.zeros(0, np.int64) for name in _COUNTS}

    def measure(
        self,
        overlaps: dict[str, jax.Array],
        predicted_class: jax.Array,
        truth_class: jax.Array,
        prediction: jax.Array,
        mask: jax.Array | None = None,
    ) -> State:
        """Counts of one batch, int32; runs inside `jit`.

        Args:
          overlaps: from `overlaps.py`.
          predicted_class: int `[B, N]`, the likeliest; any number that is no class stands for "no object".
          truth_class: int `[B, T]`, 0..K-1; another number makes a slot empty.
          prediction: int `[B, T]`: of each object, -1 for none.
          mask: bool `[B]`; examples where it is False count nothing. None counts all.
        """
        at = jnp.maximum(prediction, 0)
        none = prediction < 0
        both = jnp.where(none, 0, jnp.take_along_axis(overlaps["both"], at[:, None], 1)[:, 0])
        area = jnp.where(none, 0, jnp.take_along_axis(overlaps["predicted_area"], at, 1))
        answer = jnp.where(none, -1, jnp.take_along_axis(predicted_class, at, 1))
        counts = (truth_class >= 0) & (truth_class < len(self.classes)) & (overlaps["truth_area"] > 0)
        if mask is not None:
            counts &= mask[:, None]
        values = {
            "label": jnp.where(counts, truth_class, -1),
            "right": answer == truth_class,
            "both": both,
            "areas": area + overlaps["truth_area"],
        }
        return {name: value.astype(jnp.int32).reshape(-1) for name, value in values.items()}

    def merge(self, a: State, b: State) -> State:
        """The objects of both; takes what `measure` returned, too."""
        kept = [np.asarray(state["label"]) >= 0 for state in (a, b)]
        return {
            name: np.concatenate([np.asarray(s[name], np.int64)[keep] for s, keep in zip((a, b), kept, strict=True)])
            for name in _COUNTS
        }

    def compute(self, state: State) -> dict[str, Any]:
        """`accuracy` and `dice_loss` in [0, 1] over all objects (None without any), their number, and `per_class`."""
        state = self.merge(self.empty(), state)
        loss = 1 - (2 * state["both"] + 1) / (state["areas"] + 1)

        def scores(mine: np.ndarray) -> dict[str, Any]:
            count = int(mine.sum())
            return {
                "objects": count,
                "accuracy": float(state["right"][mine].mean()) if count else None,
                "dice_loss": math.fsum(loss[mine]) / count if count else None,
            }

        rows = [{"class": name, **scores(state["label"] == i)} for i, name in enumerate(self.classes)]
        return {**scores(state["label"] >= 0), "per_class": rows}
