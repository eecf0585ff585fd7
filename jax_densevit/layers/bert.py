"""BERT's encoder around image patches (Devlin et al. 2019, https://arxiv.org/abs/1810.04805).

What precedes the blocks: learned positions and a token type added once at the input, a norm, dropout. What follows the
report "Image Segmentation with Transformers" (Schmidt-Mengin 2021): post-norm blocks, layer-norm epsilon 1e-12, exact
GELU, dropout 0.1 of hidden states and of attention weights.

Modules hold these parameters at their own top level, as `BertModel` does: `position_embedding [1, rows, D]`,
`token_type_embedding [2, D]`, `norm/{scale,bias}`, `encoder/block_<i>/...` (see `layers.transformer.Encoder`).
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.embedding import native_grid, resize_positions
from jax_densevit.layers.fields import shared_fields
from jax_densevit.layers.transformer import NORM_STYLES, Encoder, layer_norm

POSITIONS = 512  # rows of BERT's position table
TOKEN_TYPES = 2
EPSILON = 1e-12
_NORMAL = nn.initializers.normal(0.02)


class BertOptions(nn.Module):
    """The fields that modules around these layers have besides their sizes.

    Attributes:
      pos_rule: how the position table is resized to other images, see `layers.embedding.POSITION_RULES`.
      norm_style: "post", as BERT, or "pre", which needs a norm behind the encoder.
      dropout: rate of the hidden states: after the embedding and after each branch.
      attention_dropout: rate of the attention weights.
      token_type: whether the (constant) vector of BERT's token type 0 is added.
      bert_compatible: the parameters of Hugging Face's `BertModel`, for weights from and to there: 512 positions
        counted along the sequence whatever the width of the image, and a pooler that nothing reads.
      vocabulary: with `bert_compatible`, rows of a word table that nothing reads.
      attention: implementation of attention, see `layers.attention.attend`.
      remat: what the backward pass keeps, see `layers.transformer.REMAT_POLICIES`.
      dtype: type of the computation; parameters, norms' statistics and outputs are float32.
    """

    pos_rule: str = "timm"
    norm_style: str = "post"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    token_type: bool = True
    bert_compatible: bool = False
    vocabulary: int = 0
    attention: str = "xla"
    remat: str = "none"
    dtype: Any = jnp.float32


def embed_tokens(
    module: BertOptions, patches: jax.Array, *, train: bool, queries: jax.Array | None = None
) -> jax.Array:
    """What enters the first block; to be called in `module`'s compact method.

    Args:
      module: who holds the parameters.
      patches: `[B, h, w, D]`, embedded.
      train: whether to drop.
      queries: `[Q, D]`, put before the patches. They have positions in BERT's form only, the first Q rows.

    Returns:
      `[B, Q + h * w, D]`.

    Raises:
      UserError: options that contradict each other; with `bert_compatible`, a sequence of more than 512 tokens.
    """
    check_name("position of the layer norms (norm_style)", module.norm_style, NORM_STYLES)
    if module.bert_compatible and (module.norm_style != "post" or not module.token_type):
        raise UserError("bert_compatible=True is BERT: it needs norm_style='post' and token_type=True.")
    if module.vocabulary and not module.bert_compatible:
        raise UserError(f"vocabulary={module.vocabulary} is a part of BERT only; set bert_compatible=True, or 0.")
    batch, height, width, channels = patches.shape
    count = 0 if queries is None else queries.shape[0]
    positions = _positions(module, height, width, count).astype(module.dtype)
    x = patches.reshape(batch, height * width, channels)
    if count:
        before = jnp.broadcast_to(queries.astype(module.dtype), (batch, count, channels))
        if not module.bert_compatible:
            positions = jnp.pad(positions, ((0, 0), (count, 0), (0, 0)))
        x = jnp.concatenate([before, x], 1)
    x = x + positions
    if module.token_type:
        types = module.param("token_type_embedding", _NORMAL, (TOKEN_TYPES, channels), jnp.float32)
        x = x + types[0].astype(module.dtype)
    if module.bert_compatible:
        _hold_unread(module)
    x = layer_norm(EPSILON, module.dtype, "norm")(x)
    return nn.Dropout(module.dropout)(x, deterministic=not train)


def bert_encoder(module: BertOptions, taps: Sequence[int] = ()) -> Encoder:
    """The blocks of `module`, named "encoder"."""
    options = {**shared_fields(module, Encoder), "taps": tuple(taps), "norm_epsilon": EPSILON, "mlp_dropout": 0.0}
    return Encoder(**options, name="encoder")


def _positions(module: nn.Module, height: int, width: int, before: int) -> jax.Array:
    """float32 `[1, height * width, D]`; in BERT's form those of the `before` tokens too."""
    if not module.bert_compatible:
        grid = native_grid(module.image_size, module.patch_size)
        shape = (1, grid[0] * grid[1], module.hidden_size)
        table = module.param("position_embedding", _NORMAL, shape, jnp.float32)
        return resize_positions(table, grid, (height, width), module.pos_rule)
    table = module.param("position_embedding", _NORMAL, (1, POSITIONS, module.hidden_size), jnp.float32)
    tokens = before + height * width
    if tokens > POSITIONS:
        raise UserError(
            f"An image of {height} x {width} patches has more than BERT's {POSITIONS} positions; decode in "
            "windows (mode='slide'), or set bert_compatible=False."
        )
    return table[:, :tokens]


def _hold_unread(module: nn.Module) -> None:
    """Parameters that a `BertModel` has and these models never read."""
    width = module.hidden_size
    module.param("pooler_kernel", _NORMAL, (width, width), jnp.float32)
    module.param("pooler_bias", nn.initializers.zeros, (width,), jnp.float32)
    if module.vocabulary:
        module.param("word_embedding", _NORMAL, (module.vocabulary, width), jnp.float32)
