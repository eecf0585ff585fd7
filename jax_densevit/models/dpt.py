"""DPT, the dense prediction transformer (Ranftl et al. 2021, https://arxiv.org/abs/2103.13413).

Four levels of a ViT become maps at strides 4, 8, 16 and 32, are fused from deep to shallow, and a convolutional head
predicts classes (or any channels per pixel) or depth. `Base` and `Large` read four blocks of the transformer; `hybrid`
has a ResNetV2-50 in place of the patch embedding, and its first two stages are the first two levels.

Images are padded with zeros at the bottom and the right to multiples of two patches (32 pixels), so that all levels
fit onto each other. The published code fails on other sizes; Hugging Face's stretches the levels instead, which moves
them against each other.

Bilinear enlargement commutes with a 1x1 convolution, whose products therefore come first here, a quarter as many; and
the class token's half of the readout is multiplied once per image, not once per patch. Multiply-accumulates are
counted in the published order, so that rates compare.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.convolution import Upsample, classifier, conv_norm, convolve
from jax_densevit.layers.embedding import native_grid, pad_to_multiple, torch_uniform
from jax_densevit.layers.normalization import BatchNorm
from jax_densevit.layers.resize import resize_bilinear
from jax_densevit.layers.transformer import EncoderOptions, encoder_macs, gelu
from jax_densevit.models.output import DenseOutput
from jax_densevit.models.registry import register_model
from jax_densevit.models.resnet import EXPANSION, ResNet, resnet_macs
from jax_densevit.models.vit import SIZES, backbone

READOUTS = ("ignore", "add", "project")
HEADS = ("segmentation", "depth")
LEVELS = 4
DEPTH_CHANNELS = 32  # of the depth head's last convolution


def conv3x3(features: int, channels: int, use_bias: bool, dtype: Any, name: str, stride: int = 1) -> nn.Conv:
    """A 3x3 convolution with a border of one zero, and PyTorch's default initialisation."""
    init = torch_uniform(9 * channels)
    options = {"padding": 1, "use_bias": use_bias, "dtype": dtype, "kernel_init": init, "bias_init": init}
    return nn.Conv(features, (3, 3), stride, conv_general_dilated=convolve, name=name, **options)


def dense(features: int, channels: int, dtype: Any, name: str) -> nn.Dense:
    """A linear layer, or a 1x1 convolution, with PyTorch's default initialisation."""
    init = torch_uniform(channels)
    return nn.Dense(features, dtype=dtype, kernel_init=init, bias_init=init, name=name)


def double(x: jax.Array) -> jax.Array:
    """`[B, h, w, C]` -> `[B, 2 h, 2 w, C]`, bilinear with aligned corners."""
    return resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]), align_corners=True)


class Readout(nn.Module):
    """Gives every patch token what the class token knows.

    "ignore" drops the class token, "add" adds it, "project" is `gelu(linear([patch, class]))`.

    Parameters ("project" only): `kernel [2 D, D]`, `bias [D]`.
    """

    kind: str
    gelu: str = "erf"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`[B, 1 + N, D]` -> `[B, N, D]`."""
        patches, token = tokens[:, 1:], tokens[:, :1]
        if self.kind == "ignore":
            return patches
        if self.kind == "add":
            return patches + token
        width = tokens.shape[-1]
        init = torch_uniform(2 * width)
        kernel = self.param("kernel", init, (2 * width, width)).astype(self.dtype)
        bias = self.param("bias", init, (width,)).astype(self.dtype)
        return gelu(patches @ kernel[:width] + (token @ kernel[width:] + bias), self.gelu)


class Reassemble(nn.Module):
    """Tokens to a map at another stride: a 1x1 projection, then x4, x2, as it is, or x1/2.

    Parameters: `project/{kernel,bias}`; `resize/{kernel,bias}`, a transposed convolution (x4, x2) or a 3x3 one (x1/2).

    Attributes:
      features: output channels.
      level: 0 (x4) to 3 (x1/2).
    """

    features: int
    level: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, D]` -> `[B, h', w', features]`."""
        x = dense(self.features, x.shape[-1], self.dtype, "project")(x)
        if self.level < 2:
            return Upsample(self.features, 4 >> self.level, self.dtype, name="resize")(x)
        return x if self.level == 2 else conv3x3(self.features, self.features, True, self.dtype, "resize", 2)(x)


