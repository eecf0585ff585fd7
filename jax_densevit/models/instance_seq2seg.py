"""Instance Seq2Seg: object queries before the patches of a BERT encoder, class and mask from what becomes of them.

From the report "Image Segmentation with Transformers" (Schmidt-Mengin 2021, section 3), with the two extensions that it
proposes as heads: masks from pixels and attention maps, and masks in the coordinates of their boxes. The encoder is
BERT's, see `layers.bert`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.bert import EPSILON, BertOptions, bert_encoder, embed_tokens
from jax_densevit.layers.convolution import Upsample
from jax_densevit.layers.embedding import PatchEmbedding, pad_to_multiple
from jax_densevit.layers.transformer import encoder_macs, layer_norm
from jax_densevit.models.output import QueryOutput
from jax_densevit.models.queries import MASK_HEADS, QueryHeads, head_macs, with_auxiliary
from jax_densevit.models.registry import register_model

_PUBLISHED = {"bert_compatible": True, "vocabulary": 1, "gray": True}


def _macs(model: "InstanceSeq2Seg", size: tuple[int, int]) -> int:
    height, width = (-(-side // model.patch_size) for side in size)
    grid = height * width
    macs = grid * model.patch_size**2 * (1 if model.gray else 3) * model.hidden_size
    macs += encoder_macs(grid + model.num_queries, model.hidden_size, model.num_layers, model.mlp_size)
    pixels = (*(side * model.patch_size // model.mask_stride for side in (height, width)), model.embedding_size)
    if model.mask_head == "embedding":
        macs += pixels[0] * pixels[1] * model.hidden_size * model.embedding_size
    options = (model.hidden_size, model.num_classes, model.mask_size, pixels, grid)
    return macs + head_macs(model.mask_head, model.num_queries, *options)


@register_model(
    "instance_seq2seg",
    variants={
        "token": {},
        "embedding": {"mask_head": "embedding"},
        "box": {"mask_head": "box", "mask_size": 28},
        **{
            f"bert-{patch}/{mask}": {"patch_size": patch, "mask_size": mask, **_PUBLISHED}
            for patch, mask in ((8, 16), (8, 32), (4, 32), (16, 32), (8, 64))
        },
    },
    default_variant="token",
    macs=_macs,
    image_size=(64, 64),
    num_classes=10,
)
class InstanceSeq2Seg(BertOptions):
    """Objects by queries in the sequence of patches; see the head of this file.

    The variants "bert-P/R" are the published form, Hugging Face's `BertModel` (with a word table of one row) and linear
    layers, for gray patches of P pixels and masks of R x R; the report does not say which: 13,310,219 parameters for
    8/16, 13,704,203 for 8/32, 13,679,627 for 4/32, 13,802,507 for 16/32 and 15,280,139 for 8/64 with ten classes.

    Parameters: `embedding/{kernel,bias}`, `queries [Q, D]`, those of `layers.bert`, `pixels/{kernel,bias}`
    ("embedding"), `heads/...` (see `models.queries.QueryHeads`); pre-norm also `final_norm/{scale,bias}`.

    Attributes:
      num_classes: K, without "no object".
      num_queries: Q.
      mask_head: "token" (the report's), "embedding" or "box", see `models.queries.QueryHeads`.
      mask_size: side of the masks of "token", which stretch over the image, and of "box", which stretch over the box.
      mask_stride: pixels of the image per pixel of the masks of "embedding" and of the pasted ones of "box"; it divides
        the patch.
      embedding_size: E, channels of the embedding of each pixel.
      auxiliary: whether the heads read the queries after every block in training, not only after the last.
      gray: patches are of the mean of the three channels.
      hidden_size, num_layers, num_heads, mlp_size, patch_size: sizes; the report's, where it says them.
      image_size: a side or (height, width): native size of the position table.
      Others: see `layers.bert.BertOptions`.
    """

    num_classes: int = 10
    num_queries: int = 6
    mask_head: str = "token"
    mask_size: int = 32
    mask_stride: int = 1
    embedding_size: int = 64
    auxiliary: bool = False
    gray: bool = False
    hidden_size: int = 512
    num_layers: int = 4
    num_heads: int = 8
    mlp_size: int = 2048
    patch_size: int = 8
    image_size: int | tuple[int, int] = (64, 64)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> QueryOutput:
        """`[B, H, W, 3]` normalised images -> what the queries say.

        Training needs the rng stream "dropout" where a rate is above 0. `features`, with "embedding": "attention"
        `[B, Q, heads, h, w]`, of the queries over the patches, one for all heads and places together.

        Raises:
          UserError: options that contradict each other; with `bert_compatible`, more than 512 queries and patches.
        """
        check_name("head for masks (mask_head)", self.mask_head, MASK_HEADS)
        if self.mask_stride < 1 or self.patch_size % self.mask_stride:
            raise UserError(f"mask_stride={self.mask_stride} must divide patch_size={self.patch_size}.")
        images = pad_to_multiple(images, self.patch_size)
        covers = tuple(images.shape[1:3])
        if self.gray:
            images = images.mean(-1, keepdims=True)
        x = PatchEmbedding(self.hidden_size, self.patch_size, self.dtype, name="embedding")(images)
        grid = x.shape
        queries = self.param("queries", nn.initializers.normal(0.02), (self.num_queries, self.hidden_size), jnp.float32)
        x = embed_tokens(self, x, train=train, queries=queries)
        taps = range(1, self.num_layers + 1) if self.auxiliary and train else ()
        states = list(bert_encoder(self, taps)(x, train=train).values())
        if self.norm_style == "pre":
            norm = layer_norm(EPSILON, self.dtype, "final_norm")
            states = [norm(state) for state in states]
        patches = [state[:, self.num_queries :].reshape(grid) for state in states]
        cell = self.patch_size // self.mask_stride
        pixels = tuple(side // self.mask_stride for side in covers)
        if self.mask_head == "embedding":
            pixels = Upsample(self.embedding_size, cell, self.dtype, name="pixels")(patches[-1])
        heads = QueryHeads(
            self.num_classes, self.mask_head, self.mask_size, self.num_heads, dtype=self.dtype, name="heads"
        )
        return with_auxiliary(
            [
                heads(state[:, : self.num_queries], seen, pixels, cell, covers)
                for state, seen in zip(states, patches, strict=True)
            ]
        )
