"""ColTran's first stage (Kumar et al. 2021, https://arxiv.org/abs/2102.04432): coarse colors, one symbol a pixel.

A gray encoder reads the whole gray picture into z. The outer decoder turns the colors of all rows above a pixel, and
the inner decoder those to its left, into logits over 512 colors; both are conditioned on z. A second head predicts
every pixel from z alone. Where the published code and the paper's text differ (norms after the residual sum, statistics
of norms over the whole picture) this is the code, which made the published weights.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.layers.transformer import layer_norm
from jax_densevit.models.coltran.conditional import EPSILON, INITIALIZERS, Conditioning
from jax_densevit.models.coltran.stack import ENCODER, INNER, OUTER, AxialStack, stack_macs
from jax_densevit.models.output import SymbolOutput
from jax_densevit.models.registry import register_model

SYMBOLS = 512  # three bits a channel
SMALL = {"hidden_size": 256, "mlp_size": 256}
# The published test configs.
TINY = {"hidden_size": 32, "mlp_size": 32, "num_heads": 1}
_ADDITION = {"cond_mlp": "", "cond_ln": False, "cond_att_q": False, "cond_att_k": False, "cond_att_v": False}


def _macs(model: "Colorizer", size: tuple[int, int]) -> int:
    width, mlp_size, conditioning = model.hidden_size, model.mlp_size, model.conditioning
    total = stack_macs(model.encoder_layers, ENCODER, width, mlp_size, size)
    total += stack_macs(model.outer_layers, OUTER, width, mlp_size, size, width, conditioning)
    total += stack_macs(model.inner_layers, INNER, width, mlp_size, size, 2 * width, conditioning)
    return total + (1 + model.parallel_head) * size[0] * size[1] * width * SYMBOLS


@register_model(
    "coltran_colorizer",
    variants={
        "ColTran": {},
        "ColTran-B": _ADDITION,
        "ColTran-S": {"image_size": (28, 28)},
        "small": SMALL,
        "tiny": {**TINY, "encoder_layers": 1, "outer_layers": 1, "inner_layers": 1},
    },
    default_variant="ColTran",
    macs=_macs,
    image_size=(64, 64),
    num_classes=SYMBOLS,
)
class Colorizer(nn.Module):
    """The colorizer; see the head of this file. Variants: ColTran, and the paper's controls ColTran-B (conditions are
    only added) and ColTran-S (28 x 28 pixels); "small" has half the width, "tiny" is for tests.

    Parameters: `gray_encoder` (see :class:`GrayEncoder`), `symbol_embedding/embedding [512, D]`, `outer_decoder` and
    `inner_decoder` (see `stack.AxialStack`), `final_norm/{scale,bias}`, `head/{kernel,bias}`, `parallel/kernel`.

    Attributes:
      image_size: (height, width), or a side, of the pictures. Tables of positions and of pooling weights have this
        size: other pictures are refused.
      hidden_size: D; mlp_size; num_heads.
      encoder_layers, outer_layers, inner_layers: layers of the three stacks.
      skip ... cond_att_init: the switches of both decoders, under the names of the published configs; see
        `conditional.Conditioning` (`cond_ln*` are its `norm*`, `cond_att_{q,k,v}` its `attention`).
      parallel_head: whether there is the second head.
      dropout: rate after every attention and MLP; 0 in all published configs.
      attention: implementation of attention over whole pictures, see `layers.axial_attention.axial_attention`.
      remat: a name of `REMAT_POLICIES`, for every layer.
      dtype: type of the computation; parameters, softmax, norms and logits are float32.
    """

    image_size: int | tuple[int, int] = (64, 64)
    hidden_size: int = 512
    mlp_size: int = 512
    num_heads: int = 4
    encoder_layers: int = 4
    outer_layers: int = 2
    inner_layers: int = 2
    skip: bool = True
    cond_mlp: str = "affine"
    cond_mlp_act: str = "identity"
    cond_ln: bool = True
    cond_ln_act: str = "identity"
    cond_ln_seq: str = "sc"
    cond_ln_sp_ave: str = "learnable"
    cond_ln_init: str = "glorot_uniform"
    cond_att_q: bool = True
    cond_att_k: bool = True
    cond_att_v: bool = True
    cond_att_scale: bool = True
    cond_att_act: str = "identity"
    cond_att_init: str = "glorot_uniform"
    parallel_head: bool = True
    dropout: float = 0.0
    attention: str = "xla"
    remat: str = "none"
    dtype: Any = jnp.float32

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the pictures."""
        return square_or_pair(self.image_size)

    @property
    def conditioning(self) -> Conditioning:
        """The switches of both decoders."""
        return Conditioning(
            skip=self.skip,
            mlp=self.cond_mlp,
            mlp_act=self.cond_mlp_act,
            norm=self.cond_ln,
            norm_act=self.cond_ln_act,
            norm_sequence=self.cond_ln_seq,
            norm_pool=self.cond_ln_sp_ave,
            norm_init=self.cond_ln_init,
            attention=tuple(name for name in "qkv" if getattr(self, f"cond_att_{name}")),
            attention_scale=self.cond_att_scale,
            attention_act=self.cond_att_act,
            attention_init=self.cond_att_init,
        )

    def example_inputs(self, image_size: tuple[int, int], batch_size: int = 1) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What a call takes, as shapes; see `models.registry.example_inputs`."""
        return (jax.ShapeDtypeStruct((batch_size, *image_size), jnp.int32),) * 2

    def setup(self):
        sizes = {
            "width": self.hidden_size,
            "mlp_size": self.mlp_size,
            "num_heads": self.num_heads,
            "size": self.size,
            "dropout": self.dropout,
            "attention": self.attention,
            "remat": self.remat,
            "dtype": self.dtype,
        }
        width, conditioning = self.hidden_size, self.conditioning
        init = INITIALIZERS["glorot_uniform"]
        self.gray_encoder = GrayEncoder(AxialStack(self.encoder_layers, ENCODER, **sizes, parent=None))
        self.outer_decoder = AxialStack(self.outer_layers, OUTER, context=width, conditioning=conditioning, **sizes)
        self.inner_decoder = AxialStack(self.inner_layers, INNER, context=2 * width, conditioning=conditioning, **sizes)
        self.symbol_embedding = nn.Embed(SYMBOLS, width, self.dtype, embedding_init=init)
        self.final_norm = layer_norm(EPSILON, jnp.float32, "final_norm")
        self.head = nn.Dense(SYMBOLS, kernel_init=init)
        if self.parallel_head:
            self.parallel = nn.Dense(SYMBOLS, use_bias=False, kernel_init=init)

    def __call__(self, gray: jax.Array, symbols: jax.Array, train: bool = False) -> SymbolOutput:
        """Teacher forcing: the logits of every pixel given the true colors before it.

        Args:
          gray: int `[B, H, W]` in 0..255, as `layers.bits.gray_from_int32` makes it.
          symbols: int `[B, H, W]` in 0..511, as `layers.bits.to_symbols` of 3-bit colors.
          train: dropout, where the model has some.

        Returns:
          Logits of both heads over the 512 symbols.
        """
        z = self.encode(gray, train)
        e = self.embed(symbols)
        u = self.outer(e, z, train=train)
        hidden = self.inner(e, u, z, train=train)
        return SymbolOutput(self.logits(hidden), self.parallel_logits(z) if self.parallel_head else None)

    def encode(self, gray: jax.Array, train: bool = False) -> jax.Array:
        """Gray int `[B, H, W]` -> z `[B, H, W, D]`, all that the decoders know of the gray picture."""
        return self.gray_encoder(gray, train)

    def embed(self, symbols: jax.Array) -> jax.Array:
        """Symbols int `[...]` -> e `[..., D]`, not shifted."""
        return self.symbol_embedding(symbols)

    def outer(self, e: jax.Array, z: jax.Array, train: bool = False) -> jax.Array:
        """e and z `[B, H, W, D]` -> u `[B, H, W, D]`: row i of it knows the colors of rows before i, and all of z."""
        x = e + z if self.skip else e
        return shift_down(self.outer_decoder(x, z, z, train=train))

    def inner(self, e: jax.Array, u: jax.Array, z: jax.Array, by_row: bool = False, train: bool = False) -> jax.Array:
        """e, u and z `[B, H, W, D]` -> hidden states `[B, H, W, D]`, each of which knows the colors before its pixel.

        `by_row` averages the conditions of norms row by row, as the published sampler does and its training does not.
        """
        x = shift_right(e)
        x = x + (z + u) if self.skip else x
        return self.inner_decoder(x, jnp.concatenate([z, u], -1), z, by_row, train)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden state `[..., D]` -> logits `[..., 512]`, float32."""
        return self.head(self.final_norm(hidden))

    def parallel_logits(self, z: jax.Array) -> jax.Array:
        """z `[..., D]` -> logits of the second head `[..., 512]`, float32."""
        return self.parallel(z.astype(jnp.float32))

    # The same, piece by piece, for a sampler. It computes `encode` and both `*_norms` once; for every row the inner
    # conditions and inputs, then its pixels by `inner_step` (or, when their colors are guessed, the whole row by
    # `inner_row`), then `outer_row`, which gives the next row of u. Row 0 of u is zeros.

    def outer_norms(self, z: jax.Array) -> list:
        """Scales and shifts of the outer decoder's norms, float32 `[B, D]` each."""
        return jax.tree.map(lambda c: c[:, 0], self.outer_decoder.condition_norms(z))

    def inner_norms(self, z: jax.Array, by_row: bool = False) -> list:
        """Scales and shifts of the inner decoder's norms, float32 `[B, 1, D]` each, or `[B, H, D]` by row."""
        return self.inner_decoder.condition_norms(z, by_row)

    def outer_conditions(self, z: jax.Array) -> list:
        """Any part of z `[..., D]` -> the conditions of the outer decoder there, leading axes kept."""
        return self.outer_decoder.condition(z)

    def outer_cache(self, batch: int) -> list:
        """Zeros for the first :meth:`outer_row`: keys and values `[B, W, heads, H, d]` of every layer."""
        return self.outer_decoder.empty_cache(batch)

    def outer_row(
        self, e: jax.Array, z: jax.Array, row: jax.Array, conditions: list, norms: list, cache: list
    ) -> tuple[jax.Array, list]:
        """Row `row` of e and z `[B, W, D]` -> row `row + 1` of u `[B, W, D]`, and the cache. Rows come in order."""
        x = (e + z if self.skip else e) + self.outer_decoder.positions(row)
        return self.outer_decoder.advance(x, row, conditions, norms, cache)

    def inner_conditions(self, u: jax.Array, z: jax.Array) -> list:
        """Any part of u and z, `[..., D]` each -> the conditions of the inner decoder there, leading axes kept."""
        return self.inner_decoder.condition(jnp.concatenate([z, u], -1))

    def inner_inputs(self, u: jax.Array, z: jax.Array, row: jax.Array) -> jax.Array:
        """Row `row` of u and z `[B, W, D]` -> what is added to each left neighbor's embedding there `[B, W, D]`."""
        positions = jnp.broadcast_to(self.inner_decoder.positions(row), z.shape)
        return positions + (z + u) if self.skip else positions

    def inner_cache(self, batch: int) -> list:
        """Zeros for the first :meth:`inner_step` of a row: keys and values `[B, heads, W, d]` of every layer."""
        return self.inner_decoder.empty_cache(batch)

    def inner_step(
        self, x: jax.Array, column: jax.Array, conditions: list, norms: list, cache: list
    ) -> tuple[jax.Array, list]:
        """The hidden state of one pixel `[B, D]`, and the cache.

        Args:
          x: `[B, D]`, the pixel's `inner_inputs` plus the embedding of its left neighbor (nothing in column 0).
          column: index, may be traced; columns come in order from 0.
          conditions: those of the pixel, `[B, ...]`; norms: `[B, D]`, those of its row.
          cache: of the step before.
        """
        return self.inner_decoder.advance(x, column, conditions, norms, cache)

    def inner_row(self, e: jax.Array, inputs: jax.Array, conditions: list, norms: list) -> jax.Array:
        """Hidden states of a whole row `[B, W, D]` from its embeddings e `[B, W, D]`, `inner_inputs` and conditions."""
        x = shift_right(e[:, None]) + inputs[:, None]
        conditions = jax.tree.map(lambda c: c[:, None], conditions)
        return self.inner_decoder.apply_conditioned(x, conditions, norms)[:, 0]


class GrayEncoder(nn.Module):
    """Embeddings of gray values, then unmasked layers. Parameters: `embedding [256, D]`, `bias [D]` and `stack`."""

    stack: AxialStack

    @nn.compact
    def __call__(self, gray: jax.Array, train: bool = False) -> jax.Array:
        """Gray int `[B, H, W]` in 0..255 -> `[B, H, W, D]`."""
        embedding = self.param("embedding", INITIALIZERS["glorot_uniform"], (256, self.stack.width))
        bias = self.param("bias", nn.initializers.zeros, (self.stack.width,))
        return self.stack(jnp.take((embedding + bias).astype(self.stack.dtype), gray, axis=0), train=train)


def shift_down(x: jax.Array) -> jax.Array:
    """`[B, H, W, D]` with every row one lower and zeros on top."""
    return jnp.pad(x, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]


def shift_right(x: jax.Array) -> jax.Array:
    """`[B, H, W, D]` with every column one further right and zeros on the left."""
    return jnp.pad(x, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1]


def square_or_pair(image_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size given as such or as the side of a square."""
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
