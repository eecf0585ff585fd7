"""Losses of matched queries: masks, classes and boxes, as sums with their weights.

Mask and box losses compare what the query of each target says (:func:`matched`) with the target. They are summed over
the matched targets and divided by their number in the whole global batch, as in DETR and its successors; the loss of a
mask is its mean over pixels (BCE, focal) or one number (Dice). A batch without objects has weight 0 there: no loss, no
gradient; its queries still learn "no object". Masks come flattened, `[B, T, N]`: N pixels, or points sampled by
`points.py`.

Every loss is NaN when a cost of the matching was not finite, so that training stops instead of learning from what is
left.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.tasks.matching import Assignment, target_of_query
from jax_densevit.tasks.task import LossTerm


def matched(values: jax.Array, assignment: Assignment) -> jax.Array:
    """What each target's query says: `[B, Q, ...] -> [B, T, ...]` (what query 0 says, where there is none)."""
    query = assignment.query
    index = jnp.maximum(query, 0).reshape(*query.shape, *(1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, index, 1)


def dice_loss(
    logits: jax.Array, targets: jax.Array, assignment: Assignment, *, squared: bool = False, coefficient: float = 1.0
) -> LossTerm:
    """`1 - (2 p.t + 1) / (|p| + |t| + 1)` of each matched pair, p the sigmoid of its logits.

    Args:
      logits: `[B, T, N]` of the targets' queries.
      targets: `[B, T, N]` in [0, 1].
      assignment: says which targets count.
      squared: squares in the denominator (V-Net, Milletari et al. 2016) instead of DETR's form.
      coefficient: the factor of this term in the total.
    """
    p, t, p_size, t_size = dice_parts(logits, targets, squared)
    return _term(1 - (2 * (p * t).sum(-1) + 1) / (p_size + t_size + 1), assignment, coefficient)


def mask_bce_loss(
    logits: jax.Array, targets: jax.Array, assignment: Assignment, *, coefficient: float = 1.0
) -> LossTerm:
    """The mean over pixels of the sigmoid cross-entropy of each matched pair; arguments as in :func:`dice_loss`."""
    x, t = logits.astype(jnp.float32), targets.astype(jnp.float32)
    return _term((jax.nn.softplus(x) - x * t).mean(-1), assignment, coefficient)


def focal_loss(
    logits: jax.Array,
    targets: jax.Array,
    assignment: Assignment,
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
    coefficient: float = 1.0,
) -> LossTerm:
    """The mean over pixels of the sigmoid focal loss (Lin et al. 2017); arguments as in :func:`dice_loss`."""
    on, off = focal_parts(logits, alpha, gamma)
    t = targets.astype(jnp.float32)
    return _term((on * t + off * (1 - t)).mean(-1), assignment, coefficient)


def class_loss(
    logits: jax.Array,
    labels: jax.Array,
    assignment: Assignment,
    *,
    no_object: float = 0.1,
    coefficient: float = 1.0,
) -> LossTerm:
    """Softmax cross-entropy of every query: its target's class, or "no object"; a mean weighted as PyTorch's.

    Args:
      logits: `[B, Q, K + 1]`, the last for "no object".
      labels: int `[B, T]`.
      assignment: of the same queries and targets.
      no_object: the weight of "no object" (DETR 0.1; the study of digit scenes 0.5).
      coefficient: the factor of this term in the total.

    A label of a matched target that is no class makes the loss NaN.
    """
    k = logits.shape[-1] - 1
    weights = np.append(np.ones(k, np.float32), np.float32(no_object))
    target = target_of_query(assignment.query, logits.shape[1])
    label = jnp.take_along_axis(labels.astype(jnp.int32), jnp.maximum(target, 0), 1) if labels.shape[1] else target
    wrong = (target >= 0) & ((label < 0) | (label >= k))
    one_hot = jnp.where(target >= 0, label, k)[..., None] == jnp.arange(k + 1)
    weight = jnp.where(one_hot, weights, 0).sum(-1)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    loss = -weight * jnp.where(one_hot, log_p, 0).sum(-1)
    wrong |= ~assignment.finite[:, None]
    return LossTerm(jnp.where(wrong, jnp.nan, loss).sum(), weight.sum(), coefficient)


def box_l1_loss(boxes: jax.Array, targets: jax.Array, assignment: Assignment, *, coefficient: float = 1.0) -> LossTerm:
    """The sum of the four absolute differences of matched boxes, `[B, T, 4]` as (cx, cy, w, h) in [0, 1]."""
    difference = boxes.astype(jnp.float32) - targets.astype(jnp.float32)
    return _term(jnp.abs(difference).sum(-1), assignment, coefficient)


def box_giou_loss(
    boxes: jax.Array, targets: jax.Array, assignment: Assignment, *, coefficient: float = 1.0
) -> LossTerm:
    """`1 - GIoU` (Rezatofighi et al. 2019) of matched boxes, `[B, T, 4]` as (cx, cy, w, h)."""
    return _term(1 - generalized_iou(boxes, targets), assignment, coefficient)


def generalized_iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """`IoU - (hull - union) / hull` of boxes `[..., 4]` as (cx, cy, w, h), broadcast; finite for empty boxes."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    (a_low, a_high), (b_low, b_high) = _corners(a), _corners(b)
    common = _area(jnp.minimum(a_high, b_high) - jnp.maximum(a_low, b_low))
    hull = _area(jnp.maximum(a_high, b_high) - jnp.minimum(a_low, b_low))
    union = _area(a_high - a_low) + _area(b_high - b_low) - common
    return _quotient(common, union) - _quotient(hull - union, hull)


def dice_parts(
    logits: jax.Array, targets: jax.Array, squared: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Probabilities, targets, and the size of each over the last axis, float32."""
    p, t = jax.nn.sigmoid(logits.astype(jnp.float32)), targets.astype(jnp.float32)
    return p, t, (p * p if squared else p).sum(-1), (t * t if squared else t).sum(-1)


def focal_parts(logits: jax.Array, alpha: float, gamma: float) -> tuple[jax.Array, jax.Array]:
    """The focal loss of each pixel if it belongs to the mask, and if it does not; a negative `alpha` weighs none."""
    x = logits.astype(jnp.float32)
    on = jax.nn.sigmoid(-x) ** gamma * jax.nn.softplus(-x)
    off = jax.nn.sigmoid(x) ** gamma * jax.nn.softplus(x)
    return (on, off) if alpha < 0 else (alpha * on, (1 - alpha) * off)


def _term(per_target: jax.Array, assignment: Assignment, coefficient: float) -> LossTerm:
    """The sum over matched targets, and their number."""
    counts = assignment.query >= 0
    total = jnp.where(counts, per_target, 0).sum(-1)
    total = jnp.where(assignment.finite, total, jnp.nan).sum()
    return LossTerm(total, counts.sum(dtype=jnp.float32), coefficient)


def _corners(boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return centre - half, centre + half


def _area(sides: jax.Array) -> jax.Array:
    sides = jnp.maximum(sides, 0)
    return sides[..., 0] * sides[..., 1]


def _quotient(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a / b`, 0 with a gradient of 0 where nothing is divided by."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
