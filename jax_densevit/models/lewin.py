"""LeWin blocks, the stages of Uformer (Wang et al. 2022, https://arxiv.org/abs/2106.03106, section 3.2)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.layers.depthwise import DepthwiseConv
from jax_densevit.layers.product import flat_product
from jax_densevit.layers.transformer import REMAT_POLICIES, Mlp, drop_path, gelu, layer_norm
from jax_densevit.layers.window import WindowAttention

FEED_FORWARDS = ("leff", "ffn")


class LeFF(nn.Module):
    """Locally-enhanced feed-forward layer: linear, GELU, depthwise 3x3, GELU, linear, over the whole map.

    Parameters: `fc1/...`, `depthwise/{kernel [3, 3, 1, mlp_size],bias}`, `fc2/...`.
    """

    mlp_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
        """`[B, h, w, C]` -> the same shape; where `valid` `[B, h, w]` is False the convolution sees zeros."""
        init = nn.initializers.truncated_normal(0.02)
        y = gelu(nn.Dense(self.mlp_size, dtype=self.dtype, kernel_init=init, dot_general=flat_product, name="fc1")(x))
        y = gelu(DepthwiseConv(self.dtype, name="depthwise")(clear(y, valid)))
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=init, dot_general=flat_product, name="fc2")(y)


class LeWinBlock(nn.Module):
    """`x += attention(norm1(x) + modulator); x += feed_forward(norm2(x))`, each branch under stochastic depth.

    Parameters: `norm1`, `attention` (see `WindowAttention`), `norm2`, `feed_forward` (`LeFF`, or `Mlp` for "ffn") and,
    with a modulator, `modulator [window, window, C]`, added to the tokens of every window.

    Attributes:
      num_heads, window, shift, projection, padding: of `WindowAttention`.
      mlp_ratio: hidden width of the feed-forward layer over C.
      feed_forward: "leff" or "ffn".
      modulator: whether there is one.
      drop_path: rate of stochastic depth of this block.
      dtype: type of the computation.
    """

    num_heads: int
    window: int
    shift: int
    projection: str
    padding: str
    mlp_ratio: int
    feed_forward: str
    modulator: bool
    drop_path: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array | None, train: bool) -> jax.Array:
        """`[B, h, w, C]` -> the same shape; `valid` bool `[B, h, w]` or None."""

        def residual(branch):
            if not train or not self.drop_path:
                return branch
            return drop_path(branch, self.drop_path, self.make_rng("dropout"))

        y = layer_norm(1e-5, self.dtype, "norm1")(x)
        if self.modulator:
            shape = (self.window, self.window, x.shape[-1])
            table = self.param("modulator", nn.initializers.normal(1.0), shape).astype(self.dtype)
            # Token (row, column) is (row - shift, column - shift) modulo the window in its window.
            table = jnp.roll(table, (self.shift, self.shift), (0, 1))
            rows, columns = (-(-side // self.window) for side in x.shape[1:3])
            y = y + jnp.tile(table, (rows, columns, 1))[: x.shape[1], : x.shape[2]]
        attention = WindowAttention(
            self.num_heads, self.window, self.shift, self.projection, self.padding, self.dtype, name="attention"
        )
        x = x + residual(attention(y, valid))
        y = layer_norm(1e-5, self.dtype, "norm2")(x)
        size = self.mlp_ratio * x.shape[-1]
        if self.feed_forward == "ffn":
            y = Mlp(size, dtype=self.dtype, name="feed_forward")(y)
        else:
            y = LeFF(size, self.dtype, name="feed_forward")(y, valid if self.padding == "masked" else None)
        return x + residual(y)


class Stage(nn.Module):
    """LeWin blocks `block_<i>` of one resolution; odd blocks shift their windows.

    Attributes:
      drop_path: rates of the blocks, as many as there are blocks.
      remat: a name of `REMAT_POLICIES`.
      options: the other fields of `LeWinBlock`.
    """

    drop_path: tuple[float, ...]
    remat: str
    options: Mapping[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array, valid: jax.Array | None, train: bool) -> jax.Array:
        """`[B, h, w, C]` -> the same shape."""
        kind = LeWinBlock
        if self.remat != "none":
            kind = nn.remat(kind, static_argnums=(3,), policy=REMAT_POLICIES[self.remat])
        for i, rate in enumerate(self.drop_path):
            options = {**self.options, "drop_path": rate, **({} if i % 2 else {"shift": 0})}
            x = kind(**options, name=f"block_{i}")(x, valid, train)
        return x


def clear(x: jax.Array, valid: jax.Array | None) -> jax.Array:
    """`[B, h, w, C]` with zeros where `valid` `[B, h, w]` is False; the map itself for None."""
    return x if valid is None else jnp.where(valid[..., None], x, jnp.zeros((), x.dtype))
