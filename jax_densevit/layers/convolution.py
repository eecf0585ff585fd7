"""Convolution blocks that several models share."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.layers.embedding import torch_uniform
from jax_densevit.layers.kernel_gradient import convolution, wants_products
from jax_densevit.layers.normalization import BatchNorm
from jax_densevit.layers.product import flat_product


def convolve(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Any, **options: Any) -> jax.Array:
    """What `nn.Conv` asks of `lax.conv_general_dilated`, in forms whose gradients are fast on a CPU.

    Same numbers. A 1x1 kernel without stride is one matrix product: the gradients of such a convolution take XLA's CPU
    compiler three to six times as long. Other small kernels without stride and gaps are
    :func:`kernel_gradient.convolution` where that is faster.
    """
    size, kinds = kernel.shape[:-2], {k: options.get(k) for k in ("precision", "preferred_element_type")}
    if {*strides, *(options.get("lhs_dilation") or ()), options["feature_group_count"]} == {1}:
        if set(size) == {1} and (isinstance(padding, str) or not np.any(padding)):
            numbers = (((x.ndim - 1,), (0,)), ((), ()))
            return flat_product(x, kernel.reshape(kernel.shape[-2:]), numbers, **kinds)
        pads = jax.lax.padtype_to_pads(x.shape[1:-1], size, strides, padding) if isinstance(padding, str) else padding
        usual = {*(options.get("rhs_dilation") or ()), 1} == {1} and {*kinds.values()} == {None} and x.ndim == 4
        inside = all(0 <= n < k for pair, k in zip(pads, size, strict=True) for n in pair)
        if usual and inside and 1 < math.prod(size) <= 9 and wants_products(*kernel.shape[-2:]):
            return convolution(x, kernel, tuple((int(low), int(high)) for low, high in pads))
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)


class ConvNorm(nn.Module):
    """Convolution, batch normalisation, ReLU: the step that U-Nets and convolutional heads are made of.

    Parameters: `conv/kernel [k, k, C, features]` (and `conv/bias`), `norm/{scale,bias}`; statistics
    `norm/{mean,var}`.

    Attributes:
      features: output channels.
      kernel_size: k, odd, or (height, width) of the kernel.
      kernel_init: of the convolution; He's, unless the published model says otherwise.
      use_bias: whether the convolution has a bias. The normalisation removes it again; some published models carry one.
      dtype: type of the computation; parameters and statistics are float32.
      stride: of both axes.
      padding: "SAME" keeps the size (zeros around), "VALID" has no borders.
      epsilon: of the normalisation.
    """

    features: int
    kernel_size: int | tuple[int, int] = 3
    use_bias: bool = False
    dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.he_normal()
    stride: int = 1
    padding: str = "SAME"
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """`[B, h, w, C]` -> `[B, h, w, features]`; `train` normalises by the batch and updates the statistics."""
        size = self.kernel_size
        x = nn.Conv(
            self.features,
            (size, size) if isinstance(size, int) else size,
            self.stride,
            self.padding,
            use_bias=self.use_bias,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            conv_general_dilated=convolve,
            name="conv",
        )(x)
        return nn.relu(BatchNorm(epsilon=self.epsilon, name="norm")(x, train))


def conv_norm(features: int, kernel_size: int, use_bias: bool, channels: int, dtype: Any, name: str) -> ConvNorm:
    """`ConvNorm` with PyTorch's default initialisation, which the published heads start from."""
    init = torch_uniform(kernel_size**2 * channels)
    return ConvNorm(features, kernel_size, use_bias, dtype, init, name=name)


def classifier(num_classes: int, channels: int, dtype: Any, name: str, use_bias: bool = True) -> nn.Dense:
    """A 1x1 convolution whose products are in `dtype` and whose sums and results are float32."""
    init = torch_uniform(channels)
    return nn.Dense(
        num_classes,
        use_bias,
        dtype=dtype,
        kernel_init=init,
        bias_init=init,
        dot_general=functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32),
        name=name,
    )


class StandardizedConv(nn.Module):
    """Convolution without bias whose kernel is standardised first (Qiao et al. 2019, https://arxiv.org/abs/1903.10520).

    Every output channel's kernel gets mean 0 and variance 1 in float32, at every call: the parameters are the raw
    kernel. Borders as in TensorFlow's "SAME", which the released networks with such convolutions use.

    Parameters: `kernel [k, k, C, features]`.

    Attributes:
      features: output channels; kernel_size: k; stride, dilation: of both axes.
      epsilon: added to the variance of a kernel.
      dtype: type of the computation.
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    dilation: int = 1
    epsilon: float = 1e-8
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, C]` -> `[B, ceil(h / stride), ceil(w / stride), features]`."""
        init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        kernel = self.param("kernel", init, (self.kernel_size, self.kernel_size, x.shape[-1], self.features))
        mean = kernel.mean((0, 1, 2))
        variance = jnp.square(kernel - mean).mean((0, 1, 2))
        kernel = (kernel - mean) * jax.lax.rsqrt(variance + self.epsilon)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            "SAME",
            rhs_dilation=(self.dilation, self.dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class Upsample(nn.Module):
    """Transposed convolution whose kernel is as large as its stride, so that output patches do not overlap.

    Each input pixel becomes a patch of `factor` x `factor` pixels by one matrix product: pixel (a, b) of the patch is
    `x[i, j] @ kernel[a, b] + bias`. A PyTorch `ConvTranspose2d(kernel_size=factor, stride=factor)` weight
    `[C, features, a, b]` is this kernel transposed to (2, 3, 0, 1), not flipped.

    Parameters: `kernel [factor, factor, C, features]`, `bias [features]`.

    Attributes:
      features: output channels.
      factor: how many times larger the map becomes.
      dtype: type of the computation; parameters are float32.
      kernel_init, bias_init: None keeps the variance of the input, and starts from no bias.
    """

    features: int
    factor: int = 2
    dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer | None = None
    bias_init: nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, C]` -> `[B, h * factor, w * factor, features]`."""
        batch, height, width, channels = x.shape
        # Only C inputs meet in an output value: the spatial axes of the kernel are outputs here, not fan-in.
        unit_gain = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", batch_axis=(0, 1))
        init = unit_gain if self.kernel_init is None else self.kernel_init
        kernel = self.param("kernel", init, (self.factor, self.factor, channels, self.features), jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        y = jnp.einsum("bijc,hwcf->bihjwf", x.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)
        return y.reshape(batch, height * self.factor, width * self.factor, self.features)
