"""Losses of dense classification, as sums with their weights, fused with the resize of the logits to the picture.

Two denominators are in use for the mean cross-entropy, and they train differently where much is ignored:

* `"all"`: every pixel counts in the denominator, ignored ones too. SETR and mmsegmentation's default
  (`avg_non_ignore=False`).
* `"valid"`: only scored pixels, each with its class's weight: PyTorch's `F.cross_entropy(..., ignore_index)`.

A label that is neither a class nor the ignore value makes the loss NaN, so that training stops at once instead of
learning from it; `check_data` shows such labels before.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.errors import UserError
from jax_densevit.models.output import DenseOutput
from jax_densevit.tasks.rows import sum_over_pixels
from jax_densevit.tasks.task import LossTerm

DENOMINATORS = ("all", "valid")
LOSSES = ("cross_entropy", "bce")


def heads(
    output: DenseOutput, name: str, auxiliary_weight: float | Sequence[float]
) -> dict[str, tuple[jax.Array, float]]:
    """{name of a loss term: (logits, coefficient)}: the main head's `name`, then "auxiliary_1", ...

    Raises:
      UserError: `auxiliary_weight` has other than one factor per auxiliary head (or one number for all).
    """
    weights = auxiliary_weight
    if not isinstance(weights, Sequence):
        weights = (weights,) * len(output.auxiliary)
    if len(weights) != len(output.auxiliary):
        raise UserError(
            f"task.auxiliary_weight has {len(weights)} factors, "
            f"but the model has {len(output.auxiliary)} auxiliary heads."
        )
    auxiliary = zip(output.auxiliary, weights, strict=True)
    return {name: (output.logits, 1.0)} | {f"auxiliary_{i + 1}": head for i, head in enumerate(auxiliary)}


def segmentation_loss(
    logits: jax.Array,
    labels: jax.Array,
    covers: tuple[int, int],
    *,
    loss: str = "cross_entropy",
    denominator: str = "all",
    ignore: int = 255,
    class_weights: Sequence[float] = (),
    coefficient: float = 1.0,
    rows: int = 0,
) -> LossTerm:
    """The loss of one head against the labels at their own resolution.

    Args:
      logits: `[B, h, w, K]` at the head's resolution.
      labels: integers `[B, H, W]`.
      covers: the (height, width) in label pixels that the logits stretch over; what lies beyond (H, W) is cut off.
      loss: "cross_entropy" (softmax over classes), or "bce": a sigmoid per class against the one-hot label, averaged
        over classes as well (mmsegmentation's `use_sigmoid`).
      denominator: "all" or "valid", see the module.
      ignore: the label value without a loss.
      class_weights: one factor per class on the loss of its pixels (cross-entropy) or of its channel (bce); empty = 1.
      coefficient: the factor of this term in the total.
      rows: output rows per block, 0 = automatic.
    """
    k = logits.shape[-1]
    weights = np.asarray(class_weights, np.float32) if len(class_weights) else np.ones(k, np.float32)
    if weights.shape != (k,):
        raise ValueError(f"{len(weights)} class weights for {k} classes")
    labels = labels.astype(jnp.int32)
    pixels = {"cross_entropy": cross_entropy, "bce": binary_cross_entropy}[loss]
    total = sum_over_pixels(
        lambda block, ids: pixels(block, ids, ignore, weights),
        logits.astype(jnp.float32),
        labels,
        covers,
        fill=ignore,
        rows=rows,
    ).sum()
    if denominator == "valid" and loss == "bce":
        weight = (labels != ignore).sum(dtype=jnp.float32)
    else:
        weight = pixel_weight(labels, denominator, ignore, weights)
    return LossTerm(total, weight, coefficient)


def pixel_weight(labels: jax.Array, denominator: str, ignore: int, weights: np.ndarray) -> jax.Array:
    """What a mean over pixels divides by, float32: their number ("all"), or the scored ones' class weights `[K]`."""
    if denominator == "all":
        return jnp.float32(labels.size)
    valid = (labels != ignore) & (labels >= 0) & (labels < len(weights))
    return jnp.where(valid, jnp.asarray(weights)[jnp.where(valid, labels, 0)], 0).sum()


def cross_entropy(logits: jax.Array, labels: jax.Array, ignore: int, weights: np.ndarray) -> jax.Array:
    """Sum of the weighted softmax cross-entropy over the pixels of each example: `[B, r, W, K], [B, r, W] -> [B]`."""
    one_hot, scored, known = _one_hot(labels, logits.shape[-1], ignore)
    picked = jnp.sum(jnp.where(one_hot, logits, 0), -1)
    weight = jnp.sum(jnp.where(one_hot, weights, 0), -1)  # 0 where ignored
    loss = weight * (jax.nn.logsumexp(logits, -1) - picked)
    return jnp.where(scored & ~known, jnp.nan, loss).sum((1, 2))


def binary_cross_entropy(logits: jax.Array, labels: jax.Array, ignore: int, weights: np.ndarray) -> jax.Array:
    """Sum over pixels of the mean over classes of the sigmoid cross-entropy: `[B, r, W, K], [B, r, W] -> [B]`."""
    one_hot, scored, known = _one_hot(labels, logits.shape[-1], ignore)
    loss = jnp.mean(weights * (jax.nn.softplus(logits) - jnp.where(one_hot, logits, 0)), -1)
    return jnp.where(scored, jnp.where(known, loss, jnp.nan), 0).sum((1, 2))


def _one_hot(labels: jax.Array, classes: int, ignore: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """bool `[..., K]` (nothing set where ignored), and whether each label is scored, and whether it is a class."""
    scored = labels != ignore
    one_hot = (labels[..., None] == jnp.arange(classes)) & scored[..., None]
    return one_hot, scored, (labels >= 0) & (labels < classes)
