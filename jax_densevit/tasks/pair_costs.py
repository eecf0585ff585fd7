"""What it would cost to let a query answer for an object, for all pairs: `[B, Q, T]`, float32.

Costs of masks are matrix products of what is known of queries `[B, Q, N]` and of objects `[B, T, N]`, over the N pixels
or sampled points of a mask; nothing of the size of pairs times pixels is ever made. Terms are divided by the number of
pixels before the product, so that 16-bit inputs do not overflow. Costs follow DETR, MaskFormer and Mask2Former; masks
of padded targets should be zero, and the matcher skips them whatever they cost.
"""

import jax
import jax.numpy as jnp

from jax_densevit.tasks.mask_losses import dice_parts, focal_parts, generalized_iou


def dice_cost(logits: jax.Array, targets: jax.Array, squared: bool = False) -> jax.Array:
    """`1 - (2 p.t + 1) / (|p| + |t| + 1)` with p the sigmoid of `logits`.

    Args:
      logits: `[B, Q, N]`.
      targets: `[B, T, N]` in [0, 1].
      squared: as in :func:`mask_losses.dice_loss`.
    """
    p, t, p_size, t_size = dice_parts(logits, targets, squared)
    return 1 - (2 * _product(p, t) + 1) / (p_size[:, :, None] + t_size[:, None] + 1)


def bce_cost(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean over pixels of the sigmoid cross-entropy. `logits [B, Q, N]`, `targets [B, T, N]`."""
    x = logits.astype(jnp.float32)
    return _mean_of_either(jax.nn.softplus(-x), jax.nn.softplus(x), targets)


def focal_cost(logits: jax.Array, targets: jax.Array, alpha: float = 0.25, gamma: float = 2.0) -> jax.Array:
    """The mean over pixels of the sigmoid focal loss (Lin et al. 2017). `logits [B, Q, N]`, `targets [B, T, N]`."""
    return _mean_of_either(*focal_parts(logits, alpha, gamma), targets)


def class_cost(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Minus the probability of each object's class.

    Args:
      logits: `[B, Q, K + 1]`, the last for "no object".
      labels: int `[B, T]` in 0..K-1; padding may hold anything.
    """
    known = jnp.clip(labels.astype(jnp.int32), 0, logits.shape[-1] - 1)
    return -_product(jax.nn.softmax(logits.astype(jnp.float32), -1), jax.nn.one_hot(known, logits.shape[-1]))


def box_l1_cost(boxes: jax.Array, targets: jax.Array) -> jax.Array:
    """The sum of the four absolute differences. Boxes `[B, Q, 4]`, `[B, T, 4]` as (cx, cy, w, h) in [0, 1]."""
    boxes, targets = boxes.astype(jnp.float32), targets.astype(jnp.float32)
    return sum(jnp.abs(boxes[:, :, None, i] - targets[:, None, :, i]) for i in range(4))


def box_giou_cost(boxes: jax.Array, targets: jax.Array) -> jax.Array:
    """`-GIoU`. Boxes `[B, Q, 4]`, `[B, T, 4]` as (cx, cy, w, h)."""
    return -generalized_iou(boxes[:, :, None], targets[:, None])


def _mean_of_either(on: jax.Array, off: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean over pixels of `on t + off (1 - t)`: two products, as `off + (on - off) t` would cancel."""
    t, pixels = targets.astype(jnp.float32), on.shape[-1]
    return _product(on / pixels, t) + _product(off / pixels, 1 - t)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum("bqn,btn->bqt", a, b, precision="highest", preferred_element_type=jnp.float32)
