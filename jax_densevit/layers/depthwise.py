"""Depthwise convolutions as shifted products: XLA's grouped convolution takes ten to forty times as long on a CPU."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.layers.embedding import torch_uniform


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def depthwise(x: jax.Array, kernel: jax.Array, stride: int = 1, bias: jax.Array | None = None) -> jax.Array:
    """Convolves every channel with its own kernel; borders as TensorFlow's "SAME": the odd zero comes at the end.

    Args:
      x: `[B, h, w, C]`.
      kernel: `[k, k, 1, C]`, the layout of a convolution with `feature_group_count=C`.
      stride: of both axes.
      bias: `[C]`, added to the result; its gradient costs least here, where the one to the result is at hand.

    Returns:
      `[B, ceil(h / stride), ceil(w / stride), C]` in the type of `x`; products of half precision are added in float32.
    """
    size = tuple(-(-side // stride) for side in x.shape[1:3])
    # Behind a barrier, or the compiler finds the map itself in the middle of the padded one, and computes what made it
    # twice: exponentials and quotients of the GELU before it would go through memory, to be shared.
    padded = jax.lax.optimization_barrier(jnp.pad(x, _borders(x, kernel, stride)))
    y = _correlate(padded, kernel, stride, size)
    return y if bias is None else y + bias


def _borders(x: jax.Array, kernel: jax.Array, stride: int) -> tuple[tuple[int, int], ...]:
    """Zeros around `x`, of every axis."""
    lacking = [max(0, (-(-side // stride) - 1) * stride + len(kernel) - side) for side in x.shape[1:3]]
    return ((0, 0), *((n // 2, n - n // 2) for n in lacking), (0, 0))


def _correlate(padded: jax.Array, kernel: jax.Array, stride: int, size: tuple[int, int]) -> jax.Array:
    """The products of shifted maps, added up: `[B, *size, C]` in the type of `padded`."""
    total = 0.0
    for i in range(len(kernel)):
        for j in range(len(kernel)):
            shifted = padded[:, i::stride, j::stride][:, : size[0], : size[1]]
            total = total + _wide(shifted) * _wide(kernel[i, j, 0])
    return total.astype(padded.dtype)


def _forward(x, kernel, stride, bias):
    return depthwise(x, kernel, stride, bias), (x, kernel, bias)


def _backward(stride, saved, g):
    # Written out, because it takes a third of the time and less memory than what differentiation makes of the slices.
    x, kernel, bias = saved
    k, size = len(kernel), g.shape[1:3]
    borders = _borders(x, kernel, stride)
    padded = jnp.pad(x, borders)
    # Every value of g reaches k x k values of x: zeros between its values undo the stride, zeros around it the borders.
    # Behind a barrier as above, and all that follows reads this array: what makes g then writes no other.
    ends = [
        (k - 1 - low, side + low - (n - 1) * stride - 1, stride - 1)
        for side, n, (low, _) in zip(x.shape[1:3], size, borders[1:3], strict=True)
    ]
    spread = jax.lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), *ends, (0, 0, 0)))
    spread = jax.lax.optimization_barrier(spread)
    dx = _correlate(spread, kernel[::-1, ::-1], 1, x.shape[1:3])

    def products(rows, g):
        """Rows of `padded` with the rows of `spread` that hold what saw them -> sums `[B, k * k (+ 1), C]`."""
        g = _wide(g[:, ::stride, ends[1][0] :: stride][:, :, : size[1]])
        n, width = g.shape[1:3]
        shifts = [(i, j) for i in range(k) for j in range(k)]
        sums = [(_wide(rows[:, i::stride, j::stride][:, :n, :width]) * g).sum((1, 2)) for i, j in shifts]
        return jnp.stack(sums if bias is None else [*sums, g.sum((1, 2))], 1)

    def by_rows(padded, spread):
        def add_row(total, row):
            rows = jax.lax.dynamic_slice_in_dim(padded, row * stride, k, 1)
            return total + products(rows, jax.lax.dynamic_slice_in_dim(spread, ends[0][0] + row * stride, 1, 1)), None

        zeros = jnp.zeros((x.shape[0], k * k + (bias is not None), x.shape[-1]), jnp.float32)
        return jax.lax.scan(add_row, zeros, jnp.arange(size[0]))[0]

    def at_once(padded, spread):
        return products(padded, spread[:, ends[0][0] :][:, : (size[0] - 1) * stride + 1])

    # On a CPU sums over a whole map go through memory for each of them; row by row they stay in its cache: a sixth of
    # the time. Accelerators want few large kernels.
    sums = jax.lax.platform_dependent(padded, spread, cpu=by_rows, default=at_once).sum(0)
    dbias = None if bias is None else sums[-1].astype(bias.dtype)
    return dx, sums[: k * k].reshape(kernel.shape).astype(kernel.dtype), dbias


depthwise.defvjp(_forward, _backward)


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
        return depthwise(x.astype(self.dtype), kernel.astype(self.dtype), bias=bias.astype(self.dtype))
