"""The axial transformer of the study: attention along columns and rows, 3x3 convolutions between, reversible.

A 1x1 convolution makes the map; every layer has two blocks of two branches each, (attention along the height, attention
along the width) and (convolutions, convolutions); a convolution makes the output. Axial attention is Ho et al. 2019
(https://arxiv.org/abs/1912.12180), the wiring that of lucidrains/axial-attention 0.6.1 with convolutions around it.
Nothing is autoregressive, and without `positions` nothing says where a pixel is but the convolutions' zero borders.
Nine tenths of its cost are the 3x3 convolutions.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError
from jax_densevit.layers.axial_attention import COLUMN, ROW, axial_attention
from jax_densevit.layers.convolution import convolve
from jax_densevit.layers.embedding import native_grid, resize_positions, torch_uniform
from jax_densevit.layers.fields import shared_fields
from jax_densevit.layers.placement import layer_maker
from jax_densevit.layers.product import flat_product
from jax_densevit.layers.reversible import residual, reversible
from jax_densevit.layers.transformer import hold_blocks, layer_norm, segment_name
from jax_densevit.models.output import DenseOutput
from jax_densevit.models.registry import register_model


class AxialAttention(nn.Module):
    """`out(attention(norm(x)))` along one axis, `COLUMN` or `ROW`.

    Parameters: `norm/{scale,bias}`, `qkv/kernel [C, 3, heads, d]` without a bias, `out/{kernel [heads, d, C],bias}`.
    """

    axis: int
    num_heads: int
    attention: str = "xla"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> `[B, H, W, C]`."""
        width = x.shape[-1]
        init = torch_uniform(width)
        y = layer_norm(1e-5, self.dtype, "norm")(x)
        shape = (3, self.num_heads, width // self.num_heads)
        qkv = nn.DenseGeneral(
            shape, use_bias=False, dtype=self.dtype, kernel_init=init, dot_general=flat_product, name="qkv"
        )(y)
        q, k, v = (qkv[..., i, :, :] for i in range(3))
        y = axial_attention(q, k, v, axis=self.axis, implementation=self.attention)
        out = nn.DenseGeneral(
            width,
            axis=(-2, -1),
            dtype=self.dtype,
            kernel_init=init,
            bias_init=init,
            dot_general=flat_product,
            name="out",
        )
        return out(y)


class ChannelNorm(nn.Module):
    """`(x - mean) / (std + epsilon) * scale + bias` over channels; epsilon is added to the deviation, not the variance.

    Statistics are float32. The deviation is the biased one; where all channels are equal its gradient is taken as 0.
    """

    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., C]` -> `[..., C]` of `dtype`."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        variance = jnp.square(x).mean(-1, keepdims=True)
        deviation = jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1)), 0)
        return (x / (deviation + self.epsilon) * scale + bias).astype(self.dtype)


class ConvMlp(nn.Module):
    """`conv2(leaky_relu(conv1(norm(x))))`, both convolutions 3x3.

    Parameters: `norm/{scale,bias}`, `conv1/{kernel,bias}`, `conv2/{kernel,bias}`.
    """

    mlp_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, C]` -> `[B, H, W, C]`."""
        width = x.shape[-1]
        y = ChannelNorm(dtype=self.dtype, name="norm")(x)
        y = nn.leaky_relu(_conv(self.mlp_size, 3, width, self.dtype, "conv1")(y), 0.01)
        return _conv(width, 3, self.mlp_size, self.dtype, "conv2")(y)


def _conv(features: int, size: int, channels: int, dtype: Any, name: str) -> nn.Conv:
    init = torch_uniform(size * size * channels)
    return nn.Conv(
        features,
        (size, size),
        padding=size // 2,
        dtype=dtype,
        kernel_init=init,
        bias_init=init,
        conv_general_dilated=convolve,
        name=name,
    )


def _macs(model: "Axial", size: tuple[int, int]) -> int:
    height, width = size
    channels = model.hidden_size
    attention = 2 * 4 * channels**2 + 2 * (height + width) * channels
    convolutions = 4 * 9 * channels * model.mlp_size
    head = model.head_kernel**2 * channels * model.num_classes
    return height * width * (3 * channels + model.num_layers * (attention + convolutions) + head)


@register_model(
    "axial",
    variants={"128": {}, "128-head-1x1": {"head_kernel": 1}, "128-positions": {"positions": True}},
    default_variant="128",
    macs=_macs,
    image_size=(224, 224),
    num_classes=3,
)
class Axial(nn.Module):
    """Axial transformer at the full resolution of the image; see the head of this file.

    The study's colorizer has the head of 1x1, 19,944,323 parameters; its segmenter that of 3x3, 19,990,056 at K = 40.

    Parameters: `embedding/{kernel,bias}`; `position_height [1, H, C]` and `position_width [1, W, C]`;
    `layers/block_<i>/{height,width,mlp1,mlp2}/...`, stacked `layers/blocks_0_<n>/...`; `head/{kernel,bias}`.

    Attributes:
      num_classes: K, output channels.
      hidden_size: C; num_layers: layers of two blocks each; num_heads: must divide C.
      mlp_size: channels between the two convolutions of a branch.
      reversible: two streams that the backward pass recomputes, so its memory does not grow with depth, and their mean
        at the end. False is the plain residual form: other outputs of the same parameters, faster, more memory.
      positions: add a learned vector per row and one per column.
      image_size: a side or (height, width): native size of these tables. For other images they are resized by
        `pos_rule`, see `layers.embedding.POSITION_RULES`.
      head_kernel: size of the output convolution, 1 or 3.
      attention: implementation of attention, see `layers.attention.attend`.
      scan: run the layers as one scanned layer.
      remat: what the backward pass of the plain form keeps, see `layers.transformer.REMAT_POLICIES`.
      dtype: type of the branches. Streams, parameters and the head are float32.
    """

    num_classes: int = 3
    hidden_size: int = 128
    num_layers: int = 8
    num_heads: int = 4
    mlp_size: int = 512
    reversible: bool = True
    positions: bool = False
    image_size: int | tuple[int, int] = (224, 224)
    pos_rule: str = "setr"
    head_kernel: int = 3
    attention: str = "xla"
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> DenseOutput:
        """`[B, H, W, 3]` normalised images of any size -> logits `[B, H, W, K]`. `features`: "body" `[B, H, W, C]`.

        Raises:
          UserError: sizes or options that do not go together.
        """
        if self.hidden_size % self.num_heads:
            raise UserError(f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}.")
        if self.head_kernel not in (1, 3):
            raise UserError(f"head_kernel={self.head_kernel} of an axial transformer must be 1 or 3.")
        if self.reversible and self.remat != "none":
            raise UserError(
                f"remat={self.remat!r} is for reversible=False: reversible layers recompute everything already."
            )
        init = torch_uniform(3)
        embedding = nn.Dense(self.hidden_size, dtype=self.dtype, kernel_init=init, bias_init=init, name="embedding")
        x = embedding(images).astype(jnp.float32)
        if self.positions:
            height, width = native_grid(self.image_size, 1)
            x = x + self._position("position_height", height, x.shape[1])[:, :, None]
            x = x + self._position("position_width", width, x.shape[2])[:, None]
        x = AxialLayers(**shared_fields(self, AxialLayers), name="layers")(x)
        logits = _conv(self.num_classes, self.head_kernel, self.hidden_size, jnp.float32, "head")(x)
        return DenseOutput(logits=logits, features={"body": x}, covers=tuple(images.shape[1:3]))

    def _position(self, name: str, given: int, length: int) -> jax.Array:
        table = self.param(name, nn.initializers.normal(1.0), (1, given, self.hidden_size), jnp.float32)
        return resize_positions(table, (given, 1), (length, 1), self.pos_rule)


class AxialLayers(nn.Module):
    """The body of :class:`Axial`, whose attributes it shares: float32 `[B, H, W, C]` -> the same."""

    num_layers: int
    num_heads: int
    mlp_size: int
    reversible: bool = True
    attention: str = "xla"
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # Applied as functions: the parameters are held here, so that one layer can be scanned and undone.
        branches = {
            "height": AxialAttention(COLUMN, self.num_heads, self.attention, self.dtype, parent=None),
            "width": AxialAttention(ROW, self.num_heads, self.attention, self.dtype, parent=None),
            "mlp1": ConvMlp(self.mlp_size, self.dtype, parent=None),
            "mlp2": ConvMlp(self.mlp_size, self.dtype, parent=None),
        }
        one_pixel = jnp.zeros((1, 1, 1, x.shape[-1]), jnp.float32)

        def init(key):
            keys = dict(zip(branches, jax.random.split(key, len(branches)), strict=True))
            return {name: branch.init(keys[name], one_pixel)["params"] for name, branch in branches.items()}

        (held,) = hold_blocks(self, init, self.num_layers, scan=self.scan).values()

        def function(name):
            if not self.scan:
                return lambda params, x: branches[name].apply({"params": params}, x)
            whole = layer_maker((*self.path, segment_name(0, self.num_layers), name))
            return lambda params, x: branches[name].apply({"params": whole(params)}, x)

        pairs = (("height", "width"), ("mlp1", "mlp2"))
        blocks = tuple((function(f), function(g)) for f, g in pairs)
        ordered = [tuple((params[f], params[g]) for f, g in pairs) for params in ([held] if self.scan else held)]
        layers = ordered[0] if self.scan else ordered
        if not self.reversible:
            return residual(blocks, layers, x, scan=self.scan, remat=self.remat)
        first, second = reversible(blocks, layers, (x, x), scan=self.scan)
        return (first + second) / 2
