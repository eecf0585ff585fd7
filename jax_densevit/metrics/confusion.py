"""Confusion matrix of a segmentation and the scores read from it, accumulated over the whole data set.

`IoU_c = TP / (TP + FP + FN)` from one matrix for all images (the mean of per-image scores is another number). Pixels
whose label is `ignore` count nothing at all; predictions are never ignored: an id outside the classes is a miss of the
true class, kept in an extra column. A class absent from labels and predictions has no score (None) and is left out of
means; a class predicted but never labelled scores 0. These are the conventions of Cityscapes and of mmsegmentation.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.errors import UserError
from jax_densevit.metrics.metric import State


class ConfusionMatrix:
    """Streaming confusion matrix, rows = labels, columns = predictions (the last column: ids that are no class).

    Args:
      classes: the class names; their number is K.
      ignore: the label value that is not scored.
    """

    def __init__(self, classes: Sequence[str], ignore: int = 255):
        self.classes = tuple(classes)
        self.ignore = ignore

    def empty(self) -> State:
        """`matrix` int64 [K, K + 1], `valid` and `unknown` int64 []."""
        k = len(self.classes)
        return {
            "matrix": np.zeros((k, k + 1), np.int64),
            "valid": np.zeros((), np.int64),
            "unknown": np.zeros((), np.int64),
        }

    def measure(
        self, labels: jax.Array, predictions: jax.Array, mask: jax.Array | None = None, size: Any = None
    ) -> State:
        """Counts of one batch, int32; runs inside `jit`.

        Args:
          labels: integers `[B, H, W]`.
          predictions: integers `[B, H, W]`.
          mask: bool `[B]`; examples where it is False count nothing. None counts all.
          size: not needed: where arrays are larger than their pictures, labels are `ignore` beyond.
        """
        if labels.size >= 2**31:
            raise ValueError(f"a batch of {labels.size} pixels does not fit int32 counts")
        k = len(self.classes)
        labels, predictions = labels.astype(jnp.int32), predictions.astype(jnp.int32)
        scored = labels != self.ignore
        if mask is not None:
            scored &= mask[:, None, None]
        known = (labels >= 0) & (labels < k)
        valid = scored & known
        # Every bin is computed from ids that were checked: bincount would put negative ids into class 0.
        column = jnp.where((predictions >= 0) & (predictions < k), predictions, k)
        bins = jnp.where(valid, labels * (k + 1) + column, k * (k + 1))
        # Per example first: a batch sharded over devices is counted where it lies.
        counts = jax.vmap(lambda b: jnp.zeros(k * (k + 1) + 1, jnp.int32).at[b].add(1))(bins.reshape(len(bins), -1))
        return {
            "matrix": counts.sum(0)[:-1].reshape(k, k + 1),
            "valid": valid.sum(dtype=jnp.int32),
            "unknown": (scored & ~known).sum(dtype=jnp.int32),
        }

    def merge(self, a: State, b: State) -> State:
        """The sum, in int64 on the host; refuses counts that cannot be right."""
        merged = {key: np.asarray(a[key], np.int64) + np.asarray(b[key], np.int64) for key in a}
        if merged["unknown"]:
            raise UserError(
                f"The labels hold {merged['unknown']} pixels whose id is neither a class (0..{len(self.classes) - 1}) "
                f"nor the ignore value {self.ignore}: map the ids of the data source (id_map, reduce_zero_label), "
                "and run check_data to see which ids there are."
            )
        if merged["matrix"].sum() != merged["valid"]:
            raise RuntimeError(f"{merged['matrix'].sum()} pixels were counted where {merged['valid']} are valid")
        return merged

    def compute(self, state: State) -> dict[str, Any]:
        """Scores in [0, 1] (None where undefined), `per_class` rows with pixel counts, and the matrix itself."""
        matrix = np.asarray(state["matrix"], np.int64)
        truth, k = matrix.sum(1), len(self.classes)
        hits, predicted = np.diag(matrix[:, :k]), matrix[:, :k].sum(0)
        union, total = truth + predicted - hits, truth.sum()
        scores = {
            "IoU": _ratio(hits, union),
            "accuracy": _ratio(hits, truth),
            "precision": _ratio(hits, predicted),
            "dice": _ratio(2 * hits, truth + predicted),
        }
        share = _ratio(truth, total)
        iou = np.where(np.isnan(scores["IoU"]), 0, scores["IoU"])
        return {
            "mIoU": _mean(scores["IoU"]),
            "mean_accuracy": _mean(scores["accuracy"]),
            "pixel_accuracy": _plain(_ratio(hits.sum(), total)),
            "fwIoU": _plain(np.sum(share * iou)),
            "mean_dice": _mean(scores["dice"]),
            "pixels": int(total),
            "predicted_outside_classes": int(matrix[:, k].sum()),
            "per_class": [
                {
                    "class": name,
                    **{key: _plain(values[i]) for key, values in scores.items()},
                    "pixels": int(truth[i]),
                    "predicted_pixels": int(predicted[i]),
                }
                for i, name in enumerate(self.classes)
            ],
            "confusion": matrix.tolist(),
        }


def _ratio(numerator, denominator) -> np.ndarray:
    """Quotient in float64, NaN for 0/0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def _mean(values: np.ndarray) -> float | None:
    """Mean over the defined values; None when there is none."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else None


def _plain(value) -> float | None:
    """A JSON number, None for NaN."""
    return None if np.isnan(value) else float(value)
