"""Transformer decoder blocks: causal self-attention with a cache, and cross-attention to an encoder's tokens.

Every block serves two programs with the same parameters: a whole sequence at once, as in training ("teacher
forcing"), and one token at a time with the keys and values of the earlier ones in a cache of fixed size. Both give the
same numbers.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError
from jax_densevit.layers.attention import attend, attention_macs
from jax_densevit.layers.product import flat_product
from jax_densevit.layers.transformer import Mlp, layer_norm

Cache = tuple[jax.Array, jax.Array]  # keys and values, [B, T, heads, d] each


class DecoderBlock(nn.Module):
    """Pre-LN block of a decoder (Vaswani et al. 2017, section 3.1, with the norms first).

    `x += attention(norm1(x)); x += cross(norm2(x), memory); x += mlp(norm3(x))`

    Parameters: `norm1`, `qkv/kernel [D, 3, heads, d]`, `out`; `norm2`, `query`, `memory/kernel [M, 2, heads, d]` (keys,
    then values), `cross_out`; `norm3`, `mlp`.

    Attributes:
      hidden_size: D; num_heads: must divide it; mlp_size: of the MLP.
      gelu, norm_epsilon, dropout: as in `EncoderBlock`.
      attention: implementation of attention over whole sequences; single tokens always take "xla".
      dtype: type of the computation.
    """

    hidden_size: int
    num_heads: int
    mlp_size: int
    gelu: str = "erf"
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    attention: str = "xla"
    dtype: Any = jnp.float32

    def setup(self):
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"num_heads={self.num_heads} does not divide hidden_size={self.hidden_size}; choose a divisor."
            )
        heads, init = (self.num_heads, self.hidden_size // self.num_heads), nn.initializers.normal(0.02)

        def project(*shape, axis=-1):
            return nn.DenseGeneral(shape, axis=axis, dtype=self.dtype, kernel_init=init, dot_general=flat_product)

        self.norm1, self.norm2, self.norm3 = (layer_norm(self.norm_epsilon, self.dtype, None) for _ in range(3))
        self.qkv, self.query, self.memory = project(3, *heads), project(*heads), project(2, *heads)
        self.out, self.cross_out = (project(self.hidden_size, axis=(-2, -1)) for _ in range(2))
        self.mlp = Mlp(self.mlp_size, self.gelu, self.dropout, self.dtype)
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, x: jax.Array, memory: Cache, *, train: bool = False) -> jax.Array:
        """A whole sequence `[B, T, D]` -> `[B, T, D]`, each token looking at itself and the earlier ones.

        Args:
          x: the tokens.
          memory: from :meth:`remember`.
          train: whether dropout drops; needs the rng stream "dropout" where its rate is above 0.
        """
        length = x.shape[1]
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
        q, k, v = self._qkv(x)
        y = attend(q, k, v, mask=mask, implementation=self.attention)
        return self._finish(x, y, memory, self.attention, train)

    def step(self, x: jax.Array, memory: Cache, cache: Cache, position: jax.Array) -> tuple[jax.Array, Cache]:
        """One token `[B, 1, D]` at `position` (int32 scalar) -> (`[B, 1, D]`, the cache with its keys and values)."""
        q, k, v = self._qkv(x)
        cache = tuple(
            jax.lax.dynamic_update_slice_in_dim(held, new.astype(held.dtype), position, 1)
            for held, new in zip(cache, (k, v), strict=True)
        )
        mask = (jnp.arange(cache[0].shape[1]) <= position)[None, None, None]
        return self._finish(x, attend(q, *cache, mask=mask), memory, "xla", False), cache

    def remember(self, tokens: jax.Array) -> Cache:
        """Keys and values of an encoder's tokens `[B, S, M]` for cross-attention, computed once per picture."""
        projected = self.memory(tokens)
        return projected[:, :, 0], projected[:, :, 1]

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Room for the keys and values of `length` tokens."""
        shape = (batch, length, self.num_heads, self.hidden_size // self.num_heads)
        return jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)

    def _qkv(self, x: jax.Array) -> tuple[jax.Array, ...]:
        projected = self.qkv(self.norm1(x))
        return tuple(projected[:, :, i] for i in range(3))

    def _finish(self, x: jax.Array, y: jax.Array, memory: Cache, implementation: str, train: bool) -> jax.Array:
        """The rest of the block after self-attention gave `y` `[B, T, heads, d]`."""
        x = x + self.drop(self.out(y), deterministic=not train)
        y = attend(self.query(self.norm2(x)), *memory, implementation=implementation)
        x = x + self.drop(self.cross_out(y), deterministic=not train)
        return x + self.drop(self.mlp(self.norm3(x), train=train), deterministic=not train)


def decoder_macs(tokens: int, memory: int, width: int, num_layers: int, mlp_size: int) -> int:
    """Multiply-accumulates of decoder blocks on `tokens` tokens with `memory` encoder tokens, all of `width` channels.

    The same at once and token by token: masked products count too.
    """
    cross = 2 * (tokens + memory) * width**2 + 2 * tokens * memory * width
    return num_layers * (attention_macs(tokens, width) + cross + 2 * tokens * width * mlp_size)
