"""U-Net (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597) in the form in use today.

Against the paper: convolutions keep the size (padding 1), are followed by batch normalisation and have no bias, and
maps of odd sizes are padded instead of cropped. That is the widespread PyTorch form with 31,037,763 parameters at
width 64 and three outputs, and the one that comparisons mean when they say U-Net.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError
from jax_densevit.layers.bert import EPSILON
from jax_densevit.layers.convolution import ConvNorm, Upsample
from jax_densevit.layers.embedding import Tokens, native_grid
from jax_densevit.layers.resize import resize_bilinear
from jax_densevit.layers.transformer import Encoder, encoder_macs, layer_norm
from jax_densevit.models.output import DenseOutput
from jax_densevit.models.registry import register_model

_DEPTH = 4  # halvings of the resolution


class DoubleConv(nn.Module):
    """Two 3x3 `ConvNorm`s, `C -> middle -> features`."""

    features: int
    middle: int
    dtype: Any = jnp.float32
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`[B, h, w, C]` -> `[B, h, w, features]`."""
        x = ConvNorm(self.middle, use_bias=self.use_bias, dtype=self.dtype, name="first")(x, train=train)
        return ConvNorm(self.features, use_bias=self.use_bias, dtype=self.dtype, name="second")(x, train=train)


class TokenLayers(nn.Module):
    """Transformer blocks over the pixels of a small map, as BERT has them: learned positions, a norm, post-norm blocks.

    Parameters: `tokens/position_embedding [1, rows, C]`, `norm/{scale,bias}`, `encoder/block_<i>/...`.

    Attributes:
      num_layers: number of blocks; they have a head for every 64 channels, and four times their width inside.
      grid: (height, width) of the map that the position table is native to.
      dropout: rate of the hidden states, after each branch.
      dtype: type of the computation.
    """

    num_layers: int
    grid: tuple[int, int]
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`[B, h, w, C]` -> `[B, h, w, C]`."""
        channels = x.shape[-1]
        tokens = Tokens(self.grid, cls_token=False, dtype=self.dtype, name="tokens")(x)
        tokens = layer_norm(EPSILON, self.dtype, "norm")(tokens)
        encoder = Encoder(
            self.num_layers,
            max(1, channels // 64),
            4 * channels,
            norm_epsilon=EPSILON,
            dropout=self.dropout,
            dtype=self.dtype,
            norm_style="post",
            mlp_dropout=0.0,
            name="encoder",
        )
        return encoder(tokens, train=train)[self.num_layers].reshape(x.shape)


def _widths(model: "UNet") -> tuple[list[int], list[tuple[int, int]]]:
    """Channels of the five encoder stages, and (middle, features) of the four decoder stages."""
    encoder = [model.base * 2**i for i in range(_DEPTH + 1)]
    if not model.bilinear:
        return encoder, [(width, width) for width in encoder[-2::-1]]
    encoder[-1] //= 2  # interpolation keeps the channels, so the halving happens in the blocks
    decoder = [(width, width // 2) for width in encoder[-2:0:-1]]
    return encoder, [*decoder, (model.base, model.base)]


def _macs(model: "UNet", size: tuple[int, int]) -> int:
    encoder, decoder = _widths(model)
    areas = [(size[0] >> i) * (size[1] >> i) for i in range(_DEPTH + 1)]
    macs = encoder_macs(areas[-1], encoder[-1], model.num_layers, 4 * encoder[-1]) if model.num_layers else 0
    channels = 3
    for area, width in zip(areas, encoder, strict=True):
        macs += 9 * area * width * (channels + width)
        channels = width
    for i, (middle, features) in zip(range(_DEPTH - 1, -1, -1), decoder, strict=True):
        if not model.bilinear:
            macs += 4 * areas[i + 1] * channels * (channels // 2)
            channels //= 2
        macs += 9 * areas[i] * middle * (encoder[i] + channels + features)
        channels = features
    return macs + areas[0] * channels * model.num_classes


@register_model(
    "unet",
    variants={
        **{str(base): {"base": base} for base in (64, 32, 16)},
        **{f"bilinear-{base}": {"base": base, "bilinear": True} for base in (64, 32, 16)},
    },
    default_variant="64",
    macs=_macs,
    image_size=(224, 224),
    num_classes=3,
)
class UNet(nn.Module):
    """U-Net of four halvings, with batch normalisation; see the head of this file.

    Parameters: `encoder_<i>` (i = 0 the full resolution) and `decoder_<i>` each hold
    `{first,second}/{conv/kernel,norm/{scale,bias}}`; `upsample_<i>/{kernel,bias}` feeds `decoder_<i>`; last,
    `head/{kernel,bias}`. `layers/...`, see :class:`TokenLayers`, where there are some.

    Attributes:
      num_classes: K, output channels.
      base: channels at full resolution; they double with every halving.
      bilinear: enlarge by bilinear interpolation (corners aligned) instead of transposed convolutions; the blocks after
        it then halve the channels in their first convolution: 17,263,107 parameters at width 64 and three outputs.
      conv_bias: convolutions have a bias, as in forms written without thinking of the normalisation behind it.
      num_layers: transformer blocks between encoder and decoder, see :class:`TokenLayers`; `dropout` is theirs.
      image_size: a side or (height, width): native size of their position table.
      dtype: type of the computation; parameters, statistics and the logits are float32.
    """

    num_classes: int = 3
    base: int = 64
    bilinear: bool = False
    conv_bias: bool = False
    num_layers: int = 0
    image_size: int | tuple[int, int] = (256, 256)
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> DenseOutput:
        """`[B, H, W, 3]` normalised images, H and W at least 16 -> logits `[B, H, W, K]`.

        `features`: "bottleneck", and "decoder_3" (the smallest) to "decoder_0", what the decoder's stages return.
        Training needs the rng stream "dropout" where there are transformer blocks.

        Raises:
          UserError: an image smaller than 16 pixels, or a base width that does not fit.
        """
        height, width = images.shape[1:3]
        if min(height, width) < 2**_DEPTH:
            raise UserError(f"A U-Net halves the image {_DEPTH} times: {height} x {width} is smaller than 16 x 16.")
        if self.base < 1 or (self.bilinear and self.base % 2):
            raise UserError(f"base={self.base} of a U-Net must be positive, and even with bilinear=True.")
        encoder, decoder = _widths(self)
        x = images.astype(self.dtype)
        skips = []
        for i, features in enumerate(encoder):
            if i:
                skips.append(x)
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = DoubleConv(features, features, self.dtype, self.conv_bias, name=f"encoder_{i}")(x, train=train)
        if self.num_layers:
            grid = native_grid(self.image_size, 2**_DEPTH)
            x = TokenLayers(self.num_layers, grid, self.dropout, self.dtype, name="layers")(x, train=train)
        maps = {"bottleneck": x}
        for i, (middle, features) in zip(range(_DEPTH - 1, -1, -1), decoder, strict=True):
            if self.bilinear:
                x = resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]), align_corners=True)
            else:
                x = Upsample(x.shape[-1] // 2, dtype=self.dtype, name=f"upsample_{i}")(x)
            x = jnp.concatenate([skips[i], _pad_to(x, skips[i].shape[1:3])], axis=-1)
            x = DoubleConv(features, middle, self.dtype, self.conv_bias, name=f"decoder_{i}")(x, train=train)
            maps[f"decoder_{i}"] = x
        logits = nn.Dense(self.num_classes, name="head")(x.astype(jnp.float32))
        return DenseOutput(logits=logits, features=maps, covers=(height, width))


def _pad_to(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Zeros around `[B, h, w, C]` up to `size`; of an odd number of missing rows or columns the end gets more."""
    missing = [want - have for want, have in zip(size, x.shape[1:3], strict=True)]
    return jnp.pad(x, ((0, 0), *((m // 2, m - m // 2) for m in missing), (0, 0))) if any(missing) else x
