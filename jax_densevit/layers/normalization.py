"""Batch norm with the running statistics of the published dense models, layer norm with a lean gradient."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last (Ioffe & Szegedy 2015), with PyTorch's running variance.

    A batch is normalised by its own (biased) variance, but the running variance collects the unbiased one, n / (n - 1)
    times that; Flax's own layer collects the biased one, which differs where n is small. Statistics and arithmetic are
    float32. Under `jit` with a batch sharded over devices the mean and variance are those of the global batch.

    Attributes:
      momentum: what the running statistics keep per step (one minus PyTorch's `momentum`).
      epsilon: added to the variance.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises `x` `[..., C]` (any floating-point type, kept), by batch statistics when `train`.

        Raises:
          UserError: `train` with one value per channel only.
        """
        channels = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        wide = x.astype(jnp.float32)
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = wide.mean(axes)
            # Two passes: the one-pass form E[x^2] - E[x]^2 loses all digits where the mean is far from zero.
            var = jnp.square(wide - mean).mean(axes)
            count = x.size // x.shape[-1]
            if count < 2:
                raise UserError(
                    f"Batch normalisation cannot learn from one value per channel (a map of {x.shape}); "
                    "take a larger batch or larger crops."
                )
            if not self.is_initializing() and self.is_mutable_collection("batch_stats"):
                running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
                unbiased = var * (count / (count - 1))
                running_var.value = self.momentum * running_var.value + (1 - self.momentum) * unbiased
        else:
            mean, var = running_mean.value, running_var.value
        # One multiply-add per value; the factor is made per channel.
        factor = scale * jax.lax.rsqrt(var + self.epsilon)
        return ((wide - mean) * factor + bias).astype(x.dtype)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (Ba et al. 2016).

    Statistics are float32, by the two-pass formula (the one-pass one loses digits on large means).

    Parameters: `scale [D]`, `bias [D]`, as of Flax's own layer.

    Attributes:
      epsilon: added to the variance.
      dtype: type of the result.
    """

    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`[..., D]` of any floating-point type -> `[..., D]` of type `dtype`."""
        features = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, features, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, features, jnp.float32)
        return _layer_norm(x, scale, bias, self.epsilon, self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(x, scale, bias, epsilon, dtype):
    # The gradient keeps the input and two numbers per row; autodiff keeps several arrays of the input's size.
    return _layer_norm_forward(x, scale, bias, epsilon, dtype)[0]


def _layer_norm_forward(x, scale, bias, epsilon, dtype):
    normal, mean, factor = _normalised(x, epsilon)
    return (normal * scale + bias).astype(dtype), (x, mean, factor, scale)


def _normalised(x, epsilon):
    """`x` less its mean over its deviation, in float32, the mean, and one over the deviation."""
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis=-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.square(wide - mean).mean(axis=-1, keepdims=True) + epsilon)
    return (wide - mean) * factor, mean, factor


def _layer_norm_backward(epsilon, dtype, kept, dy):
    # Behind a barrier, or the compiler keeps the normalised input of the forward pass in memory instead.
    x, *numbers, dy = jax.lax.optimization_barrier((*kept, dy.astype(jnp.float32)))

    def again(x, mean, factor, scale, dy):
        # On a CPU the statistics are computed anew for each gradient: so this and the forward pass are three programs
        # that read their input once. Shared, they go through memory, repeated along the rows.
        normal, _, factor = _normalised(x, epsilon)
        return _gradients(normal, _normalised(jax.lax.optimization_barrier(x), epsilon)[0], factor, scale, dy)

    def shared(x, mean, factor, scale, dy):
        normal = (x.astype(jnp.float32) - mean) * factor
        return _gradients(normal, normal, factor, scale, dy)

    dx, dscale, dbias = jax.lax.platform_dependent(x, *numbers, dy, cpu=again, default=shared)
    return dx.astype(x.dtype), dscale, dbias


def _gradients(normal, same, factor, scale, dy):
    """To the input, the scale and the bias; `same` is `normal` for that of the scale."""
    dnormal = dy * scale
    dx = dnormal - dnormal.mean(axis=-1, keepdims=True) - normal * (dnormal * normal).mean(axis=-1, keepdims=True)
    rows = tuple(range(normal.ndim - 1))
    return factor * dx, (dy * same).sum(rows), dy.sum(rows)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
