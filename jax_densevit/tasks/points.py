"""Masks compared at sampled points instead of at every pixel (PointRend, Kirillov et al. 2020; Mask2Former).

12,544 points instead of whole masks take a third of the memory (Mask2Former: 6 against 18 GB) and cost no accuracy.
Points are (x, y) in [0, 1] over the map; sampling is bilinear with pixel centres at half integers and zeros outside, so
that points within half a pixel of the border fade to a logit of 0, as in PyTorch's `grid_sample(align_corners=False)`.
"""

import jax
import jax.numpy as jnp


def sample(maps: jax.Array, points: jax.Array) -> jax.Array:
    """The values of maps at points, float32: `[..., H, W], [..., P, 2] -> [..., P]`; leading axes broadcast."""
    height, width = maps.shape[-2:]
    place = points.astype(jnp.float32) * jnp.array([width, height], jnp.float32) - 0.5
    low = jnp.floor(place)
    part, low = place - low, low.astype(jnp.int32)
    lead = jnp.broadcast_shapes(maps.shape[:-2], points.shape[:-2])
    flat = jnp.broadcast_to(maps.reshape(*maps.shape[:-2], -1), (*lead, height * width))
    total = jnp.zeros((*lead, points.shape[-2]), jnp.float32)
    for right in (0, 1):
        for below in (0, 1):
            x, y = low[..., 0] + right, low[..., 1] + below
            share = jnp.abs(1 - right - part[..., 0]) * jnp.abs(1 - below - part[..., 1])
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            index = jnp.where(inside, y * width + x, 0)
            # An index axis of length 1 is broadcast by the gather, not copied: points shared by all masks of an image.
            index = index.reshape(*(1,) * (len(lead) + 1 - index.ndim), *index.shape)
            value = jnp.take_along_axis(flat, index, -1).astype(jnp.float32)
            total += jnp.where(inside, share, 0) * value
    return total


def random_points(key: jax.Array, lead: tuple[int, ...], count: int) -> jax.Array:
    """Uniform points, float32 `[*lead, count, 2]`. A matching uses `lead = (B, 1)`: the same for all masks."""
    return jax.random.uniform(key, (*lead, count, 2))


def uncertain_points(
    key: jax.Array, logits: jax.Array, count: int, *, oversample: float = 3.0, importance: float = 0.75
) -> jax.Array:
    """Points where the masks are undecided, and some anywhere: `[..., H, W] -> [..., count, 2]`, without a gradient.

    Args:
      key: of the random numbers.
      logits: masks, each with points of its own.
      count: of points.
      oversample: so many times `count` random points are looked at; the ones with the smallest |logit| are taken.
      importance: the share of `count` taken that way; the rest is uniform.
    """
    lead, chosen = logits.shape[:-2], int(importance * count)
    some, rest = jax.random.split(key)
    candidates = random_points(some, lead, max(int(oversample * count), chosen))
    doubt = -jnp.abs(sample(jax.lax.stop_gradient(logits), candidates))
    index = jax.lax.top_k(doubt, chosen)[1]
    picked = jnp.take_along_axis(candidates, index[..., None], -2)
    return jnp.concatenate([picked, random_points(rest, lead, count - chosen)], -2)
