"""Residual networks of bottlenecks (He et al. 2016, https://arxiv.org/abs/1512.03385): the stems of hybrid ViTs.

`norm="batch"` is ResNet-50 as trained everywhere (stride in the 3x3 convolution, "v1.5"; symmetric borders).
`norm="group"` is BiT's ResNetV2-50 as the hybrid ViTs have it (Kolesnikov et al. 2020; Dosovitskiy et al. 2021): the
same blocks, normalised after the convolutions like v1 in spite of the name, with group norm, standardised kernels and
TensorFlow's "SAME" borders.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.convolution import StandardizedConv, convolve
from jax_densevit.layers.normalization import BatchNorm

NORMS = ("batch", "group")
EXPANSION = 4  # channels of a bottleneck's output over those inside


class Convolution(nn.Module):
    """Convolution, normalisation and, if asked, ReLU.

    Parameters: `conv/kernel [k, k, C, features]`, `norm/{scale,bias}`.

    Attributes:
      norm: a name of `NORMS`. Group norm has 32 groups, or one per channel where there are fewer channels.
      Others: see `StandardizedConv`.
    """

    features: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    relu: bool = True
    norm: str = "batch"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, h, w, C]` -> `[B, ceil(h / stride), ceil(w / stride), features]`."""
        if self.norm == "group":
            conv = (self.features, self.kernel_size, self.stride, self.dilation)
            x = StandardizedConv(*conv, dtype=self.dtype, name="conv")(x)
            groups = min(32, self.features)
            x = nn.GroupNorm(groups, epsilon=1e-5, use_fast_variance=False, dtype=self.dtype, name="norm")(x)
        else:
            x = nn.Conv(
                self.features,
                (self.kernel_size, self.kernel_size),
                self.stride,
                padding=self.dilation * (self.kernel_size // 2),
                kernel_dilation=self.dilation,
                use_bias=False,
                dtype=self.dtype,
                kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
                conv_general_dilated=convolve,
                name="conv",
            )(x)
            x = BatchNorm(name="norm")(x, train)
        return nn.relu(x) if self.relu else x


class Bottleneck(nn.Module):
    """`relu(shortcut(x) + conv3(conv2(conv1(x))))`, kernels 1, 3 and 1; the 3x3 has the stride.

    Parameters: `conv<1|2|3>/{conv,norm}/...`; `shortcut/{conv,norm}/...` where shape or stride change.
    """

    width: int
    stride: int
    dilation: int
    norm: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """`[B, h, w, C]` -> `[B, ceil(h / stride), ceil(w / stride), 4 * width]`."""
        features = EXPANSION * self.width
        more = {"norm": self.norm, "dtype": self.dtype}
        y = Convolution(self.width, 1, name="conv1", **more)(x, train)
        y = Convolution(self.width, 3, self.stride, self.dilation, name="conv2", **more)(y, train)
        y = Convolution(features, 1, relu=False, name="conv3", **more)(y, train)
        if x.shape[-1] != features or self.stride != 1:
            x = Convolution(features, 1, self.stride, relu=False, name="shortcut", **more)(x, train)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network of bottlenecks without a classifier.

    Parameters: `stem/{conv,norm}/...` and `stage_<s>_block_<b>/...` (see `Bottleneck`), both counted from 0.
    Without classifier ResNet-50 has 23,508,032 parameters, the three stages of ResNetV2-50 have 11,894,848.

    Attributes:
      blocks: bottlenecks per stage: (3, 4, 6, 3) is ResNet-50, (3, 4, 9) the stem of ViT hybrids.
      norm: a name of `NORMS`.
      width: channels of the stem; stage s has `4 * width * 2**s`.
      output_stride: where halving stops; later stages dilate their 3x3 kernels instead (the first block of such a stage
        still with the dilation before it, as torchvision and timm do).
      remat: recompute each block in the backward pass instead of keeping its insides.
      dtype: type of the computation; parameters and statistics are float32.
    """

    blocks: tuple[int, ...] = (3, 4, 6, 3)
    norm: str = "batch"
    width: int = 64
    output_stride: int = 32
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        """`[B, H, W, 3]` -> one map per stage, at strides 4, 8, ... up to `output_stride`, sides rounded up.

        Raises:
          UserError: an unknown norm, or an output stride that the stages cannot have.
        """
        check_name("normalisation of a ResNet (norm)", self.norm, NORMS)
        plan = stages(self)
        more = {"norm": self.norm, "dtype": self.dtype}
        x = Convolution(self.width, 7, 2, name="stem", **more)(images.astype(self.dtype), train)
        # Behind a ReLU zeros at the border are as good as minus infinity.
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME" if self.norm == "group" else ((1, 1), (1, 1)))
        block = nn.remat(Bottleneck, static_argnums=(2,)) if self.remat else Bottleneck
        maps = []
        for s, stage in enumerate(plan):
            for b, (width, stride, dilation) in enumerate(stage):
                x = block(width, stride, dilation, name=f"stage_{s}_block_{b}", **more)(x, train)
            maps.append(x)
        return tuple(maps)


def stages(model: ResNet) -> list[list[tuple[int, int, int]]]:
    """(width, stride, dilation) of every bottleneck of every stage."""
    possible = [4 * 2**s for s in range(len(model.blocks))]
    if model.output_stride not in possible:
        stride = model.output_stride
        raise UserError(f"A ResNet of {len(possible)} stages has an output_stride among {possible}, not {stride}.")
    plan, reached, dilation = [], 4, 1
    for s, count in enumerate(model.blocks):
        stride, before = 1, dilation
        if s and reached < model.output_stride:
            stride, reached = 2, reached * 2
        elif s:
            dilation *= 2
        width = model.width * 2**s
        plan.append([(width, stride if b == 0 else 1, dilation if b else before) for b in range(count)])
    return plan


def resnet_macs(model: ResNet, size: tuple[int, int]) -> int:
    """Multiply-accumulates of the convolutions on one image of (height, width)."""
    height, width = (-(-side // 2) for side in size)
    total = height * width * 49 * 3 * model.width
    height, width, channels = -(-height // 2), -(-width // 2), model.width
    for stage in stages(model):
        for inner, stride, _ in stage:
            outer = EXPANSION * inner
            total += height * width * channels * inner
            height, width = -(-height // stride), -(-width // stride)
            total += height * width * (9 * inner * inner + inner * outer)
            if channels != outer or stride != 1:
                total += height * width * channels * outer
            channels = outer
    return total
