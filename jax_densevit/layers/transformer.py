"""The transformer encoder that every plain ViT here shares: blocks unrolled or scanned, kept or rematerialised.

Parameter trees of the two forms convert into each other with :func:`stack_blocks` and :func:`unstack_blocks`.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.activation import gelu_exact
from jax_densevit.layers.attention import SelfAttention, attention_macs
from jax_densevit.layers.fields import shared_fields
from jax_densevit.layers.normalization import LayerNorm
from jax_densevit.layers.placement import layer_maker
from jax_densevit.layers.product import flat_product

# What the backward pass finds in memory, and what it computes again.
REMAT_POLICIES = {
    "none": None,  # keep everything
    "full": jax.checkpoint_policies.nothing_saveable,  # keep the input of each block: a third more compute
    "dots": jax.checkpoint_policies.dots_saveable,  # keep the results of all matrix products
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the same without the T x T attention
}
GELUS = ("erf", "tanh")
NORM_STYLES = ("pre", "post")


def gelu(x: jax.Array, flavor: str = "erf") -> jax.Array:
    """GELU (Hendrycks & Gimpel 2016): "erf" is exact (timm, DeiT, SETR), "tanh" the approximation (Google's ViTs)."""
    check_name("GELU flavour", flavor, GELUS)
    return gelu_exact(x) if flavor == "erf" else jax.nn.gelu(x, approximate=True)


def drop_path(x: jax.Array, rate: jax.Array | float, key: jax.Array) -> jax.Array:
    """Stochastic depth (Huang et al. 2016): zeroes whole examples of a residual branch, scales the others by 1 / keep.

    `rate` may be traced, so that the layers of a scan can have different rates.
    """
    keep = 1.0 - rate
    kept = jax.random.bernoulli(key, keep, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(kept, x / jnp.asarray(keep, x.dtype), jnp.zeros((), x.dtype))


class Mlp(nn.Module):
    """`fc2(dropout(gelu(fc1(x))))`, the feed-forward half of a block. Attributes as in :class:`EncoderBlock`."""

    mlp_size: int
    gelu: str = "erf"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """`[..., D]` -> `[..., D]`."""
        init = nn.initializers.normal(0.02)
        y = nn.Dense(self.mlp_size, dtype=self.dtype, kernel_init=init, dot_general=flat_product, name="fc1")(x)
        y = nn.Dropout(self.dropout)(gelu(y, self.gelu), deterministic=not train)
        return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=init, dot_general=flat_product, name="fc2")(y)


class EncoderBlock(nn.Module):
    """Transformer block: `x += attention(norm1(x)); x += mlp(norm2(x))` (pre-norm, Dosovitskiy et al. 2021).

    Post-norm is the original form (Vaswani et al. 2017, BERT): `x = norm1(x + attention(x)); x = norm2(x + mlp(x))`.

    Attributes:
      num_heads, mlp_size: sizes.
      gelu: "erf" or "tanh".
      norm_epsilon: epsilon of the layer norms (1e-6 in nearly all ViTs, 1e-12 in Hugging Face's).
      dropout: rate after the attention projection, after GELU and after fc2 (Google's placement).
      stochastic: whether residual branches are dropped at the rate given to the call.
      attention: implementation of attention, see `attend`.
      dtype: type of the computation. Layer-norm statistics are float32 whatever it is.
      norm_style: "pre" or "post".
      attention_dropout: rate of the attention weights.
      mlp_dropout: rate after GELU, where it is not `dropout` (BERT has none there).
    """

    num_heads: int
    mlp_size: int
    gelu: str = "erf"
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    stochastic: bool = False
    attention: str = "xla"
    dtype: Any = jnp.float32
    norm_style: str = "pre"
    attention_dropout: float = 0.0
    mlp_dropout: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array, drop_path_rate: jax.Array | float = 0.0, *, train: bool = False) -> jax.Array:
        """`[B, T, D]` -> `[B, T, D]`. Needs the rng stream "dropout" in training when a rate is above 0."""

        def residual(branch):
            branch = nn.Dropout(self.dropout)(branch, deterministic=not train)
            return drop_path(branch, drop_path_rate, self.make_rng("dropout")) if train and self.stochastic else branch

        check_name("position of the layer norms (norm_style)", self.norm_style, NORM_STYLES)
        attention = SelfAttention(
            self.num_heads, self.attention, self.dtype, dropout=self.attention_dropout, name="attention"
        )
        mlp_dropout = self.dropout if self.mlp_dropout is None else self.mlp_dropout
        mlp = Mlp(self.mlp_size, self.gelu, mlp_dropout, self.dtype, name="mlp")
        for i, branch in ((1, attention), (2, mlp)):
            norm = layer_norm(self.norm_epsilon, self.dtype, f"norm{i}")
            if self.norm_style == "pre":
                x = x + residual(branch(norm(x), train=train))
            else:
                x = norm(x + residual(branch(x, train=train)))
        return x


