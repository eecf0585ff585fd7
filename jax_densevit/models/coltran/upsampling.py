"""Values from ColTran's upsamplers: all sub-pixels at once, the three channels as one batch.

The pipeline is `sampling.sample_colors`, `bits.from_symbols`, the color upsampler, the spatial upsampler. Published
pictures take the likeliest value in both upsamplers, so that all chance lies in the colorizer.
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

    Holds the logits of all sub-pixels: 201 MB a picture of 256 x 256, and less than that of anything else but the
    model's own activations.

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
    values = jnp.repeat(jnp.repeat(jnp.moveaxis(coarse, -1, 1), height // rows, 2), width // columns, 3)
    channels = jnp.broadcast_to(jnp.arange(3), (gray.shape[0], 3))
    logits = model.apply({"params": params}, values, gray, channels).logits
    if keys is None:
        drawn = jnp.argmax(logits, -1).astype(jnp.int32)
    else:
        streams = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, jnp.uint32(_STREAM + model.bits))
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(streams)
        drawn = choose(logits, noise, temperature, top_k)
    return jnp.moveaxis(drawn, 1, -1)
