"""The Colorization Transformer: three networks, from a gray picture to coarse colors, all colors, all pixels."""

from jax_densevit.models.coltran.colorizer import Colorizer
from jax_densevit.models.coltran.upsampler import Upsampler

__all__ = ["Colorizer", "Upsampler"]
