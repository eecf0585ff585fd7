"""ColTran's conditional layers: attention, MLP and layer norm that a second map scales and shifts.

Every layer has two calls: `condition` turns the context into scales and shifts, the layer itself applies them. A
sampler computes the first once where training computes both together. No scale has "1 +" added to it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.axial_attention import axial_attention
from jax_densevit.layers.product import flat_product

EPSILON = 1e-3  # of every layer norm: Keras' default
ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}
# As Keras counts fans: of a kernel [D, heads, d] the first axis is a receptive field, which makes the numbers of
# attention kernels eight times smaller than those of a plain D x D matrix.
INITIALIZERS = {
    "glorot_uniform": nn.initializers.glorot_uniform(),
    "glorot_normal": nn.initializers.glorot_normal(),
    "zeros": nn.initializers.zeros,
}


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """Which parts of a decoder see its context, and how; every switch of the published configs.

    Attributes:
      skip: add the context to the input.
      mlp: "affine" (scale and shift), "shift", or "" for a plain MLP. mlp_act: activation of scale and shift.
      norm: conditional layer norms instead of plain ones. norm_act: activation of scale and shift.
      norm_sequence: "sc" pools over space and then projects, "cs" projects and then pools.
      norm_pool: "learnable" (a weight per pixel) or "mean". norm_init: initialisation of the projection.
      attention: which of "q", "k", "v" are conditioned. attention_scale: by scale and shift, or by shift alone.
      attention_act: activation of scale and shift; a shift alone has none. attention_init: of the projections.
    """

    skip: bool = True
    mlp: str = "affine"
    mlp_act: str = "identity"
    norm: bool = True
    norm_act: str = "identity"
    norm_sequence: str = "sc"
    norm_pool: str = "learnable"
    norm_init: str = "glorot_uniform"
    attention: tuple[str, ...] = ("q", "k", "v")
    attention_scale: bool = True
    attention_act: str = "identity"
    attention_init: str = "glorot_uniform"

    def __post_init__(self):
        check_name("kind of conditional MLP (cond_mlp)", self.mlp, ("affine", "shift", ""))
        check_name("sequence of conditional layer norm (cond_ln_seq)", self.norm_sequence, ("sc", "cs"))
        check_name("pooling of conditional layer norm (cond_ln_sp_ave)", self.norm_pool, ("learnable", "mean"))
        for act in (self.mlp_act, self.norm_act, self.attention_act):
            check_name("activation of conditions", act, ACTIVATIONS)
        for init in (self.norm_init, self.attention_init):
            check_name("initialisation of conditions", init, INITIALIZERS)


UNCONDITIONED = Conditioning(skip=False, mlp="", norm=False, attention=())

# Scales and shifts. Of an MLP and of an attention they have the context's leading axes; of a norm [B, 1 or H, D] each.
Conditions = dict[str, Any]


class ConditionalAttention(nn.Module):
    """Attention along one axis of a map, without any bias but that of relative positions.

    Parameters: `{q,k,v}_kernel [D, heads, d]`, `out_kernel [heads, d, D]`, `relative_bias [heads, 2 L]` (see
    `layers.axial_attention.relative_bias`) and, where conditioned, `cond_{q,k,v}_kernel [context, heads, 2 d]` (scale
    first, then shift; `[context, heads, d]` without scale).

    Attributes:
      width: D; num_heads; length: L, pixels along `axis`.
      axis, causal, implementation: of `axial_attention`.
      context: channels of the context; 0 without.
      conditioning: see :class:`Conditioning`.
      dtype: type of the computation.
    """

    width: int
    num_heads: int
    length: int
    axis: int
    causal: bool = False
    context: int = 0
    conditioning: Conditioning = UNCONDITIONED
    implementation: str = "xla"
    dtype: Any = jnp.float32

    def setup(self):
        if self.width % self.num_heads:
            raise UserError(f"num_heads={self.num_heads} does not divide hidden_size={self.width}; choose a divisor.")
        heads, size = self.num_heads, self.width // self.num_heads
        init = INITIALIZERS["glorot_uniform"]
        self.kernels = {name: self.param(f"{name}_kernel", init, (self.width, heads, size)) for name in "qkv"}
        self.out_kernel = self.param("out_kernel", init, (heads, size, self.width))
        self.relative_bias = self.param("relative_bias", nn.initializers.zeros, (heads, 2 * self.length))
        init = INITIALIZERS[self.conditioning.attention_init]
        shape = (self.context, heads, size * (1 + self.conditioning.attention_scale))
        self.cond_kernels = {
            name: self.param(f"cond_{name}_kernel", init, shape) for name in self.conditioning.attention
        }

    def condition(self, context: jax.Array | None) -> Conditions:
        """`[..., context]` -> the conditions of q, k and v by name, `[..., heads, d or 2 d]` each."""
        return {name: _project(context, kernel, self.dtype) for name, kernel in self.cond_kernels.items()}

    def project(self, x: jax.Array, conditions: Conditions) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`[..., D]` -> queries, keys and values `[..., heads, d]`."""
        projected = []
        for name, kernel in self.kernels.items():
            y = _project(x, kernel, self.dtype)
            if name in conditions and self.conditioning.attention_scale:
                scale, shift = jnp.split(conditions[name], 2, axis=-1)
                act = ACTIVATIONS[self.conditioning.attention_act]
                y = y * act(scale) + act(shift)
            elif name in conditions:
                y = y + conditions[name]
            projected.append(y)
        return tuple(projected)

    def output(self, y: jax.Array) -> jax.Array:
        """`[..., heads, d]` -> `[..., D]`."""
        return jnp.einsum("...nd,ndc->...c", y, self.out_kernel.astype(self.dtype))

    def __call__(self, x: jax.Array, conditions: Conditions) -> jax.Array:
        """`[B, H, W, D]` -> `[B, H, W, D]`."""
        y = axial_attention(
            *self.project(x, conditions),
            axis=self.axis,
            table=self.relative_bias,
            causal=self.causal,
            implementation=self.implementation,
        )
        return self.output(y)


