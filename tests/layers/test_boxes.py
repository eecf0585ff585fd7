"""Masks in boxes: a whole box is a plain resize, others are that resize in their window, and no box is too small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.layers.boxes import OUTSIDE, paste_masks
from jax_densevit.layers.resize import resize_bilinear

MASKS = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)


def boxes(*values):
    return jnp.broadcast_to(jnp.asarray(values, jnp.float32), (2, 3, 4))


@pytest.mark.parametrize("size", [(16, 20), (9, 7), (3, 2)])
def test_the_whole_image_is_a_plain_resize(size):
    pasted = paste_masks(MASKS, boxes(0.5, 0.5, 1, 1), size)
    np.testing.assert_allclose(pasted, resize_bilinear(MASKS[..., None], size)[..., 0], atol=1e-5)


def test_a_part_of_it_is_that_resize_in_its_window():
    """Columns 4..16 of 20, rows 2..10 of 10, as (cx, cy, w, h)."""
    pasted = np.array(paste_masks(MASKS, boxes(0.5, 0.6, 0.6, 0.8), (10, 20)))
    inner = resize_bilinear(MASKS[..., None], (8, 12))[..., 0]
    np.testing.assert_allclose(pasted[..., 2:10, 4:16], inner, atol=1e-4)
    pasted[..., 2:10, 4:16] = OUTSIDE
    assert (pasted == OUTSIDE).all()


def test_each_mask_has_its_own_box_and_may_protrude():
    own = jnp.stack([boxes(0.5, 0.5, 1, 1)[:, 0], boxes(0.0, 0.5, 1, 1)[:, 0], boxes(2, 2, 1, 1)[:, 0]], 1)
    pasted = paste_masks(MASKS, own, (8, 10))
    np.testing.assert_allclose(pasted[:, 0], paste_masks(MASKS, boxes(0.5, 0.5, 1, 1), (8, 10))[:, 0])
    # Half of it is beyond the left border: what is seen is the right half of the mask.
    whole = resize_bilinear(MASKS[:, 1, ..., None], (8, 10))[..., 0]
    np.testing.assert_allclose(pasted[:, 1, :, :5], whole[..., 5:], atol=1e-5)
    assert (pasted[:, 1, :, 5:] == OUTSIDE).all() and (pasted[:, 2] == OUTSIDE).all()


@pytest.mark.parametrize("side", [0.0, 1e-30, 1e-9, 1e-3, 0.05])
def test_tiny_boxes_are_finite_and_so_are_their_gradients(side):
    at = boxes(0.45, 0.45, side, side)  # around the centre of a pixel of ten
    value, gradients = jax.value_and_grad(lambda m, b: jnp.square(paste_masks(m, b, (10, 10))).sum(), (0, 1))(
        jnp.asarray(MASKS), at
    )
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
    assert not np.asarray(gradients[1]).any()  # boxes are learned by their own losses
    assert (np.asarray(paste_masks(MASKS, at, (10, 10))) != OUTSIDE).sum() <= 6
    between = paste_masks(MASKS, boxes(0.5, 0.5, side, side), (10, 10))  # of a box between the centres nothing is seen
    assert np.isfinite(between).all() and (between == OUTSIDE).all() == (side < 0.1)
