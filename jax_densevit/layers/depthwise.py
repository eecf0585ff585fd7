"""Depthwise convolutions as shifted products: XLA's grouped convolution takes ten to forty times as long on a CPU."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.layers.embedding import torch_uniform


def depthwise(x: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """Convolves every channel with its own kernel; borders as TensorFlow's "SAME": the odd zero comes at the end.

    Args:
      x: `[B, h, w, C]`.
      kernel: `[k, k, 1, C]`, the layout of a convolution with `feature_group_count=C`.
      stride: of both axes.

    Returns:
      `[B, ceil(h / stride), ceil(w / stride), C]` in the type of `x`; products of half precision are added in float32.
    """
    size = len(kernel)
    rows, columns = (-(-side // stride) for side in x.shape[1:3])
    lacking = [max(0, (n - 1) * stride + size - side) for n, side in zip((rows, columns), x.shape[1:3], strict=True)]
    padded = jnp.pad(x, ((0, 0), *((n // 2, n - n // 2) for n in lacking), (0, 0)))
    total = 0.0
    for i in range(size):
        for j in range(size):
            shifted = padded[:, i::stride, j::stride][:, :rows, :columns]
            total = total + _wide(shifted) * _wide(kernel[i, j, 0])
    return total.astype(x.dtype)


@jax.custom_vjp
def depthwise_3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`depthwise` with a 3x3 kernel and no stride, its gradient written out: less memory and time.

    Args:
      x: `[B, h, w, C]`.
      kernel: `[3, 3, 1, C]`, the layout of a convolution with `feature_group_count=C`.

    Returns:
      `[B, h, w, C]` in the type of `x`; products of half precision are added in float32.
    """
    return depthwise(x, kernel)


def _forward(x, kernel):
    return depthwise_3x3(x, kernel), (x, kernel)


def _backward(saved, g):
    x, kernel = saved
    height, width = x.shape[1:3]
    dx = depthwise_3x3(g, kernel[::-1, ::-1])
    padded = _pad(x)

    def products(rows, g):
        """`rows` `[B, n + 2, width + 2, C]`, `g` `[B, n, width, C]` -> `[B, 3, 3, C]`."""
        n, g = g.shape[1], _wide(g)
        sums = [(_wide(rows[:, i : i + n, j : j + width]) * g).sum((1, 2)) for i in range(3) for j in range(3)]
        return jnp.stack(sums, 1)

    def by_rows(padded, g):
        def add_row(total, row):
            rows = jax.lax.dynamic_slice_in_dim(padded, row, 3, 1)
            return total + products(rows, jax.lax.dynamic_slice_in_dim(g, row, 1, 1)), None

        zeros = jnp.zeros((x.shape[0], 9, x.shape[-1]), jnp.float32)
        return jax.lax.scan(add_row, zeros, jnp.arange(height))[0]

    # On a CPU nine sums over a whole map go nine times through memory; row by row they stay in its cache: a sixth of
    # the time. Accelerators want few large kernels.
    sums = jax.lax.platform_dependent(padded, g, cpu=by_rows, default=products).sum(0)
    return dx, sums.reshape(kernel.shape).astype(kernel.dtype)


depthwise_3x3.defvjp(_forward, _backward)


def _pad(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class DepthwiseConv(nn.Module):
    """Depthwise 3x3 convolution with a bias that keeps the size, initialised as PyTorch does.

    Parameters: `kernel [3, 3, 1, C]`, `bias [C]`.

    Attributes:
      dtype: type of the computation; parameters are float32.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, h, w, C]` -> `[B, h, w, C]`."""
        init = torch_uniform(9)
        kernel = self.param("kernel", init, (3, 3, 1, x.shape[-1]))
        bias = self.param("bias", init, (x.shape[-1],))
        return depthwise_3x3(x.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)
