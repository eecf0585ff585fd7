"""Masks in the coordinates of their boxes, pasted where the boxes are."""

import jax
import jax.numpy as jnp

OUTSIDE = -10.0  # the logit of a pixel beyond the box: a probability of 0.00005
_SMALLEST = 1e-6  # sides that a box is taken to have at least, in units of the image


def paste_masks(masks: jax.Array, boxes: jax.Array, size: tuple[int, int], outside: float = OUTSIDE) -> jax.Array:
    """Resamples masks from their boxes to the image, bilinearly.

    A pixel whose centre is in the box takes the mask there, interpolated between the centres of its cells and clamped
    at its border as in `resize.resize_bilinear`: a box that is the whole image gives just that resize.

    Args:
      masks: `[..., r, s]` float32 logits, row 0 at the top of the box.
      boxes: `[..., 4]` (cx, cy, w, h) in units of the image; they may protrude from it, and be empty.
      size: (height, width) of the result.
      outside: the value where the box is not.

    Returns:
      float32 `[..., *size]`. Its gradient reaches the masks; boxes are learned by their own losses, so none reaches
      them.
    """
    boxes = jax.lax.stop_gradient(boxes.astype(jnp.float32))
    rows, in_rows = _resampling(masks.shape[-2], boxes[..., 1], boxes[..., 3], size[0])
    columns, in_columns = _resampling(masks.shape[-1], boxes[..., 0], boxes[..., 2], size[1])
    pasted = jnp.einsum("...yr,...rs,...xs->...yx", rows, masks.astype(jnp.float32), columns, precision="highest")
    return jnp.where(in_rows[..., :, None] & in_columns[..., None, :], pasted, outside)


def _resampling(given: int, centre: jax.Array, side: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Weights `[..., length, given]` of the cells for each pixel of an axis, and whether its centre is in the box."""
    pixel = (jnp.arange(length) + 0.5) / length
    offset = pixel - centre[..., None]
    inside = jnp.abs(offset) <= side[..., None] / 2
    share = offset / jnp.maximum(side[..., None], _SMALLEST) + 0.5
    place = jnp.clip(share * given - 0.5, 0, given - 1)
    return jnp.maximum(1 - jnp.abs(place[..., None] - jnp.arange(given)), 0), inside
