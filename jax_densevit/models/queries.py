"""Queries that answer for objects: the heads that read class, mask and box from them, and queries for dense models.

A dense model says K numbers per pixel, whatever they are for; here they are an embedding. A few transformer blocks read
patches of that map together with learned queries, and the mask of a query is its product with the embedding of every
pixel (MaskFormer, Cheng et al. 2021, https://arxiv.org/abs/2107.06278), corrected by where the query looks (the
attention maps of DETR, Carion et al. 2020, https://arxiv.org/abs/2005.12872). So every dense model of the registry can
carry the head, without changes.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.boxes import paste_masks
from jax_densevit.layers.convolution import classifier
from jax_densevit.layers.embedding import PatchEmbedding, Tokens, native_grid, pad_to_multiple
from jax_densevit.layers.resize import resize_bilinear
from jax_densevit.layers.transformer import Encoder, encoder_macs, layer_norm
from jax_densevit.models.output import DenseOutput, QueryOutput
from jax_densevit.models.registry import create_model, find_model, register_model

MASK_HEADS = ("token", "embedding", "box")


class QueryHeads(nn.Module):
    """What a query says, read from its state.

    Parameters: `class/{kernel,bias}`; of "token" `mask/{kernel,bias}`; of "embedding" `mask_{0,1}`, `look_query`,
    `look_patch`, each `{kernel,bias}`, and `look_weight [heads]`; of "box" `box_{0,1,2}` and `mask`, each
    `{kernel,bias}`.

    Attributes:
      num_classes: K, without "no object".
      mask_head: "token", a linear layer gives a mask of the whole image; "embedding", the product with the embedding of
        each pixel, and where the query looks; "box", a box, and a linear layer gives the mask inside it.
      mask_size: side of the masks of "token" and "box".
      num_heads: of the attention maps of "embedding".
      dtype: type of the computation; outputs are float32.
    """

    num_classes: int
    mask_head: str = "embedding"
    mask_size: int = 28
    num_heads: int = 8
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        states: jax.Array,
        patches: jax.Array,
        pixels: jax.Array | tuple[int, int],
        cell: int,
        covers: tuple[int, int],
    ) -> QueryOutput:
        """Reads queries.

        Args:
          states: `[B, Q, D]`.
          patches: `[B, gh, gw, D]`, where the queries of "embedding" look.
          pixels: "embedding": `[B, h, w, E]`. Else the (height, width) of the masks that "box" pastes.
          cell: a patch has `cell` x `cell` of these pixels; at the bottom and the right patches may protrude.
          covers: of the result.
        """
        check_name("head for masks (mask_head)", self.mask_head, MASK_HEADS)
        width = states.shape[-1]
        states = states.astype(self.dtype)
        classes = classifier(self.num_classes + 1, width, self.dtype, "class")(states)
        if self.mask_head == "embedding":
            masks, maps = self._embedded(states, patches, pixels, cell)
            return QueryOutput(classes, masks, features={"attention": maps}, covers=covers)
        masks = classifier(self.mask_size**2, width, self.dtype, "mask")(states)
        masks = masks.reshape(*states.shape[:2], self.mask_size, self.mask_size)
        if self.mask_head == "token":
            return QueryOutput(classes, masks, covers=covers)
        boxes = jax.nn.sigmoid(_mlp(states, (width, width, 4), self.dtype, "box"))
        return QueryOutput(classes, paste_masks(masks, boxes, pixels), boxes, masks, covers=covers)

    def _embedded(self, states, patches, pixels, cell) -> tuple[jax.Array, jax.Array]:
        """Mask logits `[B, Q, h, w]` and attention maps `[B, Q, heads, gh, gw]`, both float32."""
        batch, height, width, size = pixels.shape
        grid = patches.shape[1:3]
        if states.shape[-1] % self.num_heads:
            raise UserError(f"num_heads={self.num_heads} do not divide the width {states.shape[-1]} of the queries.")
        embedding = _mlp(states, (states.shape[-1], size), self.dtype, "mask")
        # float32: a product that is thresholded at 0.
        masks = jnp.einsum("bqe,bhwe->bqhw", embedding, pixels.astype(jnp.float32), precision="high")

        def heads(x, name):
            x = nn.Dense(states.shape[-1], dtype=self.dtype, kernel_init=_NORMAL, name=name)(x)
            return x.reshape(batch, -1, self.num_heads, x.shape[-1] // self.num_heads)

        q, k = heads(states, "look_query"), heads(patches.astype(self.dtype), "look_patch")
        logits = jnp.einsum("bqhd,bphd->bqhp", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        # One softmax over heads and places together, as in DETR: a head that has nothing to say says nothing.
        log_maps = jax.nn.log_softmax(logits.reshape(*logits.shape[:2], -1)).reshape(*logits.shape[:3], *grid)
        # In units of looking everywhere alike, so that it does not depend on the size of the image.
        weight = self.param("look_weight", nn.initializers.constant(1 / self.num_heads), (self.num_heads,), jnp.float32)
        count = self.num_heads * grid[0] * grid[1]
        seen = jnp.einsum("bqhyx,h->bqyx", log_maps + jnp.log(jnp.float32(count)), weight)
        seen = resize_bilinear(seen[..., None], (grid[0] * cell, grid[1] * cell))[:, :, :height, :width, 0]
        return masks + seen, jnp.exp(log_maps)


def head_macs(
    mask_head: str, queries: int, width: int, num_classes: int, mask_size: int, pixels: tuple[int, int, int], grid: int
) -> int:
    """Multiply-accumulates of :class:`QueryHeads`; `pixels` are (height, width, E) of the masks, `grid` the patches."""
    macs = queries * width * (num_classes + 1)
    height, across, size = pixels
    if mask_head == "embedding":
        look = (queries + grid) * width**2 + queries * grid * width
        return macs + queries * width * (width + size) + queries * height * across * size + look
    macs += queries * width * mask_size**2
    if mask_head == "token":
        return macs
    return macs + queries * (2 * width**2 + 4 * width + mask_size * height * (mask_size + across))


def with_auxiliary(outputs: list[QueryOutput]) -> QueryOutput:
    """The last output, with the ones before it as its `auxiliary`."""
    return outputs[-1].replace(auxiliary=tuple(outputs[:-1]))


def _mlp(x: jax.Array, sizes: tuple[int, ...], dtype: Any, name: str) -> jax.Array:
    """Linear layers `<name>_0`, ... with ReLU between; float32."""
    for i, size in enumerate(sizes):
        x = classifier(size, x.shape[-1], dtype, f"{name}_{i}")(nn.relu(x).astype(dtype) if i else x)
    return x


_NORMAL = nn.initializers.normal(0.02)


def backbone_of(model: "QuerySegmenter") -> nn.Module:
    """The dense model under the queries, without heads of its own beside the map.

    Raises:
      UserError: it does not exist, or makes no map; options that it does not have.
    """
    entry = find_model(model.backbone)
    if "num_classes" not in entry.options or "num_queries" in entry.options:
        raise UserError(f"{model.backbone!r} is no dense model, so it cannot carry queries.")
    options = {"image_size": model.image_size, "dtype": model.dtype, "auxiliary": False}
    options = {name: value for name, value in options.items() if name in entry.options}
    options |= {"num_classes": model.embedding_size, **(model.backbone_options or {})}
    return create_model(model.backbone, model.backbone_variant or None, **options)


def _patch(model: "QuerySegmenter", dense: DenseOutput) -> int:
    """How many pixels of the dense model's map a patch of it has on each side."""
    stride = dense.covers[0] // dense.logits.shape[1]
    return max(1, model.token_stride // max(1, stride))


def _macs(model: "QuerySegmenter", size: tuple[int, int]) -> int:
    entry, backbone = find_model(model.backbone), backbone_of(model)
    out = jax.eval_shape(
        lambda key, images: backbone.init_with_output(key, images)[0],
        jax.random.key(0),
        jax.ShapeDtypeStruct((1, *size, 3), jnp.float32),
    )
    height, width = out.logits.shape[1:3]
    patch = _patch(model, out)
    grid = -(-height // patch) * -(-width // patch)
    macs = entry.macs(backbone, size) + grid * patch**2 * model.embedding_size * model.hidden_size
    macs += encoder_macs(grid + model.num_queries, model.hidden_size, model.num_layers, model.mlp_size)
    pixels = (height, width, model.embedding_size)
    return macs + head_macs("embedding", model.num_queries, model.hidden_size, model.num_classes, 0, pixels, grid)


@register_model(
    "queries",
    variants={
        "unet": {"backbone": "unet", "backbone_variant": "32"},
        "setr": {"backbone": "setr_pup", "backbone_variant": "S/16"},
        "dpt": {"backbone": "dpt", "backbone_variant": "base"},
        "uformer": {"backbone": "uformer", "backbone_variant": "T"},
    },
    default_variant="unet",
    macs=_macs,
    image_size=(256, 256),
    num_classes=80,
)
class QuerySegmenter(nn.Module):
    """Objects from any dense model of the registry; see the head of this file.

    Parameters: `body/...` (the dense model), `patches/{kernel,bias}`, `tokens/position_embedding`, `queries [Q, D]`,
    `encoder/block_<i>/...`, `norm/{scale,bias}`, `heads/...` (see :class:`QueryHeads`, "embedding").

    Attributes:
      num_classes: K, without "no object".
      backbone, backbone_variant: registered name and variant of the dense model; an empty variant is its default.
      backbone_options: further options of it, by name.
      num_queries: Q.
      embedding_size: E, the output channels of the dense model.
      hidden_size, num_layers, num_heads, mlp_size: of the blocks that read the map.
      token_stride: pixels of the image per patch that the blocks read, in each direction.
      image_size: a side or (height, width): native size of the position tables here and, if it has one, in the dense
        model.
      auxiliary: whether the heads read the queries after every block in training, not only after the last.
      dropout: rate in the blocks.
      dtype: type of the computation, the dense model's too.
    """

    num_classes: int = 80
    backbone: str = "unet"
    backbone_variant: str = ""
    backbone_options: Mapping[str, Any] | None = None
    num_queries: int = 100
    embedding_size: int = 64
    hidden_size: int = 256
    num_layers: int = 3
    num_heads: int = 8
    mlp_size: int = 1024
    token_stride: int = 16
    image_size: int | tuple[int, int] = (256, 256)
    auxiliary: bool = True
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def setup(self):
        self.body = backbone_of(self)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> QueryOutput:
        """`[B, H, W, 3]` normalised images -> masks at the resolution of the dense model's map.

        Training needs the rng stream "dropout" where a rate is above 0, here or in the dense model. `features`:
        "attention" `[B, Q, heads, gh, gw]`, over the patches of the map.

        Raises:
          UserError: a backbone that is no dense model, options of it that do not exist.
        """
        dense = self.body(images, train=train)
        if not isinstance(dense, DenseOutput):
            raise UserError(f"{self.backbone!r} is no dense model, so it cannot carry queries.")
        pixels, patch = dense.logits, _patch(self, dense)
        grid = PatchEmbedding(self.hidden_size, patch, self.dtype, name="patches")(pad_to_multiple(pixels, patch))
        native = native_grid(self.image_size, self.token_stride)
        x = Tokens(native, cls_token=False, dtype=self.dtype, name="tokens")(grid)
        queries = self.param("queries", _NORMAL, (self.num_queries, self.hidden_size), jnp.float32)
        before = jnp.broadcast_to(queries.astype(self.dtype), (x.shape[0], *queries.shape))
        supervise = self.auxiliary and train
        states = Encoder(
            self.num_layers,
            self.num_heads,
            self.mlp_size,
            taps=tuple(range(1, self.num_layers + 1)) if supervise else (),
            dropout=self.dropout,
            dtype=self.dtype,
            name="encoder",
        )(jnp.concatenate([before, x], 1), train=train)
        norm = layer_norm(1e-6, self.dtype, "norm")
        heads = QueryHeads(self.num_classes, num_heads=self.num_heads, dtype=self.dtype, name="heads")
        outputs = []
        for state in map(norm, states.values()):
            asked, seen = state[:, : self.num_queries], state[:, self.num_queries :]
            outputs.append(heads(asked, seen.reshape(grid.shape), pixels, patch, dense.covers))
        return with_auxiliary(outputs)
