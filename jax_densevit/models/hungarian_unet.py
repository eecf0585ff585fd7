"""Hungarian U-Net: a U-Net whose output channels are the masks of queries, with a class for each of them.

From the report "Image Segmentation with Transformers" (Schmidt-Mengin 2021, section 4), and its closing idea, BERT
layers between encoder and decoder. A linear layer on the output of the encoder predicts the classes; the report does
not say how the map becomes a vector: here by its mean, so that images may have any size.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.layers.convolution import classifier
from jax_densevit.models.output import QueryOutput
from jax_densevit.models.registry import find_model, register_model
from jax_densevit.models.unet import UNet


def unet_of(model: "HungarianUNet", **options: Any) -> UNet:
    """The U-Net of a model, with the masks as output channels."""
    names = ("base", "conv_bias", "num_layers", "image_size", "dropout", "dtype")
    return UNet(num_classes=model.num_queries, **{name: getattr(model, name) for name in names}, **options)


def _macs(model: "HungarianUNet", size: tuple[int, int]) -> int:
    classes = 2**4 * model.base * model.num_queries * (model.num_classes + 1)
    return find_model("unet").macs(unet_of(model), size) + classes


@register_model(
    "hungarian_unet",
    variants={"32": {}, "32-bias": {"conv_bias": True}, "32-bert": {"num_layers": 4}, "64": {"base": 64}},
    default_variant="32",
    macs=_macs,
    image_size=(128, 256),
    num_classes=8,
)
class HungarianUNet(nn.Module):
    """One mask per output channel of a U-Net; see the head of this file.

    With 100 queries and base 32 the U-Net has 7,766,308 parameters (7,769,252 with `conv_bias`), the classes of the
    eight kinds of things of Cityscapes 461,700.

    Parameters: `unet/...` (see `models.unet.UNet`), `classes/{kernel,bias}`, and `auxiliary_<i>/{kernel,bias}`.

    Attributes:
      num_classes: K, without "no object".
      num_queries: Q.
      base, conv_bias, num_layers, image_size, dropout: see `models.unet.UNet`.
      auxiliary: also predict masks from the decoder's smaller maps in training, with the classes of the whole (deep
        supervision).
      dtype: type of the computation; parameters, statistics and outputs are float32.
    """

    num_classes: int = 8
    num_queries: int = 100
    base: int = 32
    conv_bias: bool = False
    num_layers: int = 0
    image_size: int | tuple[int, int] = (128, 256)
    dropout: float = 0.1
    auxiliary: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> QueryOutput:
        """`[B, H, W, 3]` normalised images, H and W at least 16 -> masks `[B, Q, H, W]`.

        Training needs the rng stream "dropout" where there are transformer blocks. `features`: those of the U-Net.
        """
        dense = unet_of(self, name="unet")(images, train=train)
        pooled = dense.features["bottleneck"].astype(jnp.float32).mean((1, 2))
        classes = classifier(self.num_queries * (self.num_classes + 1), pooled.shape[-1], jnp.float32, "classes")(
            pooled
        )
        classes = classes.reshape(-1, self.num_queries, self.num_classes + 1)
        auxiliary = []
        for i in (3, 2, 1) if self.auxiliary and (train or self.is_initializing()) else ():
            x = dense.features[f"decoder_{i}"]
            masks = classifier(self.num_queries, x.shape[-1], self.dtype, f"auxiliary_{i}")(x)
            # Where the sides are not multiples of 16 the smaller maps cover a few pixels less at the end.
            auxiliary.append(QueryOutput(classes, masks.transpose(0, 3, 1, 2), covers=dense.covers))
        return QueryOutput(
            classes,
            dense.logits.transpose(0, 3, 1, 2),
            auxiliary=tuple(auxiliary) if train else (),
            features=dense.features,
            covers=dense.covers,
        )
