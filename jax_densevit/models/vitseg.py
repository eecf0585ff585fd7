"""ViTSeg, a dense transformer without convolutions: a student's report, "Vision Transformers for Segmentation".

The picture is cut into patches; a small pre-LN transformer reads them; its tokens are flattened into one vector that an
MLP turns into 32 features per patch; every patch then decodes its own raw pixels, its position and its features into
its output pixels. Trained at 256x256 on Cityscapes, it paints the colours of the classes (task "palette").

Published were 60,927,264 parameters, nine tenths of them in the MLP over the flattened tokens, and "horizontal
patterns" on the pictures. Their cause is the last step: the decoder's 256 tokens of 16x16 pixels were reshaped to a
picture of 256x256 directly, so that token i paints row i instead of block i, and the raw pixels and the position that
it decodes belong to another place than what it paints. `unpatchify="rows"` reproduces that, `"grid"` mends it.

Not known and chosen here: GELU after every layer of the encoder's MLPs, as in the tutorial of Keras that the report
follows (no parameter count depends on it).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.attention import SelfAttention, attention_macs
from jax_densevit.layers.embedding import PatchEmbedding, native_grid, unpatchify
from jax_densevit.layers.transformer import gelu, layer_norm
from jax_densevit.models.output import DenseOutput
from jax_densevit.models.registry import register_model


def paint_rows(tokens: jax.Array, patch_size: int) -> jax.Array:
    """`[B, h, w, P * P * C]` -> `[B, h * P, w * P, C]`, memory read in order: token i paints pixels i P^2 ... row-wise.

    In a picture P * P wide, as 256x256 is for patches of 16, token i paints row i.
    """
    batch, height, width, size = tokens.shape
    return tokens.reshape(batch, height * patch_size, width * patch_size, size // patch_size**2)


UNPATCHIFY = {"grid": unpatchify, "rows": paint_rows}


class MlpStack(nn.Module):
    """Dense layers `fc_0`, `fc_1`, ... of the given sizes, each followed by an activation and dropout."""

    sizes: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`[..., D]` -> `[..., sizes[-1]]`."""
        for i, size in enumerate(self.sizes):
            dense = nn.Dense(size, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype, name=f"fc_{i}")
            x = nn.Dropout(self.dropout)(self.activation(dense(x)), deterministic=not train)
        return x


def _stack_macs(width: int, sizes: tuple[int, ...]) -> int:
    return sum(a * b for a, b in zip((width, *sizes[:-1]), sizes, strict=True))


def _macs(model: "ViTSeg", size: tuple[int, int]) -> int:
    rows, columns = model.grid
    model.check_size(size)
    tokens, pixels = rows * columns, model.patch_size**2
    width, decoder_width = model.projection_size + model.position_size, model.decoder_projection + model.position_size
    block = attention_macs(tokens, width, inner=model.num_heads * model.head_size)
    block += tokens * _stack_macs(width, (*model.mlp_sizes, width))
    features = _stack_macs(tokens * width, (*model.feature_sizes, tokens * model.token_features))
    decoder = _stack_macs(decoder_width + model.token_features, (*model.decoder_sizes, pixels * model.num_classes))
    projections = 3 * pixels * (model.projection_size + model.decoder_projection)
    return model.num_layers * block + features + tokens * (projections + decoder)


