"""The stack of post-norm axial layers that ColTran's encoders, decoders and upsamplers are made of.

Every sublayer is `x = norm(x + f(x))`. A stack with a causal attention can also be run one line at a time
(:meth:`AxialStack.advance`), with keys and values kept: a sampler does no work twice.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.axial_attention import COLUMN, ROW, attend_position, axial_attention
from jax_densevit.layers.fields import shared_fields
from jax_densevit.layers.transformer import REMAT_POLICIES, layer_norm
from jax_densevit.models.coltran.conditional import (
    EPSILON,
    UNCONDITIONED,
    ConditionalAttention,
    ConditionalMlp,
    ConditionalNorm,
    Conditioning,
    Conditions,
)


class Branch(NamedTuple):
    """An attention and the MLP after it. `name`: prefix of their parameters; `axis`, `causal`: of the attention."""

    name: str
    axis: int
    causal: bool


ENCODER = (Branch("row", ROW, False), Branch("column", COLUMN, False))
OUTER = (Branch("row", ROW, False), Branch("column", COLUMN, True))
INNER = (Branch("row", ROW, True),)

# Keys and values `[B, ..., heads, L, d]` of every causal attention of a layer.
Cache = tuple[tuple[jax.Array, jax.Array], ...]


class AxialLayer(nn.Module):
    """For every branch: attention, MLP, each followed by the residual sum and a norm.

    Parameters: `<branch>_{attention,mlp}` (see `conditional`), `<branch>_{attention,mlp}_norm` (`{scale,bias}`, or
    those of `ConditionalNorm`). Attributes as in :class:`AxialStack`.
    """

    branches: tuple[Branch, ...]
    width: int
    mlp_size: int
    num_heads: int
    size: tuple[int, int]
    context: int = 0
    conditioning: Conditioning = UNCONDITIONED
    dropout: float = 0.0
    attention: str = "xla"
    dtype: Any = jnp.float32

    def setup(self):
        def norm(name):
            if self.conditioning.norm:
                return ConditionalNorm(self.width, self.size, self.conditioning, self.dtype, name=name)
            return layer_norm(EPSILON, self.dtype, name)

        self.attentions = [
            ConditionalAttention(
                self.width,
                self.num_heads,
                self.size[branch.axis - 1],
                branch.axis,
                branch.causal,
                self.context,
                self.conditioning,
                self.attention,
                self.dtype,
                name=f"{branch.name}_attention",
            )
            for branch in self.branches
        ]
        self.mlps = [
            ConditionalMlp(self.width, self.mlp_size, self.conditioning, self.dtype, name=f"{branch.name}_mlp")
            for branch in self.branches
        ]
        self.norms = [norm(f"{branch.name}_{part}_norm") for branch in self.branches for part in ("attention", "mlp")]
        self.drop = nn.Dropout(self.dropout)

    def condition(self, context: jax.Array | None) -> list[Conditions]:
        """What the branches take from a context `[..., C]`: projections alone, pixel by pixel."""
        return [
            {"attention": attention.condition(context), "mlp": mlp.condition(context)}
            for attention, mlp in zip(self.attentions, self.mlps, strict=True)
        ]

    def condition_norms(self, z: jax.Array | None, by_row: bool = False) -> list:
        """(scale, shift) of every norm from `z` `[B, H, W, D]`, see `ConditionalNorm.condition`; None of plain ones."""
        return [norm.condition(z, by_row) if self.conditioning.norm else None for norm in self.norms]

    def __call__(
        self, x: jax.Array, context: jax.Array | None, z: jax.Array | None, by_row: bool = False, train: bool = False
    ) -> jax.Array:
        """`[B, H, W, D]` -> `[B, H, W, D]`; `context` conditions attention and MLP, `z` the norms."""
        return self.apply_conditioned(x, self.condition(context), self.condition_norms(z, by_row), train)

    def apply_conditioned(self, x: jax.Array, conditions: list[Conditions], norms: list, train: bool = False):
        """The layer on `[B, h, W, D]`, whole rows, with conditions computed before."""
        for i, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = self._residual(2 * i, x, attention(x, conditions[i]["attention"]), norms, train)
            x = self._residual(2 * i + 1, x, mlp(x, conditions[i]["mlp"]), norms, train)
        return x

    def empty_cache(self, batch: int) -> Cache:
        """Zeros for :meth:`advance`."""
        size = self.width // self.num_heads
        caches = []
        for branch in self.branches:
            if branch.causal:
                lines = () if branch.axis == ROW else (self.size[1],)
                shape = (batch, *lines, self.num_heads, self.size[branch.axis - 1], size)
                caches.append((jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)))
        return tuple(caches)

    def advance(
        self, x: jax.Array, position: jax.Array, conditions: list[Conditions], norms: list, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        """The layer at one `position` of its causal axis: a row `[B, W, D]`, or a pixel `[B, D]` of a row.

        `conditions` and `norms` are those of that row or pixel: leading axes as x, `[B, D]` of norms. Positions come in
        order from 0.
        """
        kept, caches = [], list(cache)
        for i, (branch, attention, mlp) in enumerate(zip(self.branches, self.attentions, self.mlps, strict=True)):
            q, k, v = attention.project(x, conditions[i]["attention"])
            if branch.causal:
                at = (jnp.expand_dims(new, -2) for new in (k, v))
                keys, values = (
                    jax.lax.dynamic_update_slice_in_dim(old, new, position, axis=-2)
                    for old, new in zip(caches.pop(0), at, strict=True)
                )
                kept.append((keys, values))
                y = attend_position(q, keys, values, position, attention.relative_bias)
            else:
                one_row = (part[:, None] for part in (q, k, v))
                y = axial_attention(*one_row, axis=ROW, table=attention.relative_bias)[:, 0]
            x = self._residual(2 * i, x, attention.output(y), norms, False)
            x = self._residual(2 * i + 1, x, mlp(x, conditions[i]["mlp"]), norms, False)
        return x, tuple(kept)

    def _residual(self, index: int, x: jax.Array, branch: jax.Array, norms: list, train: bool) -> jax.Array:
        x = x + self.drop(branch, deterministic=not train)
        norm = self.norms[index]
        return norm(x, norms[index]) if self.conditioning.norm else norm(x)


class AxialStack(nn.Module):
    """Positions, then axial layers. There is no norm after the last layer's own.

    Parameters: `row_positions [H, 1, D]` and `column_positions [W, D]`, both added; `layer_<i>`.

    Attributes:
      num_layers: number of layers; branches: what each has, `ENCODER`, `OUTER` or `INNER`.
      width: D; mlp_size; num_heads; size: (H, W), which the parameters are made for.
      context: channels of the context; conditioning: see `Conditioning`.
      dropout: rate after every attention and MLP.
      attention: implementation of unmasked and masked attention over whole maps, see `axial_attention`.
      remat: a name of `REMAT_POLICIES`, for each layer.
      dtype: type of the computation; parameters, softmax and the statistics of norms are float32.
    """

    num_layers: int
    branches: tuple[Branch, ...]
    width: int
    mlp_size: int
    num_heads: int
    size: tuple[int, int]
    context: int = 0
    conditioning: Conditioning = UNCONDITIONED
    dropout: float = 0.0
    attention: str = "xla"
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        init = nn.initializers.normal(self.width**-0.5)
        self.row_positions = self.param("row_positions", init, (self.size[0], 1, self.width))
        self.column_positions = self.param("column_positions", init, (self.size[1], self.width))
        check_name("rematerialisation policy (remat)", self.remat, REMAT_POLICIES)
        kind = AxialLayer
        if self.remat != "none":
            kind = nn.remat(AxialLayer, policy=REMAT_POLICIES[self.remat], static_argnums=(4, 5))
        options = shared_fields(self, AxialLayer)
        self.layers = [kind(**options, name=f"layer_{i}") for i in range(self.num_layers)]

    def positions(self, row: jax.Array | None = None) -> jax.Array:
        """The positions of all pixels `[H, W, D]`, or of those in one row (an index, may be traced) `[W, D]`."""
        rows = self.row_positions if row is None else jax.lax.dynamic_index_in_dim(self.row_positions, row, 0, False)
        return (rows + self.column_positions).astype(self.dtype)

    def condition(self, context: jax.Array) -> list:
        """`AxialLayer.condition` of every layer."""
        return [layer.condition(context) for layer in self.layers]

    def condition_norms(self, z: jax.Array, by_row: bool = False) -> list:
        """`AxialLayer.condition_norms` of every layer."""
        return [layer.condition_norms(z, by_row) for layer in self.layers]

    def empty_cache(self, batch: int) -> list[Cache]:
        """`AxialLayer.empty_cache` of every layer."""
        return [layer.empty_cache(batch) for layer in self.layers]

    def __call__(
        self,
        x: jax.Array,
        context: jax.Array | None = None,
        z: jax.Array | None = None,
        by_row: bool = False,
        train: bool = False,
    ) -> jax.Array:
        """`[B, H, W, D]` -> `[B, H, W, D]`.

        Raises:
          UserError: a map of another size than the parameters are made for.
        """
        if x.shape[1:3] != tuple(self.size):
            raise UserError(
                f"This model is made for pictures of {self.size[0]} x {self.size[1]} (its tables of positions have "
                f"that size) and got {x.shape[1]} x {x.shape[2]}; resize the pictures, or build it with that "
                "image_size."
            )
        x = x.astype(self.dtype) + self.positions()
        for layer in self.layers:
            x = layer(x, context, z, by_row, train)
        return x

    def apply_conditioned(self, x: jax.Array, conditions: list, norms: list) -> jax.Array:
        """All layers on whole rows `[B, h, W, D]`, positions added already, with conditions computed before."""
        for layer, condition, norm in zip(self.layers, conditions, norms, strict=True):
            x = layer.apply_conditioned(x, condition, norm)
        return x

    def advance(
        self, x: jax.Array, position: jax.Array, conditions: list, norms: list, cache: list[Cache]
    ) -> tuple[jax.Array, list[Cache]]:
        """All layers at one position, see `AxialLayer.advance`; positions added already."""
        caches = []
        for layer, condition, norm, old in zip(self.layers, conditions, norms, cache, strict=True):
            x, new = layer.advance(x, position, condition, norm, old)
            caches.append(new)
        return x, caches


def stack_macs(
    num_layers: int,
    branches: tuple[Branch, ...],
    width: int,
    mlp_size: int,
    size: tuple[int, int],
    context: int = 0,
    conditioning: Conditioning = UNCONDITIONED,
) -> int:
    """Multiply-accumulates of one pass of an :class:`AxialStack` over one picture, conditions included."""
    pixels, total = size[0] * size[1], 0
    for branch in branches:
        total += pixels * (4 * width * width + 2 * size[branch.axis - 1] * width)  # projections; scores and mixing
        total += 2 * pixels * width * mlp_size
        total += len(conditioning.attention) * pixels * context * width * (1 + conditioning.attention_scale)
        if conditioning.mlp:
            total += pixels * context * width * (2 if conditioning.mlp == "affine" else 1)
        if conditioning.norm:
            total += 2 * 2 * width * width
    return num_layers * total