def layer_norm(epsilon: float, dtype: Any, name: str | None) -> LayerNorm:
    """The layer norm of every transformer here."""
    return LayerNorm(epsilon, dtype, name=name)


class EncoderOptions(nn.Module, kw_only=True):
    """The fields of :class:`Encoder` that models around it have, too, and pass on.

    Attributes:
      gelu, norm_epsilon, dropout, attention, dtype: see :class:`EncoderBlock`.
      drop_path: rate of stochastic depth of the last block; block i of L has `drop_path * i / (L - 1)`.
      scan: run each segment as one scanned block: program size and tracing time no longer grow with depth.
      remat: a name of `REMAT_POLICIES`. Scanning without it keeps more memory than unrolling: use them together.
    """

    gelu: str = "erf"
    norm_epsilon: float = 1e-6
    dropout: float = 0.0
    drop_path: float = 0.0
    attention: str = "xla"
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32


class Encoder(EncoderOptions):
    """A stack of :class:`EncoderBlock`, without a norm after the last.

    Parameters, unrolled: `block_0`, `block_1`, ... Scanned: one entry `blocks_<start>_<stop>` per segment between taps,
    whose leaves carry the layers `start .. stop - 1` on axis 0. The same key initialises both forms to the same
    numbers, and the same dropout key drops the same elements.

    Attributes:
      num_layers: number of blocks.
      taps: block numbers, counted from 1, whose outputs are returned beside the last one's.
      Others: see :class:`EncoderOptions` and :class:`EncoderBlock`.
    """

    num_layers: int
    num_heads: int
    mlp_size: int
    taps: tuple[int, ...] = ()
    norm_style: str = "pre"
    attention_dropout: float = 0.0
    mlp_dropout: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> dict[int, jax.Array]:
        """`[B, T, D]` -> {block number from 1: its output `[B, T, D]`} for every tap and the last block."""
        block = EncoderBlock(
            **shared_fields(self, EncoderBlock),
            stochastic=self.drop_path > 0,
            parent=None,  # applied as a function: its parameters are held here, one entry per block or per segment
        )
        random = train and any((self.dropout, self.drop_path, self.attention_dropout, self.mlp_dropout))
        drop_keys = _keys(self.make_rng("dropout"), self.num_layers) if random else None
        one_token = jnp.zeros((1, 1, x.shape[-1]), self.dtype)
        held = hold_blocks(
            self, lambda key: block.init(key, one_token)["params"], self.num_layers, taps=self.taps, scan=self.scan
        )
        rates = jnp.asarray(np.linspace(0.0, self.drop_path, self.num_layers), jnp.float32)

        def apply(whole, x, layer):
            params, rate, key = layer
            rngs = None if key is None else {"dropout": key}
            return block.apply({"params": whole(params)}, x, rate, train=train, rngs=rngs)

        outputs = {}
        for (start, stop), params in held.items():
            whole = layer_maker((*self.path, segment_name(start, stop))) if self.scan else lambda params: params
            run = rematerialise(functools.partial(apply, whole), self.remat, prevent_cse=not self.scan)
            if self.scan:
                layers = (params, rates[start:stop], None if drop_keys is None else drop_keys[start:stop])
                x, _ = jax.lax.scan(lambda x, layer, run=run: (run(x, layer), None), x, layers)
            else:
                for i in range(start, stop):
                    x = run(x, (params[i - start], rates[i], None if drop_keys is None else drop_keys[i]))
            outputs[stop] = x
        return outputs


def hold_blocks(
    module: nn.Module,
    init: Callable[[jax.Array], Any],
    num_layers: int,
    *,
    taps: Sequence[int] = (),
    scan: bool = False,
) -> dict[tuple[int, int], Any]:
    """The parameters of equal blocks, held by `module` for blocks that are applied as functions.

    To be called in a compact method. The parameters are named as in :class:`Encoder`, so :func:`stack_blocks` and
    :func:`unstack_blocks` convert them.

    Args:
      module: who holds them.
      init: key -> parameters of one block.
      num_layers, taps: as in :class:`Encoder`.
      scan: hold each segment stacked.

    Returns:
      {(start, stop): a list of the blocks' parameters, or with `scan` one tree with the blocks on axis 0} by segment.

    Raises:
      UserError: the parameters that the module was given have the other form.
    """
    initial = None
    if module.is_initializing():
        # Not a key of its own per block: scanned and unrolled encoders must start from the same numbers.
        # All blocks are drawn by one vectorised call: a program of eight random arrays instead of eight per block.
        initial = jax.vmap(init)(_keys(module.make_rng("params"), num_layers))

    def parameters(name, index):
        if module.is_initializing():
            return module.param(name, lambda _: jax.tree.map(lambda leaf: leaf[index], initial))
        if not module.has_variable("params", name):
            form = "scanned" if scan else "unrolled"
            raise UserError(
                f"The parameters have no {'/'.join((*module.path, name))!r}, which this {form} encoder with taps "
                f"{tuple(taps)} reads; convert them with unstack_blocks and stack_blocks of layers.transformer."
            )
        return module.get_variable("params", name)

    def segment(start, stop):
        if scan:
            return parameters(segment_name(start, stop), slice(start, stop))
        return [parameters(f"block_{i}", i) for i in range(start, stop)]

    return {(start, stop): segment(start, stop) for start, stop in segments(num_layers, taps)}


