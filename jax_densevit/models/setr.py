"""SETR (Zheng et al. 2021, https://arxiv.org/abs/2012.15840): a plain ViT with the Naive, PUP or MLA decoder.

There are two published systems of that name, with different heads and checkpoints: `flavor="official"` is the authors'
repository (fudan-zvg/SETR), `flavor="mmseg"` is mmsegmentation's.

A bilinear resize commutes with a 1x1 classifier, so classifiers here run before the last resize of their head, on the
smaller map; where that resize reaches the image's size it is left to the task altogether. Layers that the published
modules own but never use (`conv_seg` in the official heads, MLA's class token) do not exist; `unused_in_publication`
counts them.

Hybrid-Base is known from the paper alone, its code was not released: a ResNet-50 in place of the patch embedding, at
output stride 16 by dilation of its last stage, whose 2048 channels a linear layer takes to T-Base's tokens. That
natural reading has 112,181,744 parameters in the published convention at 512 x 512 and 150 classes; the paper's table
prints 112.59M, which no reading tried gives.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.convolution import classifier, conv_norm
from jax_densevit.layers.embedding import native_grid, pad_to_multiple, torch_uniform
from jax_densevit.layers.resize import resize_bilinear
from jax_densevit.layers.transformer import EncoderOptions, encoder_macs, layer_norm
from jax_densevit.models.output import DenseOutput
from jax_densevit.models.registry import register_model
from jax_densevit.models.resnet import EXPANSION, ResNet, resnet_macs
from jax_densevit.models.vit import SIZES, backbone, backbone_macs

DECODERS = ("naive", "pup", "mla")
FLAVORS = ("official", "mmseg")

# Blocks, counted from 1, that feed the auxiliary heads of Naive and PUP, by depth of the encoder: the released configs.
# (mmseg's PUP has no head on the last block.)
AUXILIARY_TAPS = {
    ("naive", 24): (10, 15, 20),
    ("naive", 12): (3, 6, 9),
    ("pup", 24): (10, 15, 20, 24),
    ("pup", 12): (5, 8, 10, 12),
}


def published_taps(decoder: str, flavor: str, num_layers: int) -> tuple[int, ...]:
    """The blocks that heads or neck read; for depths without a publication, the quarters of the depth."""
    quarters = tuple(math.ceil(num_layers * i / 4) for i in (1, 2, 3, 4))
    if decoder == "mla":
        return quarters
    taps = AUXILIARY_TAPS.get((decoder, num_layers))
    if taps is None:
        taps = tuple(sorted(set(quarters if decoder == "pup" else quarters[:3])))
    return taps[:-1] if decoder == "pup" and flavor == "mmseg" else taps


class StackHead(nn.Module):
    """The heads of Naive and PUP: layer norm, convolutions with batch norm, ReLU and upsampling, a 1x1 classifier.

    Parameters: `norm/{scale,bias}`, `conv_<i>/{conv,norm}/...`, `classifier/{kernel,bias}`.

    Attributes:
      num_classes: K; channels: width of the convolutions; kernel: their size; use_bias: whether they have a bias.
      scales: the upsampling after each convolution.
      patch_size: when the scales multiply to it, the last upsampling is left to the caller.
    """

    num_classes: int
    channels: int
    kernel: int
    use_bias: bool
    scales: tuple[int, ...]
    patch_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, h, w, D]` -> `[B, h', w', K]` float32."""
        x = layer_norm(1e-6, self.dtype, "norm")(x)
        for i, scale in enumerate(self.scales):
            conv = conv_norm(self.channels, self.kernel, self.use_bias, x.shape[-1], self.dtype, f"conv_{i}")
            x = conv(x, train=train)
            if i + 1 < len(self.scales):
                x = enlarge(x, scale)
        logits = classifier(self.num_classes, self.channels, self.dtype, "classifier")(x)
        return logits if math.prod(self.scales) == self.patch_size else enlarge(logits, self.scales[-1])

    def macs(self, grid: tuple[int, int], width: int) -> int:
        """Multiply-accumulates on one `[h, w, width]` map."""
        total, pixels = 0, grid[0] * grid[1]
        for i, scale in enumerate(self.scales):
            total += pixels * self.kernel**2 * width * self.channels
            width = self.channels
            pixels *= scale**2 if i + 1 < len(self.scales) else 1
        return total + pixels * width * self.num_classes