@register_model(
    "vitseg",
    variants={"grid": {}, "rows": {"unpatchify": "rows"}},
    default_variant="grid",
    macs=_macs,
    image_size=(256, 256),
    num_classes=3,
)
class ViTSeg(nn.Module):
    """ViTSeg; see the head of this file.

    The last step of the publication, a hard sigmoid that makes colours of the outputs, belongs to the task ("palette",
    which has it by default): the outputs here are linear, and serve as class logits as well.

    Parameters: `embedding/{kernel,bias}` and `positions [h * w, 8]`; `block_<i>/{norm1,attention/{qkv,out},norm2,
    mlp/fc_<j>}`; `norm`; `features/fc_<j>`, the MLP over the flattened tokens; `decoder_embedding/{kernel,bias}`,
    `decoder_positions`, `decoder_norm`, `decoder/fc_<j>`, `head`.

    Attributes:
      num_classes: K, output channels: 3 for colours.
      unpatchify: "grid", each token paints its block; "rows", each token paints a row, as published.
      image_size: the only size of image the model takes, a side or (height, width): the MLP over the flattened tokens
        has a weight for every place.
      patch_size: P.
      projection_size, position_size: channels of the patch projection and of the position, which are concatenated.
      num_layers, num_heads, head_size, mlp_sizes: the blocks; the MLPs' last layer has the width of the tokens.
      feature_sizes: hidden sizes of the MLP over the flattened tokens. The report does not name them; these alone give
        its number of parameters.
      token_features: channels that this MLP gives to every patch.
      decoder_projection, decoder_sizes: the decoder of a patch.
      attention_dropout: of attention weights; mlp_dropout: of the blocks' MLPs and the flattened one; flat_dropout: of
        the flattened tokens; decoder_dropout: of the decoder's MLP.
      attention: implementation of attention, see `attend`.
      dtype: type of the computation; parameters and outputs are float32.
    """

    num_classes: int = 3
    unpatchify: str = "grid"
    image_size: int | tuple[int, int] = (256, 256)
    patch_size: int = 16
    projection_size: int = 128
    position_size: int = 8
    num_layers: int = 4
    num_heads: int = 8
    head_size: int = 128
    mlp_sizes: tuple[int, ...] = (512, 1024)
    feature_sizes: tuple[int, ...] = (1024, 2048)
    token_features: int = 32
    decoder_projection: int = 128
    decoder_sizes: tuple[int, ...] = (512, 512, 512)
    attention_dropout: float = 0.2
    mlp_dropout: float = 0.4
    flat_dropout: float = 0.2
    decoder_dropout: float = 0.3
    attention: str = "xla"
    dtype: Any = jnp.float32

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) in patches."""
        return native_grid(self.image_size, self.patch_size)

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises :class:`UserError` unless (height, width) is the model's."""
        wanted = tuple(side * self.patch_size for side in self.grid)
        if tuple(size) != wanted:
            raise UserError(
                f"ViTSeg takes images of {wanted[0]}x{wanted[1]} only (its MLP over the flattened tokens has a weight "
                f"for every place), not of {size[0]}x{size[1]}: train at another size with model.image_size, decode "
                f"pictures of any size with task.fixed_size=({wanted[0]}, {wanted[1]}), on the command line "
                f"--fixed_size={wanted[0]},{wanted[1]}."
            )

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> DenseOutput:
        """`[B, H, W, 3]` normalised images of `image_size` -> outputs `[B, H, W, K]`.

        `features`: "tokens" `[B, h, w, D]`, the encoder's after its norm, and "features" `[B, h, w, 32]`.

        Raises:
          UserError: an image of another size, or an unknown `unpatchify`.
        """
        check_name("way to put patches together (unpatchify)", self.unpatchify, UNPATCHIFY)
        self.check_size(images.shape[1:3])
        batch, grid = len(images), self.grid
        x = self._tokens(images, self.projection_size, "")
        width = x.shape[-1]
        for i in range(self.num_layers):
            x = _Block(
                self.num_heads,
                self.head_size,
                (*self.mlp_sizes, width),
                self.attention_dropout,
                self.mlp_dropout,
                self.attention,
                self.dtype,
                name=f"block_{i}",
            )(x, train=train)
        x = layer_norm(1e-6, self.dtype, "norm")(x)
        flat = nn.Dropout(self.flat_dropout)(x.reshape(batch, -1), deterministic=not train)
        sizes = (*self.feature_sizes, grid[0] * grid[1] * self.token_features)
        features = MlpStack(sizes, gelu, self.mlp_dropout, self.dtype, name="features")(flat, train=train)
        features = features.reshape(batch, -1, self.token_features)
        y = jnp.concatenate([self._tokens(images, self.decoder_projection, "decoder_"), features], axis=-1)
        y = layer_norm(1e-6, self.dtype, "decoder_norm")(y)
        y = MlpStack(self.decoder_sizes, nn.relu, self.decoder_dropout, self.dtype, name="decoder")(y, train=train)
        y = nn.Dense(self.patch_size**2 * self.num_classes, kernel_init=nn.initializers.xavier_uniform(), name="head")(
            y.astype(jnp.float32)
        )
        return DenseOutput(
            logits=UNPATCHIFY[self.unpatchify](y.reshape(batch, *grid, -1), self.patch_size),
            features={"tokens": x.reshape(batch, *grid, -1), "features": features.reshape(batch, *grid, -1)},
            covers=images.shape[1:3],
        )

    def _tokens(self, images: jax.Array, size: int, prefix: str) -> jax.Array:
        """Projected patches with their positions beside them, `[B, h * w, size + position_size]`."""
        x = PatchEmbedding(size, self.patch_size, self.dtype, name=f"{prefix}embedding")(images)
        x = x.reshape(len(images), -1, size)
        shape = (x.shape[1], self.position_size)
        positions = self.param(f"{prefix}positions", nn.initializers.normal(0.02), shape).astype(self.dtype)
        return jnp.concatenate([x, jnp.broadcast_to(positions, (len(x), *shape))], axis=-1)


class _Block(nn.Module):
    """A pre-LN block whose heads have a size of their own and whose MLP activates every layer, the last one too."""

    num_heads: int
    head_size: int
    mlp_sizes: tuple[int, ...]
    attention_dropout: float
    mlp_dropout: float
    attention: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`[B, T, D]` -> `[B, T, D]`."""
        y = layer_norm(1e-6, self.dtype, "norm1")(x)
        x = x + SelfAttention(
            self.num_heads, self.attention, self.dtype, self.head_size, self.attention_dropout, name="attention"
        )(y, train=train)
        y = layer_norm(1e-6, self.dtype, "norm2")(x)
        return x + MlpStack(self.mlp_sizes, gelu, self.mlp_dropout, self.dtype, name="mlp")(y, train=train)