def segment_name(start: int, stop: int) -> str:
    """The name under which the stacked blocks `start .. stop - 1` are held."""
    return f"blocks_{start}_{stop}"


def _keys(key: jax.Array, count: int) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))


def segments(num_layers: int, taps: Sequence[int] = ()) -> list[tuple[int, int]]:
    """The (start, stop) ranges of blocks between taps: `segments(24, (10, 15))` is `[(0, 10), (10, 15), (15, 24)]`.

    Raises:
      UserError: a tap outside 1 .. num_layers.
    """
    for tap in taps:
        if not 1 <= tap <= num_layers:
            raise UserError(f"There is no block {tap} to tap; the num_layers={num_layers} blocks count from 1.")
    stops = sorted({*taps, num_layers})
    return list(zip([0, *stops[:-1]], stops, strict=True))


def rematerialise(function, policy: str, *, prevent_cse: bool = True):
    """`function` under `jax.checkpoint` with a named policy of `REMAT_POLICIES`; itself for "none".

    `prevent_cse=False` is right (and faster) inside `lax.scan` only.
    """
    check_name("rematerialisation policy (remat)", policy, REMAT_POLICIES)
    if policy == "none":
        return function
    return jax.checkpoint(function, policy=REMAT_POLICIES[policy], prevent_cse=prevent_cse)


def encoder_macs(tokens: int, width: int, num_layers: int, mlp_size: int) -> int:
    """Multiply-accumulates of the blocks of an encoder for one sequence of `tokens` tokens."""
    return num_layers * (attention_macs(tokens, width) + 2 * tokens * width * mlp_size)


_UNROLLED = re.compile(r"block_(\d+)")
_STACKED = re.compile(r"blocks_(\d+)_(\d+)")


def unstack_blocks(tree: dict[str, Any]) -> dict[str, Any]:
    """Turns every scanned encoder of a parameter tree (nested dicts, at any depth) into its unrolled form.

    Works on parameters and on everything shaped like them (moving averages, gradients). Leaves may be JAX or NumPy
    arrays. A tree that is unrolled already comes back equal.
    """
    out = {}
    for name, value in tree.items():
        stacked = _STACKED.fullmatch(name)
        if stacked:
            start, stop = int(stacked[1]), int(stacked[2])
            for i in range(start, stop):
                out[f"block_{i}"] = jax.tree.map(lambda leaf, j=i - start: leaf[j], value)
        else:
            out[name] = unstack_blocks(value) if isinstance(value, dict) else value
    return out


def stack_blocks(tree: dict[str, Any], taps: Sequence[int] = ()) -> dict[str, Any]:
    """Turns every unrolled encoder of a parameter tree into the scanned form of an encoder with these `taps`.

    The inverse of :func:`unstack_blocks`; to move a scanned tree to other taps, unstack it first.

    Args:
      tree: nested dicts with entries `block_0`, `block_1`, ... somewhere.
      taps: of the encoder that will read the result (`Encoder.taps`; for SETR `model.taps`).
    """
    blocks = {int(m[1]): value for name, value in tree.items() if (m := _UNROLLED.fullmatch(name))}
    out = {}
    for name, value in tree.items():
        if not _UNROLLED.fullmatch(name):
            out[name] = stack_blocks(value, taps) if isinstance(value, dict) else value
    if blocks:
        if sorted(blocks) != list(range(len(blocks))):
            raise ValueError(f"the blocks of an unrolled encoder count from 0 without a gap; found {sorted(blocks)}")
        for start, stop in segments(len(blocks), taps):
            out[f"blocks_{start}_{stop}"] = jax.tree.map(_stack, *(blocks[i] for i in range(start, stop)))
    return out


def _stack(*leaves):
    return np.stack(leaves) if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp.stack(leaves)