class MlaNeck(nn.Module):
    """MLA's neck: each tap normalised and projected, summed from deep to shallow, each sum convolved.

    Parameters, i from the shallowest tap: `norm_<i>/...`, `project_<i>/{conv,norm}/...`, `extract_<i>/{conv,norm}/...`.
    """

    channels: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, maps: tuple[jax.Array, ...], train: bool) -> tuple[jax.Array, ...]:
        """Maps `[B, h, w, D]`, shallow to deep -> maps `[B, h, w, channels]`, shallow to deep."""
        projected = []
        for i, x in enumerate(maps):
            x = layer_norm(1e-6, self.dtype, f"norm_{i}")(x)
            project = conv_norm(self.channels, 1, False, x.shape[-1], self.dtype, f"project_{i}")
            projected.append(project(x, train=train))
        for i in reversed(range(len(maps) - 1)):
            projected[i] = projected[i] + projected[i + 1]
        return tuple(
            conv_norm(self.channels, 3, False, self.channels, self.dtype, f"extract_{i}")(x, train=train)
            for i, x in enumerate(projected)
        )

    def macs(self, grid: tuple[int, int], width: int, levels: int) -> int:
        """Multiply-accumulates on `levels` maps of `[h, w, width]`."""
        return levels * grid[0] * grid[1] * (width * self.channels + 9 * self.channels**2)


class MlaHead(nn.Module):
    """MLA's decoder: two 3x3 convolutions per level, x4, concatenation, classifier.

    "official" resizes with aligned corners and classifies with 3x3 after it; "mmseg" resizes by pixel areas and
    classifies with 1x1, which here runs before the resize. Levels come and are concatenated in the flavour's order:
    shallow to deep in "official", deep to shallow in "mmseg".

    Parameters: `branch_<i>_<0|1>/{conv,norm}/...`, `classifier/{kernel,bias}`.
    """

    num_classes: int
    channels: int
    flavor: str
    patch_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, levels: tuple[jax.Array, ...], train: bool) -> jax.Array:
        """Maps `[B, h, w, C]` -> `[B, 4 h, 4 w, K]` float32."""
        branches = []
        for i, x in enumerate(levels):
            for j in range(2):
                conv = conv_norm(self.channels, 3, False, x.shape[-1], self.dtype, f"branch_{i}_{j}")
                x = conv(x, train=train)
            branches.append(x)
        x = jnp.concatenate(branches, axis=-1)
        if self.flavor == "official":
            x = resize_bilinear(x, (4 * x.shape[1], 4 * x.shape[2]), align_corners=True).astype(jnp.float32)
            init = torch_uniform(9 * x.shape[-1])
            return nn.Conv(self.num_classes, (3, 3), padding=1, kernel_init=init, bias_init=init, name="classifier")(x)
        logits = classifier(self.num_classes, x.shape[-1], self.dtype, "classifier")(x)
        return logits if self.patch_size == 4 else enlarge(logits, 4)

    def macs(self, grid: tuple[int, int], width: int, levels: int) -> int:
        """Multiply-accumulates on `levels` maps of `[h, w, width]`."""
        pixels = grid[0] * grid[1]
        branches = levels * pixels * 9 * self.channels * (width + self.channels)
        classifier = pixels * levels * self.channels * self.num_classes
        return branches + classifier * (16 * 9 if self.flavor == "official" else 1)


def enlarge(x: jax.Array, scale: int) -> jax.Array:
    """`[B, h, w, C]` -> `[B, scale * h, scale * w, C]`, bilinear by pixel areas."""
    return resize_bilinear(x, (x.shape[1] * scale, x.shape[2] * scale)) if scale != 1 else x