class ConditionalMlp(nn.Module):
    """`fc2(relu(fc1(x)))`, then scaled and shifted, before the residual sum.

    Parameters: `{fc1,fc2}/{kernel,bias}` and, where conditioned, `cond/{kernel,bias}` with 2 D outputs (shift first,
    then scale: the other way round than everywhere else) or, for "shift", D.
    """

    width: int
    mlp_size: int
    conditioning: Conditioning = UNCONDITIONED
    dtype: Any = jnp.float32

    def setup(self):
        def dense(features: int) -> nn.Dense:
            return nn.Dense(
                features, dtype=self.dtype, kernel_init=INITIALIZERS["glorot_uniform"], dot_general=flat_product
            )

        self.fc1, self.fc2 = dense(self.mlp_size), dense(self.width)
        if self.conditioning.mlp:
            self.cond = dense(self.width * (2 if self.conditioning.mlp == "affine" else 1))

    def condition(self, context: jax.Array | None) -> jax.Array | None:
        """`[..., context]` -> `[..., D or 2 D]`, or None without conditions."""
        return self.cond(context) if self.conditioning.mlp else None

    def __call__(self, x: jax.Array, condition: jax.Array | None) -> jax.Array:
        """`[..., D]` -> `[..., D]`."""
        y = self.fc2(jax.nn.relu(self.fc1(x)))
        if self.conditioning.mlp == "affine":
            shift, scale = jnp.split(condition, 2, axis=-1)
            act = ACTIVATIONS[self.conditioning.mlp_act]
            y = y * act(scale) + act(shift)
        elif self.conditioning.mlp:
            y = y + condition
        return y


class ConditionalNorm(nn.Module):
    """Layer norm whose scale and shift are computed from the context, averaged over the picture.

    Parameters: `kernel [D, 2 D]` and `bias [2 D]` (scale first) and, with learnable pooling, the weight of every pixel,
    `pool [1, H, W, 1]`, which ties the model to its size. The average is over H x W, whatever the weights sum to.

    Attributes:
      size: (H, W); conditioning: see :class:`Conditioning`; dtype: of the result. All arithmetic is float32.
    """

    width: int
    size: tuple[int, int]
    conditioning: Conditioning
    dtype: Any = jnp.float32

    def setup(self):
        self.kernel = self.param("kernel", INITIALIZERS[self.conditioning.norm_init], (self.width, 2 * self.width))
        self.bias = self.param("bias", nn.initializers.zeros, (2 * self.width,))
        if self.conditioning.norm_pool == "learnable":
            self.pool = self.param("pool", nn.initializers.ones, (1, *self.size, 1))
        self.normalize = nn.LayerNorm(EPSILON, jnp.float32, use_bias=False, use_scale=False, use_fast_variance=False)

    def condition(self, z: jax.Array, by_row: bool = False) -> tuple[jax.Array, jax.Array]:
        """Scale and shift of a picture.

        Args:
          z: `[B, H, W, D]`.
          by_row: average over each row by itself instead of the picture, as the published sampler does (it hands a row
            of `z` to a layer trained on all of it, whose weights are then averaged over the rows).

        Returns:
          (scale, shift), float32 `[B, 1, D]` each, or `[B, H, D]` by row.
        """
        weights = self.pool if self.conditioning.norm_pool == "learnable" else jnp.ones((1, 1, 1, 1))
        if by_row:
            weights = weights.mean(1, keepdims=True)
        pooled = (weights * z.astype(jnp.float32)).mean(2 if by_row else (1, 2), keepdims=not by_row)
        pooled = pooled.reshape(z.shape[0], -1, z.shape[-1])
        # Pooling and projection are linear: only the bias knows which came first.
        bias = self.bias * (weights.mean() if self.conditioning.norm_sequence == "cs" else 1.0)
        vector = jnp.dot(pooled, self.kernel, precision="highest") + bias
        act: Callable = ACTIVATIONS[self.conditioning.norm_act]
        scale, shift = jnp.split(vector, 2, axis=-1)
        return act(scale), act(shift)

    def __call__(self, x: jax.Array, condition: tuple[jax.Array, jax.Array]) -> jax.Array:
        """`[B, ..., D]` -> `[B, ..., D]`; scale and shift are `[B, D]`, or `[B, 1 or H, D]` for x `[B, H, W, D]`."""
        scale, shift = (c.reshape(*c.shape[:-1], *(1,) * (x.ndim - c.ndim), c.shape[-1]) for c in condition)
        return (self.normalize(x.astype(jnp.float32)) * scale + shift).astype(self.dtype)


def _project(x: jax.Array, kernel: jax.Array, dtype: Any) -> jax.Array:
    return jnp.einsum("...c,cnd->...nd", x.astype(dtype), kernel.astype(dtype))