class ResidualUnit(nn.Module):
    """Pre-activation residual unit: twice ReLU, 3x3 convolution and, if asked, batch norm; plus the input.

    Parameters: `conv<1|2>/kernel`, and either `norm<1|2>/{scale,bias}` or `conv<1|2>/bias`.
    """

    batch_norm: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, h, w, C]` -> `[B, h, w, C]`."""
        y, channels = x, x.shape[-1]
        for i in (1, 2):
            y = conv3x3(channels, channels, not self.batch_norm, self.dtype, f"conv{i}")(nn.relu(y))
            if self.batch_norm:
                y = BatchNorm(name=f"norm{i}")(y, train)
        return x + y


class Fusion(nn.Module):
    """What came from the deeper levels, plus a refined level, refined again, projected and doubled.

    Parameters: `skip/...` (all but the deepest), `refine/...` (see `ResidualUnit`), `project/{kernel,bias}`.
    """

    batch_norm: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, level: jax.Array | None, train: bool) -> jax.Array:
        """`[B, h, w, C]` and the level's `[B, h, w, C]` -> `[B, 2 h, 2 w, C]`."""
        if level is not None:
            x = x + ResidualUnit(self.batch_norm, self.dtype, name="skip")(level, train)
        x = ResidualUnit(self.batch_norm, self.dtype, name="refine")(x, train)
        return double(dense(x.shape[-1], x.shape[-1], self.dtype, "project")(x))


class SegmentationHead(nn.Module):
    """3x3 convolution, batch norm, ReLU, dropout, 1x1 classifier.

    Parameters: `conv/{conv,norm}/...`, `classifier/{kernel,bias}`.
    """

    num_classes: int
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, h, w, C]` -> `[B, h, w, K]` float32."""
        channels = x.shape[-1]
        x = conv_norm(channels, 3, False, channels, self.dtype, "conv")(x, train=train)
        x = nn.Dropout(self.dropout)(x, deterministic=not train)
        return classifier(self.num_classes, channels, self.dtype, "classifier")(x)


class DepthHead(nn.Module):
    """3x3 convolution to half the channels, x2, 3x3 convolution to 32 with ReLU, 1x1 to the output, ReLU if asked.

    Parameters: `conv<1|2>/{kernel,bias}`, `classifier/{kernel,bias}`.
    """

    num_classes: int
    non_negative: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, h, w, C]` -> `[B, 2 h, 2 w, K]` float32."""
        del train
        channels = x.shape[-1]
        x = double(conv3x3(channels // 2, channels, True, self.dtype, "conv1")(x))
        x = nn.relu(conv3x3(DEPTH_CHANNELS, channels // 2, True, self.dtype, "conv2")(x))
        x = classifier(self.num_classes, DEPTH_CHANNELS, self.dtype, "classifier")(x)
        return nn.relu(x) if self.non_negative else x


class Dpt(EncoderOptions):
    """DPT: encoder, reassembly, fusion, head and auxiliary head.

    Parameters: `stem/...` (hybrid, see `ResNet`), `backbone/...` (see `models.vit.Backbone`; in the hybrid its patches
    are the stem's pixels), and for the levels i = 0 (stride 4) to 3 (stride 32) `readout_<i>`, `reassemble_<i>` (both
    not for levels that come from the stem), `level_<i>/kernel` and `fusion_<i>`; last `head` and `auxiliary_head`.

    Logits leave at 16 times the patch grid: the size of the padded image at patch 16. The last doubling aligns corners,
    which a resize by the task would not. The auxiliary head, of the segmentation models, reads the same fused map as
    the head, runs only in training, and its logits stay at half that size. The paper weighs its loss by 0.2, Hugging
    Face by 0.4 (`task.auxiliary_weight`); in the published code it is never called.

    Attributes:
      head: "segmentation" or "depth", given by the registered names `dpt` and `dpt_depth`.
      num_classes: K, output channels.
      image_size: a side or (height, width), the native size of the position table.
      blocks, stem_width: bottlenecks per stage of a ResNetV2 stem, three stages, and the channels it starts with; no
        blocks for an ordinary patch embedding.
      taps: blocks, counted from 1, that make the levels (four, or with a stem the last two); None takes the quarters.
      readout: what becomes of the class token, a name of `READOUTS`.
      reassemble: channels of the four levels; those from the stem have 4 and 8 times its width, whatever is said here.
      features: channels of the fusion.
      batch_norm: batch norm in the fusion's convolutions, which have a bias only without it. The segmentation models
        have it, the depth models not.
      auxiliary: whether a segmentation model has an auxiliary head.
      head_dropout: rate before the classifiers of segmentation.
      non_negative: a ReLU behind the depth.
      invert, scale, shift: the depth is `1 / max(scale * y + shift, 1e-8)` of the head's y, for networks that predict
        inverse depth.
      norm_epsilon: 1e-6 in timm and the published code, 1e-12 in Hugging Face's.
      Others: see `models.vit.Backbone`. `remat="full"` recomputes stem, fusion and heads too.
    """

    head: str = "segmentation"
    num_classes: int = 3
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_size: int = 3072
    patch_size: int = 16
    image_size: int | tuple[int, int] = (384, 384)
    blocks: tuple[int, ...] = ()
    stem_width: int = 64
    taps: tuple[int, ...] | None = None
    readout: str = "project"
    reassemble: tuple[int, ...] = (96, 192, 384, 768)
    features: int = 256
    batch_norm: bool = True
    auxiliary: bool = True
    head_dropout: float = 0.1
    non_negative: bool = True
    invert: bool = False
    scale: float = 1.0
    shift: float = 0.0
    pos_rule: str = "setr"

    @property
    def head_taps(self) -> tuple[int, ...]:
        """The blocks that make levels, `taps` resolved; what `stack_blocks` wants for this model."""
        count = 2 if self.blocks else LEVELS
        if self.taps is None:
            return tuple(-(-self.num_layers * i // LEVELS) for i in range(1, LEVELS + 1))[-count:]
        if len(self.taps) != count:
            raise UserError(f"This DPT makes {count} levels of blocks; taps={self.taps} names {len(self.taps)}.")
        return tuple(self.taps)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> DenseOutput:
        """Normalised images `[B, H, W, 3]`, any H and W -> logits (or depth) and, in training, auxiliary logits.

        Raises:
          UserError: options that do not exist or do not fit.
        """
        check_name("DPT head", self.head, HEADS)
        check_name("DPT readout", self.readout, READOUTS)
        if len(self.reassemble) != LEVELS:
            raise UserError(f"A DPT has {LEVELS} levels; reassemble={self.reassemble} gives {len(self.reassemble)}.")
        images = pad_to_multiple(images, 2 * self.patch_size)
        covers = tuple(images.shape[1:3])
        levels = self._levels(images, train)
        levels = [conv3x3(self.features, x.shape[-1], False, self.dtype, f"level_{i}")(x) for i, x in enumerate(levels)]
        x = self._build(Fusion, "fusion_3", 3, self.batch_norm)(levels[3], None, train)
        for i in (2, 1, 0):
            x = self._build(Fusion, f"fusion_{i}", 3, self.batch_norm)(x, levels[i], train)
        if self.head == "depth":
            y = self._build(DepthHead, "head", 2, self.num_classes, self.non_negative)(x, train)
            if self.invert:
                y = 1 / jnp.maximum(self.scale * y + self.shift, 1e-8)
            return DenseOutput(logits=y, covers=covers)
        logits = double(self.segmentation_head("head")(x, train))
        auxiliary = ()
        if self.auxiliary and (train or self.is_initializing()):
            auxiliary = (self.segmentation_head("auxiliary_head")(x, train),)
        return DenseOutput(logits=logits, auxiliary=auxiliary if train else (), covers=covers)

    def _levels(self, images: jax.Array, train: bool) -> list[jax.Array]:
        """Maps at strides 4, 8, 16 and 32 (at patch 16), of their own widths."""
        grid = tuple(side // self.patch_size for side in images.shape[1:3])
        levels, patch_size, image_size = [], self.patch_size, self.image_size
        if self.blocks:
            *levels, images = self.stem(name="stem")(images, train)
            patch_size, image_size = 1, native_grid(self.image_size, self.patch_size)
        sizes = {"patch_size": patch_size, "image_size": image_size, "taps": self.head_taps}
        tokens = backbone(self, **sizes)(images, train=train)
        for i, tap in enumerate(self.head_taps, start=len(levels)):
            x = Readout(self.readout, self.gelu, self.dtype, name=f"readout_{i}")(tokens[tap])
            x = x.reshape(x.shape[0], *grid, self.hidden_size)
            levels.append(Reassemble(self.reassemble[i], i, self.dtype, name=f"reassemble_{i}")(x))
        return levels

    def stem(self, **options: Any) -> ResNet:
        """The hybrid's ResNetV2."""
        if len(self.blocks) != 3 or self.patch_size != 16:
            raise UserError(
                f"The stem of a hybrid DPT has three stages and patches of 16 pixels; blocks={self.blocks}, "
                f"patch_size={self.patch_size}."
            )
        remat = self.remat == "full"
        return ResNet(self.blocks, "group", self.stem_width, 16, remat, dtype=self.dtype, **options)

    def segmentation_head(self, name: str | None, **options: Any) -> SegmentationHead:
        """The head, or the auxiliary head, before the last enlargement."""
        return self._build(SegmentationHead, name, 2, self.num_classes, self.head_dropout, **options)

    def _build(
        self, kind: Callable[..., nn.Module], name: str | None, train: int, *sizes: Any, **options: Any
    ) -> nn.Module:
        """`train` is the position of that argument of the call, the module itself counted."""
        if self.remat == "full":
            kind = nn.remat(kind, static_argnums=(train,))
        return kind(*sizes, dtype=self.dtype, name=name, **options)


def _level_channels(model: Dpt) -> tuple[int, ...]:
    from_stem = (EXPANSION * model.stem_width, 2 * EXPANSION * model.stem_width) if model.blocks else ()
    return (*from_stem, *model.reassemble[len(from_stem) :])


def _macs(model: Dpt, size: tuple[int, int]) -> int:
    multiple, width, inner = 2 * model.patch_size, model.hidden_size, model.features
    size = tuple(-(-side // multiple) * multiple for side in size)
    grid = size[0] * size[1] // model.patch_size**2
    total = encoder_macs(grid + 1, width, model.num_layers, model.mlp_size)
    if model.blocks:
        stem = model.stem(parent=None)
        total += resnet_macs(stem, size) + grid * EXPANSION * stem.width * 4 * width
    else:
        total += grid * 3 * model.patch_size**2 * width
    # Of every level its pixels, sixteen, four, one and a quarter per patch; the fusion's output has four times as many.
    pixels = [grid * 4**2, grid * 2**2, grid, grid // 4]
    channels = _level_channels(model)
    for i in range(2 if model.blocks else 0, LEVELS):
        total += grid * (2 * width * width if model.readout == "project" else 0) + grid * width * channels[i]
        total += (pixels[i] * channels[i] ** 2 if i < 2 else 0) + (9 * pixels[i] * channels[i] ** 2 if i == 3 else 0)
    for i, (area, given) in enumerate(zip(pixels, channels, strict=True)):
        units = 1 if i == LEVELS - 1 else 2
        total += area * (9 * given * inner + units * 2 * 9 * inner**2) + 4 * area * inner**2
    area = 4 * pixels[0]
    if model.head == "segmentation":
        return total + area * (9 * inner**2 + inner * model.num_classes)
    half = inner // 2
    return total + area * (9 * inner * half + 4 * DEPTH_CHANNELS * (9 * half + model.num_classes))


def unused_in_publication(model: Dpt) -> int:
    """Parameters that the published module owns beside ours and never uses; published counts include them.

    The ViT's classifier of 1000 classes and its final norm, and the deepest fusion's unit for a level it does not get.
    The auxiliary head has no part in the published forward pass, but is one of ours unless `auxiliary=False`. (Hugging
    Face's module has all of these but the classifier.)
    """
    unused = (model.hidden_size + 1) * 1000 + 2 * model.hidden_size
    per_conv = 9 * model.features**2 + model.features * (2 if model.batch_norm else 1)
    unused += 2 * per_conv
    if model.head == "segmentation" and not model.auxiliary:
        unused += 9 * model.features**2 + 2 * model.features + (model.features + 1) * model.num_classes
    return unused


_VARIANTS = {
    "base": SIZES["B"],
    "large": {**SIZES["L"], "reassemble": (256, 512, 1024, 1024)},
    "hybrid": {**SIZES["B"], "blocks": (3, 4, 9), "reassemble": (256, 512, 768, 768)},
}

for _name, _options, _classes in (("dpt", {}, 3), ("dpt_depth", {"head": "depth", "batch_norm": False}, 1)):
    register_model(
        _name,
        variants={variant: {**sizes, "num_classes": _classes, **_options} for variant, sizes in _VARIANTS.items()},
        default_variant="base",
        macs=_macs,
        image_size=(384, 384),
        num_classes=_classes,
    )(Dpt)
