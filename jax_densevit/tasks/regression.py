"""Losses of dense regression, as sums with their weights, fused with the resize of the outputs to the picture."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.tasks.rows import sum_over_pixels
from jax_densevit.tasks.task import LossTerm

LOSSES = ("charbonnier", "l1", "l2")


def distance(difference: jax.Array, loss: str, epsilon: float) -> jax.Array:
    """The loss of every difference: "l1" |d|, "l2" d^2, "charbonnier" sqrt(d^2 + epsilon^2) (Charbonnier 1994)."""
    if loss == "charbonnier":
        return jnp.sqrt(difference**2 + np.float32(epsilon**2))
    return jnp.abs(difference) if loss == "l1" else difference**2


def regression_loss(
    outputs: jax.Array,
    images: jax.Array,
    inside: jax.Array,
    covers: tuple[int, int],
    difference: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    loss: str = "charbonnier",
    epsilon: float = 1e-3,
    coefficient: float = 1.0,
    rows: int = 0,
) -> LossTerm:
    """The loss of one head against pictures at their own resolution; its mean is over pixels and channels.

    Args:
      outputs: `[B, h, w, K]` at the head's resolution.
      images: uint8 `[B, H, W, 3]`.
      inside: bool `[B, H, W]`: what is no padding.
      covers: the (height, width) in pixels that the outputs stretch over; what lies beyond (H, W) is cut off.
      difference: from outputs `[B, r, W, K]` and pixels uint8 `[B, r, W, 3]` to what the loss is of, `[B, r, W, K]`.
      loss, epsilon: see :func:`distance`.
      coefficient: the factor of this term in the total.
      rows: output rows per block, 0 = automatic.
    """
    outputs = outputs.astype(jnp.float32)
    height, width = images.shape[1:3]
    targets = jnp.concatenate([images, inside[..., None].astype(jnp.uint8)], -1)

    def pixels(block, targets):
        errors = distance(difference(block, targets[..., :3]), loss, epsilon).sum(-1)
        return jnp.where(targets[..., 3] > 0, errors, 0).sum((1, 2))

    if outputs.shape[1:3] == tuple(covers):  # nothing to enlarge
        total = pixels(outputs[:, :height, :width], targets)
    else:
        total = sum_over_pixels(pixels, outputs, targets, covers, fill=0, rows=rows)
    return LossTerm(total.sum(), outputs.shape[-1] * inside.sum(dtype=jnp.float32), coefficient)
