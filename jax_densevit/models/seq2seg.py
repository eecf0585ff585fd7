"""Seq2Seg: image patches through a BERT encoder, the sum of all hidden states through one transposed convolution.

The encoder is BERT's (Devlin et al. 2019, https://arxiv.org/abs/1810.04805): post-norm blocks, layer-norm epsilon
1e-12, exact GELU, dropout 0.1 of hidden states and attention weights, learned positions added once at the input. The
decoder has no more than one product per token: each becomes its own patch of logits.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.convolution import Upsample
from jax_densevit.layers.embedding import PatchEmbedding, native_grid, pad_to_multiple, resize_positions
from jax_densevit.layers.transformer import NORM_STYLES, Encoder, encoder_macs, layer_norm
from jax_densevit.models.output import DenseOutput
from jax_densevit.models.registry import register_model

BERT_POSITIONS = 512  # rows of BERT's position table
TOKEN_TYPES = 2


def _macs(model: "Seq2Seg", size: tuple[int, int]) -> int:
    tokens = (-(-size[0] // model.patch_size)) * (-(-size[1] // model.patch_size))
    ends = model.patch_size**2 * model.hidden_size * (3 + model.num_classes)
    return tokens * ends + encoder_macs(tokens, model.hidden_size, model.num_layers, model.mlp_size)


@register_model(
    "seq2seg",
    variants={
        "skip": {},
        "no_skip": {"skip": False},
        "bert": {"bert_compatible": True},
        "bert_no_skip": {"bert_compatible": True, "skip": False},
    },
    default_variant="skip",
    macs=_macs,
    image_size=(128, 256),
    num_classes=34,
)
class Seq2Seg(nn.Module):
    """Semantic segmentation by a BERT encoder; see the head of this file.

    With 34 classes and 128 patches of 128 x 256 pixels there are 49,903,906 parameters, 49,902,370 without token types,
    and 50,789,410 in the published form, which is Hugging Face's `BertModel` and two layers.

    Parameters: `embedding/{kernel,bias}`, `position_embedding [1, rows, D]`, `token_type_embedding [2, D]`,
    `norm/{scale,bias}`, `encoder/block_<i>/...` (see `layers.transformer.Encoder`), `head/{kernel,bias}`; pre-norm also
    `final_norm/{scale,bias}`.

    Attributes:
      num_classes: K.
      hidden_size, num_layers, num_heads, mlp_size, patch_size: sizes. The report does not say how many heads there are;
        12 is BERT's number for this width.
      image_size: a side or (height, width): native size of the position table.
      pos_rule: how that table is resized to other images, see `layers.embedding.POSITION_RULES`.
      skip: decode the sum of the hidden states of all blocks; False decodes the last one only.
      include_embedding: whether that sum includes what enters the first block.
      norm_style: "post", as BERT, or "pre", which has a norm on what is decoded too.
      dropout: rate of the hidden states: after the embedding and after each branch.
      attention_dropout: rate of the attention weights.
      token_type: whether the (constant) vector of BERT's token type 0 is added.
      bert_compatible: the parameters of Hugging Face's `BertModel`, for weights from and to there: 512 positions
        counted along the rows whatever the width of the image, and a pooler that nothing reads.
      vocabulary: with `bert_compatible`, rows of a word table that nothing reads.
      attention: implementation of attention, see `layers.attention.attend`.
      remat: what the backward pass keeps, see `layers.transformer.REMAT_POLICIES`.
      dtype: type of the computation; parameters, norms' statistics and the head are float32.
    """

    num_classes: int = 34
    hidden_size: int = 768
    num_layers: int = 6
    num_heads: int = 12
    mlp_size: int = 3072
    patch_size: int = 16
    image_size: int | tuple[int, int] = (128, 256)
    pos_rule: str = "timm"
    skip: bool = True
    include_embedding: bool = True
    norm_style: str = "post"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    token_type: bool = True
    bert_compatible: bool = False
    vocabulary: int = 0
    attention: str = "xla"
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> DenseOutput:
        """`[B, H, W, 3]` normalised images -> logits `[B, h, w, K]`, h and w being H and W in whole patches.

        Training needs the rng stream "dropout" where a rate is above 0. `features`: "hidden" `[B, tokens, D]`, what is
        decoded.

        Raises:
          UserError: options that contradict each other; with `bert_compatible`, an image of more than 512 patches.
        """
        check_name("position of the layer norms (norm_style)", self.norm_style, NORM_STYLES)
        if self.bert_compatible and (self.norm_style != "post" or not self.token_type):
            raise UserError("bert_compatible=True is BERT: it needs norm_style='post' and token_type=True.")
        if self.vocabulary and not self.bert_compatible:
            raise UserError(f"vocabulary={self.vocabulary} is a part of BERT only; set bert_compatible=True, or 0.")
        images = pad_to_multiple(images, self.patch_size)
        x = PatchEmbedding(self.hidden_size, self.patch_size, self.dtype, name="embedding")(images)
        batch, height, width, _ = x.shape
        x = x.reshape(batch, height * width, self.hidden_size) + self._positions(height, width).astype(self.dtype)
        if self.token_type:
            types = self.param("token_type_embedding", _NORMAL, (TOKEN_TYPES, self.hidden_size), jnp.float32)
            x = x + types[0].astype(self.dtype)
        if self.bert_compatible:
            self._unread()
        x = layer_norm(1e-12, self.dtype, "norm")(x)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        outputs = Encoder(
            self.num_layers,
            self.num_heads,
            self.mlp_size,
            taps=tuple(range(1, self.num_layers + 1)) if self.skip else (),
            norm_epsilon=1e-12,
            dropout=self.dropout,
            attention=self.attention,
            remat=self.remat,
            dtype=self.dtype,
            norm_style=self.norm_style,
            attention_dropout=self.attention_dropout,
            mlp_dropout=0.0,
            name="encoder",
        )(x, train=train)
        states = [*([x] if self.include_embedding else []), *outputs.values()] if self.skip else outputs.values()
        hidden = sum(state.astype(jnp.float32) for state in states)
        if self.norm_style == "pre":
            hidden = layer_norm(1e-12, jnp.float32, "final_norm")(hidden)
        logits = Upsample(self.num_classes, self.patch_size, name="head")(
            hidden.reshape(batch, height, width, self.hidden_size)
        )
        return DenseOutput(logits=logits, features={"hidden": hidden}, covers=tuple(images.shape[1:3]))

    def _positions(self, height: int, width: int) -> jax.Array:
        """float32 `[1, height * width, D]`."""
        if not self.bert_compatible:
            grid = native_grid(self.image_size, self.patch_size)
            table = self.param("position_embedding", _NORMAL, (1, grid[0] * grid[1], self.hidden_size), jnp.float32)
            return resize_positions(table, grid, (height, width), self.pos_rule)
        table = self.param("position_embedding", _NORMAL, (1, BERT_POSITIONS, self.hidden_size), jnp.float32)
        if height * width > BERT_POSITIONS:
            raise UserError(
                f"An image of {height} x {width} patches has more than BERT's {BERT_POSITIONS} positions; decode in "
                "windows (mode='slide'), or set bert_compatible=False."
            )
        return table[:, : height * width]

    def _unread(self) -> None:
        """Parameters that a `BertModel` has and this model never reads."""
        width = self.hidden_size
        self.param("pooler_kernel", _NORMAL, (width, width), jnp.float32)
        self.param("pooler_bias", nn.initializers.zeros, (width,), jnp.float32)
        if self.vocabulary:
            self.param("word_embedding", _NORMAL, (self.vocabulary, width), jnp.float32)


_NORMAL = nn.initializers.normal(0.02)
