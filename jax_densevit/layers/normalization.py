"""Batch normalisation whose running statistics are the ones every published dense model was trained with."""

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
