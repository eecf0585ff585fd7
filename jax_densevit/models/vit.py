"""Vision Transformer (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929): dense models' backbone, classifier.

One architecture in many published dialects; the options say which. `google` checkpoints want `gelu="tanh"`; timm, DeiT
(Touvron et al. 2021) and SETR use the exact GELU.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.embedding import PatchEmbedding, Tokens, native_grid, pad_to_multiple
from jax_densevit.layers.fields import shared_fields
from jax_densevit.layers.transformer import Encoder, EncoderOptions, encoder_macs, layer_norm
from jax_densevit.models.output import ClassOutput
from jax_densevit.models.registry import register_model

# Table 1 of the paper, and Ti/S of DeiT's table 1.
SIZES = {
    "Ti": {"hidden_size": 192, "num_layers": 12, "num_heads": 3, "mlp_size": 768},
    "S": {"hidden_size": 384, "num_layers": 12, "num_heads": 6, "mlp_size": 1536},
    "B": {"hidden_size": 768, "num_layers": 12, "num_heads": 12, "mlp_size": 3072},
    "L": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "mlp_size": 4096},
    "H": {"hidden_size": 1280, "num_layers": 32, "num_heads": 16, "mlp_size": 5120},
}


class Backbone(EncoderOptions):
    """Patches, tokens, positions and the encoder, without the final norm: what dense models build on.

    Parameters: `embedding/{kernel,bias}`, `tokens/{cls_token,distillation_token,position_embedding}`,
    `encoder/block_<i>/{norm1,attention/{qkv,out},norm2,mlp/{fc1,fc2}}` (stacked: `encoder/blocks_<start>_<stop>/...`).

    Attributes:
      hidden_size, num_layers, num_heads, mlp_size, patch_size: sizes.
      image_size: a side or (height, width): the native size of the position table.
      taps: block numbers, counted from 1, whose outputs are returned beside the last one's.
      cls_token, distilled, cls_position, pos_rule: see `Tokens`.
      Others: see `EncoderOptions`. `dropout` also follows the addition of positions.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    patch_size: int
    image_size: int | tuple[int, int]
    taps: tuple[int, ...] = ()
    cls_token: bool = True
    distilled: bool = False
    cls_position: bool = True
    pos_rule: str = "timm"

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> dict[int, jax.Array]:
        """`[B, H, W, 3]` -> {block number: tokens `[B, prefix + h * w, D]`} for the taps and the last block.

        h and w are H and W over the patch size, rounded up: the image is padded with zeros at the bottom and the right.
        """
        images = pad_to_multiple(images, self.patch_size)
        x = PatchEmbedding(self.hidden_size, self.patch_size, self.dtype, name="embedding")(images)
        x = Tokens(native_grid(self.image_size, self.patch_size), **shared_fields(self, Tokens), name="tokens")(x)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return Encoder(**shared_fields(self, Encoder), name="encoder")(x, train=train)


def backbone(model: EncoderOptions, **changes: Any) -> Backbone:
    """The backbone of a model that has its sizes and options under the same names, but for `changes`."""
    return Backbone(**shared_fields(model, Backbone) | changes, name="backbone")


def backbone_macs(model: Any, size: tuple[int, int], prefix: int) -> int:
    """Multiply-accumulates of a backbone (an object with its size attributes) on one image of (height, width)."""
    grid = (-(-size[0] // model.patch_size)) * (-(-size[1] // model.patch_size))
    patches = grid * 3 * model.patch_size**2 * model.hidden_size
    return patches + encoder_macs(grid + prefix, model.hidden_size, model.num_layers, model.mlp_size)


def _macs(model: "ViT", size: tuple[int, int]) -> int:
    heads = model.hidden_size * model.num_classes * (1 + model.distilled)
    return backbone_macs(model, size, int(model.cls_token) + int(model.distilled)) + heads


@register_model(
    "vit",
    variants={f"{name}/16": {**SIZES[name], "patch_size": 16} for name in ("Ti", "S", "B", "L")}
    | {f"{name}/32": {**SIZES[name], "patch_size": 32} for name in ("S", "B", "L")}
    | {"H/14": {**SIZES["H"], "patch_size": 14}}
    | {f"DeiT-{name}/16": {**SIZES[name], "patch_size": 16, "distilled": True} for name in ("Ti", "S", "B")},
    default_variant="B/16",
    macs=_macs,
    image_size=(224, 224),
    num_classes=1000,
)
class ViT(EncoderOptions):
    """ViT image classifier, every published dialect by options.

    Parameters: `backbone/...` (see `Backbone`), `norm/{scale,bias}`, `head/{kernel,bias}` and, when distilled,
    `head_distilled/{kernel,bias}`.

    Attributes:
      num_classes: K.
      pool: "token" classifies the class token, "gap" the mean over the grid's tokens (after the final norm, as
        big_vision), "mean" the same before the norm (timm's `fc_norm`).
      Others: see `Backbone`. big_vision: `cls_token=False, pool="gap"`, or `cls_position=False` where it has a token.
    """

    num_classes: int = 1000
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    patch_size: int = 16
    image_size: int | tuple[int, int] = (224, 224)
    pool: str = "token"
    cls_token: bool = True
    distilled: bool = False
    cls_position: bool = True
    pos_rule: str = "timm"

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> ClassOutput:
        """`[B, H, W, 3]` normalised images -> class scores.

        With `distilled`, training returns the class head in `logits` and the distillation head in `auxiliary`;
        evaluation returns the mean of both. `features` holds "tokens" `[B, T, D]`, after the final norm
        (before it with `pool="mean"`).
        """
        check_name("pooling of a ViT (pool)", self.pool, ("token", "gap", "mean"))
        if self.distilled and not self.cls_token:
            raise UserError("distilled=True needs cls_token=True: the distillation token follows the class token.")
        if self.pool == "token" and not self.cls_token:
            raise UserError("pool='token' needs cls_token=True; use pool='gap' without a class token.")
        tokens = backbone(self)(images, train=train)[self.num_layers]
        norm, prefix = layer_norm(self.norm_epsilon, self.dtype, "norm"), int(self.cls_token) + int(self.distilled)
        if self.pool == "mean":
            pooled = norm(tokens[:, prefix:].mean(axis=1, dtype=jnp.float32))
        else:
            tokens = norm(tokens)
            pooled = tokens[:, 0] if self.pool == "token" else tokens[:, prefix:].mean(axis=1, dtype=jnp.float32)
        logits = self._head("head", pooled)
        auxiliary = ()
        if self.distilled:
            other = self._head("head_distilled", tokens[:, 1])
            logits, auxiliary = (logits, (other,)) if train else ((logits + other) / 2, ())
        return ClassOutput(logits=logits, auxiliary=auxiliary, features={"tokens": tokens})

    def _head(self, name: str, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.02)
        return nn.Dense(self.num_classes, kernel_init=init, name=name)(x.astype(jnp.float32))
