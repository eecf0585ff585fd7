"""Seq2Seg: image patches through a BERT encoder, the sum of all hidden states through one transposed convolution.

The encoder is BERT's, see `layers.bert`. The decoder has no more than one product per token: each becomes its own
patch of logits.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.layers.bert import EPSILON, BertOptions, bert_encoder, embed_tokens
from jax_densevit.layers.convolution import Upsample
from jax_densevit.layers.embedding import PatchEmbedding, pad_to_multiple
from jax_densevit.layers.transformer import encoder_macs, layer_norm
from jax_densevit.models.output import DenseOutput
from jax_densevit.models.registry import register_model


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
class Seq2Seg(BertOptions):
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
      skip: decode the sum of the hidden states of all blocks; False decodes the last one only.
      include_embedding: whether that sum includes what enters the first block.
      Others: see `layers.bert.BertOptions`.
    """

    num_classes: int = 34
    hidden_size: int = 768
    num_layers: int = 6
    num_heads: int = 12
    mlp_size: int = 3072
    patch_size: int = 16
    image_size: int | tuple[int, int] = (128, 256)
    skip: bool = True
    include_embedding: bool = True

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> DenseOutput:
        """`[B, H, W, 3]` normalised images -> logits `[B, h, w, K]`, h and w being H and W in whole patches.

        Training needs the rng stream "dropout" where a rate is above 0. `features`: "hidden" `[B, tokens, D]`, what is
        decoded.

        Raises:
          UserError: options that contradict each other; with `bert_compatible`, an image of more than 512 patches.
        """
        images = pad_to_multiple(images, self.patch_size)
        x = PatchEmbedding(self.hidden_size, self.patch_size, self.dtype, name="embedding")(images)
        batch, height, width, _ = x.shape
        x = embed_tokens(self, x, train=train)
        outputs = bert_encoder(self, range(1, self.num_layers + 1) if self.skip else ())(x, train=train)
        states = [*([x] if self.include_embedding else []), *outputs.values()] if self.skip else outputs.values()
        hidden = sum(state.astype(jnp.float32) for state in states)
        if self.norm_style == "pre":
            hidden = layer_norm(EPSILON, jnp.float32, "final_norm")(hidden)
        logits = Upsample(self.num_classes, self.patch_size, name="head")(
            hidden.reshape(batch, height, width, self.hidden_size)
        )
        return DenseOutput(logits=logits, features={"hidden": hidden}, covers=tuple(images.shape[1:3]))
