"""Colors of few bits and the gray of integer pictures, with the rounding that ColTran was trained with.

ColTran (Kumar et al. 2021, https://arxiv.org/abs/2102.04432) writes a coarse color as one of 512 symbols, three bits a
channel. All functions take JAX or NumPy integer arrays of any shape and answer in int32 unless they say otherwise.
"""

import jax
import jax.numpy as jnp
import numpy as np

# TensorFlow's weights. They sum to 0.9999: a neutral pixel of value v > 0 has the gray v - 1 once floored.
GRAY_WEIGHTS = np.array([0.2989, 0.587, 0.114], np.float32)


def convert_bits(x: jax.Array, source: int, target: int) -> jax.Array:
    """Values of `source` bits as values of `target` bits: fewer bits drop the low ones, more append zeros.

    So 8 -> 3 is `x // 32`, and 3 -> 8 gives the lower edge of the bin {0, 32, ..., 224}, not its middle.
    """
    x = jnp.asarray(x, jnp.int32)
    return x >> (source - target) if source >= target else x << (target - source)


def to_symbols(channels: jax.Array, bits: int = 3) -> jax.Array:
    """`[..., 3]` values of `bits` bits -> `[...]` symbols, red in the highest bits: `64 r + 8 g + b` for 3 bits."""
    red, green, blue = jnp.moveaxis(jnp.asarray(channels, jnp.int32), -1, 0)
    return (red << 2 * bits) | (green << bits) | blue


def from_symbols(symbols: jax.Array, bits: int = 3) -> jax.Array:
    """The inverse of :func:`to_symbols`: `[...]` -> `[..., 3]`."""
    symbols = jnp.asarray(symbols, jnp.int32)
    return jnp.stack([(symbols >> shift) & (2**bits - 1) for shift in (2 * bits, bits, 0)], -1)


def gray_from_int32(rgb: jax.Array) -> jax.Array:
    """The gray that ColTran is trained on: `floor(0.2989 R + 0.587 G + 0.114 B)` of 8-bit colors `[..., 3]`.

    That is `tf.image.rgb_to_grayscale` of an int32 picture, in float32 and bit for bit on any device. 255 never occurs.
    """
    return jnp.floor(_weighted(rgb, np.arange(256, dtype=np.float32))).astype(jnp.int32)


def _weighted(rgb: jax.Array, values: np.ndarray) -> jax.Array:
    """The weighted sum of looked-up `values`, in float32, red first.

    Products come from tables, because a compiler that fuses a product with a sum rounds once less: 21 of all 16.7
    million colors would then have another gray.
    """
    red, green, blue = (
        jnp.take(jnp.asarray(values * weight), jnp.asarray(rgb[..., i], jnp.int32), mode="clip")
        for i, weight in enumerate(GRAY_WEIGHTS)
    )
    return (red + green) + blue
