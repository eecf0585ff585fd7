"""Values from ColTran's upsamplers: all sub-pixels of a channel at once, the three channels one after the other.

The pipeline is `sampling.sample_colors`, `bits.from_symbols`, the color upsampler, the spatial upsampler. Published
pictures take the likeliest value in both upsamplers, so that all chance lies in the colorizer.

A channel of one 256 x 256 picture is 65,536 tokens, enough to fill any device; three at once would take three times the
memory (at full width 6 GB in float32).
"""

import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError
from jax_densevit.models.coltran.sampling import choose
from jax_densevit.models.coltran.upsampler import VALUES, Upsampler

# The colorizer folds the numbers of rows into a picture's key; here is what is never one.
_STREAM = 2**31


def sample_channels(
    model: Upsampler,
    params: dict,
    coarse: jax.Array,
    gray: jax.Array,
    keys: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    top_k: int = VALUES,
) -> jax.Array:
    """The colors that an upsampler makes of coarser ones. Pure: jit it over the arrays and `temperature`.

    Args:
      model: the upsampler; params: its parameters.
      coarse: int `[B, h, w, 3]`, values below `2^model.bits`. Every pixel is repeated to the size of `gray`, which is
        how the spatial upsampler was trained.
      gray: int `[B, H, W]` in 0..255, of the size the model is made for.
      keys: `[B]`, see `sampling.picture_keys`; None takes the likeliest values, as published.
      temperature, top_k: see `sampling.sample_colors`.

    Returns:
      int32 `[B, H, W, 3]` in 0..255.

    Raises:
      UserError: `gray` is not a whole multiple of `coarse`, or not of the model's size.
    """
    (height, width), (rows, columns) = gray.shape[1:], coarse.shape[1:3]
    if height % rows or width % columns:
        raise UserError(
            f"A gray picture of {height} x {width} is no whole multiple of the coarse picture's {rows} x {columns}; "
            "resize it to one."
        )
    values = jnp.repeat(jnp.repeat(jnp.moveaxis(coarse, -1, 0), height // rows, 2), width // columns, 3)
    if keys is not None:
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, jnp.uint32(_STREAM + model.bits))

    def channel(given):
        index, values = given
        channels = jnp.broadcast_to(index, (gray.shape[0], 1))
        logits = model.apply({"params": params}, values[:, None], gray, channels).logits[:, 0]
        if keys is None:
            return jnp.argmax(logits, -1).astype(jnp.int32)
        own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(own)
        return choose(logits, noise, temperature, top_k)

    return jnp.moveaxis(jax.lax.map(channel, (jnp.arange(3), values)), 0, -1)
