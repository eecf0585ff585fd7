"""Adjusted Rand index of the pixels of objects (Hubert and Arabie 1985), as object discovery reports it.

Background of the truth is left out; whatever is predicted there does not count. An image whose truth holds a single
object has no say: any answer that does not split it would score 1, so such images are averaged separately, and those
without an object not at all. The state keeps whole numbers per image.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.metrics.metric import State
from jax_densevit.metrics.panoptic import contingency


class AdjustedRandIndex:
    """Streaming foreground ARI, averaged over images.

    Args:
      truth_slots, predicted_slots: how many segments a map may hold at most, background not counted.
    """

    def __init__(self, truth_slots: int, predicted_slots: int):
        self.truth_slots, self.predicted_slots = truth_slots, predicted_slots

    def empty(self) -> State:
        """`sums` int64 [images, 5]: pixels, objects, and pairs of pixels together in both, truth and prediction."""
        return {"sums": np.zeros((0, 5), np.int64)}

    def measure(self, truth: jax.Array, predicted: jax.Array, mask: jax.Array | None = None) -> State:
        """Pixels of one batch, int32; runs inside `jit`.

        Args:
          truth, predicted: integers `[B, H, W]`, 0 background, segments from 1.
          mask: bool `[B]`; examples where it is False count nothing. None counts all.
        """
        tables = contingency(truth, predicted, self.truth_slots + 1, self.predicted_slots + 1)[:, 1:]
        return {"tables": tables if mask is None else jnp.where(mask[:, None, None], tables, 0)}

    def merge(self, a: State, b: State) -> State:
        """The images of both that hold an object; takes what `measure` returned, too."""
        return {"sums": np.concatenate([_sums(a), _sums(b)])}

    def compute(self, state: State) -> dict[str, Any]:
        """`ARI` over images of two objects or more, `ARI_of_all` over images of one or more, None where undefined."""
        sums = _sums(state)
        scores = [_adjusted_rand(*(int(n) for n in row)) for row in sums]
        several = [score for score, objects in zip(scores, sums[:, 1], strict=True) if objects > 1]
        return {
            "ARI": math.fsum(several) / len(several) if several else None,
            "ARI_of_all": math.fsum(scores) / len(scores) if scores else None,
            "images": len(scores),
        }


def _sums(state: State) -> np.ndarray:
    if "sums" in state:
        return state["sums"]
    tables = np.asarray(state["tables"], np.int64)
    tables = tables[tables.any((1, 2))]
    groups = (tables, tables.sum(2, keepdims=True), tables.sum(1, keepdims=True))
    pairs = [(n * (n - 1) // 2).sum((1, 2)) for n in groups]
    return np.stack([tables.sum((1, 2)), tables.any(2).sum(1), *pairs], 1)


def _adjusted_rand(pixels: int, objects: int, both: int, truth: int, predicted: int) -> float:
    """Of one image, in exact integers; 1 where both partitions are trivial in the same way."""
    pairs = pixels * (pixels - 1) // 2
    # (both - expected) / ((truth + predicted) / 2 - expected) with expected = truth * predicted / pairs
    above, below = 2 * (both * pairs - truth * predicted), (truth + predicted) * pairs - 2 * truth * predicted
    return above / below if below else 1.0
