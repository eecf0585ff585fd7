"""Areas and intersections of predicted and true masks: all that average precision needs to know of pixels."""

from typing import Any

import jax
import jax.numpy as jnp

_BLOCK_BYTES = 8 * 2**20


def mask_overlaps(
    predicted: jax.Array, truth: jax.Array, void: jax.Array | None = None, mask: jax.Array | None = None
) -> dict[str, Any]:
    """Counts of pixels, int32; runs inside `jit`. One matrix product per image, exact below 2**24 pixels.

    Args:
      predicted: bool `[B, N, H, W]`; masks may overlap.
      truth: bool `[B, T, H, W]`; masks may overlap.
      void: bool `[B, H, W]`: pixels whose truth is unknown. None: none are.
      mask: bool `[B]`; examples where it is False count nothing. None counts all.

    Returns:
      `both` `[B, N, T]`, `predicted_area` `[B, N]`, `truth_area` `[B, T]`, `void_area` `[B, N]`: of the
      prediction, on void.

    Raises:
      ValueError: masks too large to be counted exactly.
    """
    pixels = truth.shape[2] * truth.shape[3]
    if pixels >= 2**24:
        raise ValueError(f"float32 does not count the {pixels} pixels of a mask")
    batch, slots = predicted.shape[:2]
    if void is None:
        void = jnp.zeros((batch, 1, pixels), bool)
    everywhere = jnp.ones((batch, 1, pixels), bool)
    right = jnp.concatenate([truth.reshape(*truth.shape[:2], pixels), void.reshape(batch, 1, pixels), everywhere], 1)
    left = predicted.reshape(batch, slots, pixels)
    if mask is not None:
        left, right = left & mask[:, None, None], right & mask[:, None, None]
    # Zeros and ones are exact in any type; sums are float32.
    kind = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    product = jnp.einsum(
        "bnp,btp->bnt", left.astype(kind), right.astype(kind), preferred_element_type=jnp.float32, precision="highest"
    )
    counts = product.astype(jnp.int32)
    return {
        "both": counts[:, :, :-2],
        "predicted_area": counts[:, :, -1],
        "truth_area": right[:, :-2].sum(2, dtype=jnp.int32),
        "void_area": counts[:, :, -2],
    }


def map_overlaps(
    predicted: jax.Array, truth: jax.Array, slots: int, void: jax.Array | None = None, mask: jax.Array | None = None
) -> dict[str, Any]:
    """The counts of :func:`mask_overlaps` where true objects do not overlap: no mask of one of them is ever made.

    Args:
      predicted: bool `[B, H, W, N]`; masks may overlap.
      truth: int `[B, H, W]`: s + 1 for the object in slot s, 0 for none.
      slots: T.
      void, mask: as in :func:`mask_overlaps`.
    """
    batch, height, width, count = predicted.shape
    bins = jnp.where((truth > 0) & (truth <= slots), truth, 0).astype(jnp.int32)
    bins = bins if void is None else jnp.where(void & (bins == 0), slots + 1, bins)
    bins = bins if mask is None else jnp.where(mask[:, None, None], bins, slots + 2)  # counted, and left out
    rows = max(1, min(height, _BLOCK_BYTES // (4 * width * max(count, 1))))
    blocks = -(-height // rows)
    more = ((0, 0), (0, blocks * rows - height), (0, 0))
    bins = jnp.pad(bins, more, constant_values=slots + 2).reshape(batch, blocks, -1)
    masks = jnp.pad(predicted, (*more, (0, 0))).reshape(batch, blocks, -1, count)

    def of_image(image):
        def add(table, block):
            ids, inside = block
            # The last column counts pixels.
            ones = jnp.pad(inside, ((0, 0), (0, 1)), constant_values=True).astype(jnp.int32)
            return table.at[ids].add(ones), None

        return jax.lax.scan(add, jnp.zeros((slots + 3, count + 1), jnp.int32), image)[0]

    table = jax.vmap(of_image)((bins, masks))[:, : slots + 2]
    return {
        "both": table[:, 1 : slots + 1, :count].swapaxes(1, 2),
        "predicted_area": table[:, :, :count].sum(1),
        "truth_area": table[:, 1 : slots + 1, count],
        "void_area": table[:, slots + 1, :count],
    }
