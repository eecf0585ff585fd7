"""Parameters and multiply-accumulates of models, counted without computing anything."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.models.registry import create_model, registered_models
from jax_densevit.models.setr import Setr, unused_in_publication


def count_parameters(model: nn.Module, image_size: tuple[int, int]) -> int:
    """The number of parameters that `model.init` makes, auxiliary heads included, running statistics not.

    Args:
      model: any registered model.
      image_size: (height, width) of the image it is initialised with. No parameter's shape depends on it: position
        tables have the model's own native size.
    """
    image = jax.ShapeDtypeStruct((1, *image_size, 3), jnp.float32)
    variables = jax.eval_shape(lambda key, image: model.init(key, image), jax.random.key(0), image)
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def count_like_paper(model: nn.Module, image_size: tuple[int, int]) -> int:
    """The number of parameters as the publication of the model counts them.

    For SETR that is the whole training graph with every auxiliary head, plus layers that the published modules own and
    never use: a 1x1 layer 512 -> K in every official head, MLA's class token and its position. The published values
    hold for 150 classes (ADE20K) and 512 x 512 pixels. The encoder's final norm counts nowhere, having no use in SETR.
    For other models it is the plain count.
    """
    return count_parameters(model, image_size) + _unused(model)


def _unused(model: nn.Module) -> int:
    return unused_in_publication(model) if isinstance(model, Setr) else 0


def model_table() -> list[dict[str, Any]]:
    """One row per registered model and variant, at the sizes that its published counts are for.

    Returns:
      Dicts of `model`, `variant`, `default` (bool), `image_size` [height, width], `num_classes`, `parameters`,
      `parameters_as_published` (see :func:`count_like_paper`) and `gmacs` (1e9 multiply-accumulates of one forward pass
      of one image, auxiliary heads not running).
    """
    rows = []
    for name, entry in registered_models().items():
        for variant in entry.variants:
            options = {"num_classes": entry.num_classes, "image_size": entry.image_size, "scan": True}
            model = create_model(name, variant, **{k: v for k, v in options.items() if k in entry.options})
            parameters = count_parameters(model, entry.image_size)
            rows.append(
                {
                    "model": name,
                    "variant": variant,
                    "default": variant == entry.default_variant,
                    "image_size": list(entry.image_size),
                    "num_classes": entry.num_classes,
                    "parameters": parameters,
                    "parameters_as_published": parameters + _unused(model),
                    "gmacs": entry.macs(model, entry.image_size) / 1e9,
                }
            )
    return rows