class Setr(EncoderOptions):
    """SETR: encoder, decoder and auxiliary heads.

    Parameters: `stem/...` (hybrid, see `models.resnet.ResNet`), `backbone/...` (see `models.vit.Backbone`; in the
    hybrid its patches are the stem's pixels), `neck/...` (MLA), `decode_head/...` and `auxiliary_head_<i>/...`.
    Auxiliary heads run only in training. Their order is shallow to deep, in mmseg's MLA deep to shallow.

    Logits leave at the size of the grid (Naive official, MLA's auxiliary heads), or 4 or 8 times it, see `DenseOutput`.

    Attributes:
      decoder: "naive", "pup" or "mla"; given by the registered names `setr_naive`, `setr_pup`, `setr_mla`.
      flavor: "official" or "mmseg".
      num_classes: K.
      image_size: a side or (height, width), the native size of the position table: the training crop, usually.
      blocks, stem_width: bottlenecks per stage of a ResNet with batch norm before the transformer, whose output stride
        is `patch_size`, and the channels it starts with; no blocks for an ordinary patch embedding.
      head_channels: width of the heads' convolutions (MLA's branches have half of it).
      taps: blocks, counted from 1, that feed the auxiliary heads (Naive, PUP) or the pyramid (MLA, four of them).
        None takes the published ones, see `published_taps`.
      auxiliary: whether there are auxiliary heads.
      auxiliary_convs: convolutions in each auxiliary head of mmseg's Naive and PUP; 0 takes the Cityscapes configs'
        (1 in Naive, 2 in PUP). mmseg's ADE20K config of Naive has 2.
      Others: see `models.vit.Backbone`. `remat="full"` recomputes stem and heads too.
    """

    decoder: str = "naive"
    flavor: str = "official"
    num_classes: int = 150
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_size: int = 4096
    patch_size: int = 16
    image_size: int | tuple[int, int] = (512, 512)
    blocks: tuple[int, ...] = ()
    stem_width: int = 64
    head_channels: int = 256
    taps: tuple[int, ...] | None = None
    auxiliary: bool = True
    auxiliary_convs: int = 0
    pos_rule: str = "setr"

    @property
    def head_taps(self) -> tuple[int, ...]:
        """The blocks read by heads or neck, `taps` resolved; what `stack_blocks` wants for this model."""
        if self.taps is None:
            taps = published_taps(self.decoder, self.flavor, self.num_layers)
            return taps if self.auxiliary or self.decoder == "mla" else ()
        if self.decoder == "mla" and (len(self.taps) != 4 or self.taps[-1] != self.num_layers):
            raise UserError(f"SETR-MLA reads four blocks, the last among them; taps={self.taps} does not say so.")
        return tuple(self.taps)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> DenseOutput:
        """Normalised images `[B, H, W, 3]`, any H and W -> logits and, in training, auxiliary logits."""
        check_name("SETR decoder", self.decoder, DECODERS)
        check_name("SETR flavor", self.flavor, FLAVORS)
        covers = tuple(-(-side // self.patch_size) * self.patch_size for side in images.shape[1:3])
        grid = tuple(side // self.patch_size for side in covers)
        patch_size, image_size = self.patch_size, self.image_size
        if self.blocks:
            images = self.stem(name="stem")(pad_to_multiple(images, patch_size), train)[-1]
            patch_size, image_size = 1, native_grid(image_size, patch_size)
        sizes = {"patch_size": patch_size, "image_size": image_size, "taps": self.head_taps}
        tokens = backbone(self, **sizes, cls_token=self.decoder != "mla")(images, train=train)
        maps = {n: x[:, -grid[0] * grid[1] :].reshape(x.shape[0], *grid, -1) for n, x in tokens.items()}
        supervise = self.auxiliary and (train or self.is_initializing())
        if self.decoder == "mla":
            logits, auxiliary = self._mla(tuple(maps[n] for n in self.head_taps), supervise, train)
        else:
            logits = self.stack_head("decode_head")(maps[self.num_layers], train)
            auxiliary = [
                self.stack_head(f"auxiliary_head_{i}", auxiliary=True)(maps[n], train)
                for i, n in enumerate(self.head_taps if supervise else ())
            ]
        return DenseOutput(logits=logits, auxiliary=tuple(auxiliary) if train else (), covers=covers)

    def _mla(self, maps, supervise, train):
        levels = self._build(MlaNeck, "neck", self.head_channels)(maps, train)
        levels = levels if self.flavor == "official" else levels[::-1]
        logits = self.mla_head("decode_head")(levels, train)
        # The auxiliary heads are bare 1x1 classifiers, with a bias in mmseg only.
        bias = self.flavor == "mmseg"
        names = [f"auxiliary_head_{i}" for i in range(len(levels))] if supervise else []
        auxiliary = [
            classifier(self.num_classes, self.head_channels, self.dtype, name, bias)(x)
            for name, x in zip(names, levels, strict=False)
        ]
        return logits, auxiliary

    def stem(self, **options: Any) -> ResNet:
        """The hybrid's ResNet."""
        remat = self.remat == "full"
        return ResNet(self.blocks, "batch", self.stem_width, self.patch_size, remat, dtype=self.dtype, **options)

    def stack_head(self, name: str | None, auxiliary: bool = False, **options: Any) -> StackHead:
        """The decode head (or an auxiliary head) of Naive and PUP in this flavour."""
        official, pup = self.flavor == "official", self.decoder == "pup"
        if pup and not auxiliary:
            scales = (2,) * max(1, math.ceil(math.log2(self.patch_size)))
        elif official:
            scales = (4,) if pup else (1,)
        else:
            scales = (4,) * ((self.auxiliary_convs or (2 if pup else 1)) if auxiliary else 1)
        sizes = (self.num_classes, self.head_channels, 3 if pup else 1, official, scales, self.patch_size)
        return self._build(StackHead, name, *sizes, **options)

    def mla_head(self, name: str | None, **options: Any) -> MlaHead:
        """The decode head of MLA in this flavour."""
        sizes = (self.num_classes, self.head_channels // 2, self.flavor, self.patch_size)
        return self._build(MlaHead, name, *sizes, **options)

    def _build(self, kind: Callable[..., nn.Module], name: str | None, *sizes: Any, **options: Any) -> nn.Module:
        if self.remat == "full":
            kind = nn.remat(kind, static_argnums=(2,))
        return kind(*sizes, dtype=self.dtype, name=name, **options)


def _macs(model: Setr, size: tuple[int, int]) -> int:
    grid = tuple(-(-side // model.patch_size) for side in size)
    prefix = int(model.decoder != "mla")
    if model.blocks:
        stem, tokens = model.stem(parent=None), grid[0] * grid[1]
        channels = EXPANSION * stem.width * 2 ** (len(stem.blocks) - 1)
        total = (
            resnet_macs(stem, tuple(side * model.patch_size for side in grid)) + tokens * channels * model.hidden_size
        )
        total += encoder_macs(tokens + prefix, model.hidden_size, model.num_layers, model.mlp_size)
    else:
        total = backbone_macs(model, size, prefix)
    if model.decoder != "mla":
        return total + model.stack_head(None, parent=None).macs(grid, model.hidden_size)
    neck = MlaNeck(model.head_channels, parent=None).macs(grid, model.hidden_size, 4)
    return total + neck + model.mla_head(None, parent=None).macs(grid, model.head_channels, 4)


def unused_in_publication(model: Setr) -> int:
    """Parameters that the published module owns beside ours and never uses; the papers' counts include them.

    In every official head a 1x1 layer 512 -> K (`conv_seg` of mmseg's base class); in MLA of both flavours the class
    token, dropped before the first block, and its row of the position table.
    """
    heads = 1 + (len(model.head_taps) if model.auxiliary else 0)
    unused = heads * (512 + 1) * model.num_classes if model.flavor == "official" else 0
    return unused + (2 * model.hidden_size if model.decoder == "mla" else 0)


for _decoder in DECODERS:
    register_model(
        f"setr_{_decoder}",
        # DeiT-B/16 is B/16 started from DeiT's weights, whose distillation token SETR drops.
        variants={
            name: {"decoder": _decoder, "patch_size": 16, **SIZES[size]}
            for name, size in (("L/16", "L"), ("B/16", "B"), ("DeiT-B/16", "B"), ("S/16", "S"), ("Ti/16", "Ti"))
        }
        | ({"Hybrid-B/16": {"decoder": "naive", "blocks": (3, 4, 6, 3), **SIZES["B"]}} if _decoder == "naive" else {}),
        default_variant="L/16",
        macs=_macs,
        image_size=(512, 512),
        num_classes=150,
    )(Setr)
