"""jax_densevit: transformers that predict every pixel, in JAX."""

__version__ = "0.1.0"
