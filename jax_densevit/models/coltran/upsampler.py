"""ColTran's second and third stage: more bits, then more pixels (Kumar et al. 2021, https://arxiv.org/abs/2102.04432).

Both are one network over each color channel by itself, with the same weights, conditioned on the gray picture. The
color upsampler turns 3 bits a channel into 8 at 64 x 64; the spatial upsampler turns a 64 x 64 picture, every pixel
repeated 4 x 4, into one of 256 x 256. Training takes one random channel a picture, prediction all three.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.layers.fields import shared_fields
from jax_densevit.models.coltran.colorizer import SMALL, TINY, square_or_pair
from jax_densevit.models.coltran.conditional import INITIALIZERS
from jax_densevit.models.coltran.stack import ENCODER, AxialStack, stack_macs
from jax_densevit.models.output import ChannelOutput
from jax_densevit.models.registry import register_model

VALUES = 256  # of a channel of the result


def _macs(model: "Upsampler", size: tuple[int, int]) -> int:
    """Of all three channels. The embeddings' projection is one of tables, not of pixels, and counts next to nothing."""
    one = stack_macs(model.num_layers, ENCODER, model.hidden_size, model.mlp_size, size)
    tables = (3 * 2**model.bits + VALUES) * model.hidden_size**2
    return 3 * (one + size[0] * size[1] * model.hidden_size * VALUES) + tables


class Upsampler(nn.Module):
    """One channel upsampler; see the head of this file.

    Parameters: `channel_embedding [3 * 2^bits, D]` (red's values first, then green's and blue's), `gray_embedding
    [256, D]`, `input/{kernel [2 D, D],bias}` (channel's half first), `stack` (see `stack.AxialStack`),
    `head/{kernel,bias}`.

    Attributes:
      bits: of the values that come in, 3 or 8.
      image_size: (height, width), or a side, of the pictures; other sizes are refused (tables of positions have it).
      hidden_size: D; mlp_size; num_heads; num_layers.
      dropout, attention, remat, dtype: see `colorizer.Colorizer`.
    """

    bits: int
    image_size: int | tuple[int, int]
    hidden_size: int = 512
    mlp_size: int = 512
    num_heads: int = 4
    num_layers: int = 4
    dropout: float = 0.0
    attention: str = "xla"
    remat: str = "none"
    dtype: Any = jnp.float32

    def example_inputs(self, image_size: tuple[int, int], batch_size: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What a call takes, as shapes; see `models.registry.example_inputs`."""
        shapes = ((batch_size, 3, *image_size), (batch_size, *image_size), (batch_size, 3))
        return tuple(jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes)

    @nn.compact
    def __call__(self, values: jax.Array, gray: jax.Array, channels: jax.Array, train: bool = False) -> ChannelOutput:
        """Logits over the 256 values of every sub-pixel.

        Args:
          values: int `[B, C, H, W]`, channels of the coarse picture, below `2^bits`; for the spatial upsampler already
            at the size of the result.
          gray: int `[B, H, W]` in 0..255, the gray picture at the size of the result.
          channels: int `[B, C]`, which channel each is: 0 red, 1 green, 2 blue. Any number of them, in any order.
          train: dropout, where the model has some.

        Returns:
          Logits `[B, C, H, W, 256]`.
        """
        width = self.hidden_size
        init = INITIALIZERS["glorot_uniform"]
        channel_table = self.param("channel_embedding", init, (3 * 2**self.bits, width))
        gray_table = self.param("gray_embedding", init, (VALUES, width))
        # The projection of two concatenated embeddings is a sum of two projections, each of a table of few rows.
        kernel, bias = _Affine(2 * width, width, name="input")()
        channel_table = jnp.dot(channel_table, kernel[:width], precision="highest") + bias
        gray_table = jnp.dot(gray_table, kernel[width:], precision="highest")
        index = values + (channels << self.bits)[..., None, None]
        x = jnp.take(channel_table.astype(self.dtype), index, axis=0)
        x = x + jnp.take(gray_table.astype(self.dtype), gray, axis=0)[:, None]
        sizes = {"branches": ENCODER, "width": width, "size": square_or_pair(self.image_size)}
        stack = AxialStack(**shared_fields(self, AxialStack) | sizes, name="stack")
        x = stack(x.reshape(-1, *x.shape[2:]), train=train).reshape(x.shape)
        return ChannelOutput(nn.Dense(VALUES, kernel_init=init, name="head")(x.astype(jnp.float32)))


class _Affine(nn.Module):
    """The parameters of a dense layer, to be applied to tables."""

    inputs: int
    outputs: int

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", INITIALIZERS["glorot_uniform"], (self.inputs, self.outputs))
        return kernel, self.param("bias", nn.initializers.zeros, (self.outputs,))


for _name, _bits, _size, _layers in (("color", 3, (64, 64), 4), ("spatial", 8, (256, 256), 3)):
    _base = {"bits": _bits, "image_size": _size, "num_layers": _layers}
    register_model(
        f"coltran_{_name}_upsampler",
        variants={"ColTran": _base, "small": {**_base, **SMALL}, "tiny": {**_base, **TINY, "num_layers": 1}},
        default_variant="ColTran",
        macs=_macs,
        image_size=_size,
        num_classes=VALUES,
    )(Upsampler)
