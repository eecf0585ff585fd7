"""Parameters and multiply-accumulates of models, counted without computing anything."""

from typing import Any

import flax.linen as nn
import jax

from jax_densevit.models import dpt, setr
from jax_densevit.models.registry import create_model, example_inputs, registered_models

# What the published modules own and never use: a function of the model, by its class.
_UNUSED_IN_PUBLICATION = {dpt.Dpt: dpt.unused_in_publication, setr.Setr: setr.unused_in_publication}


def count_parameters(model: nn.Module, image_size: tuple[int, int]) -> int:
    """The number of parameters that `model.init` makes, auxiliary heads included, running statistics not.

    Args:
      model: any registered model.
      image_size: (height, width) of the image it is initialised with. No parameter's shape depends on it: position
        tables have the model's own native size (which ColTran insists on).
    """
    variables = jax.eval_shape(model.init, jax.random.key(0), *example_inputs(model, image_size))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def count_like_paper(model: nn.Module, image_size: tuple[int, int]) -> int:
    """The number of parameters as the publication of the model counts them.

    For SETR that is the whole training graph with every auxiliary head, plus layers that the published modules own and
    never use: a 1x1 layer 512 -> K in every official head, MLA's class token and its position. The published values
    hold for 150 classes (ADE20K) and 512 x 512 pixels. The encoder's final norm counts nowhere, having no use in SETR.
    For DPT it adds the ViT's classifier of 1000 classes and its final norm, the deepest fusion's first unit, and the
    auxiliary head where the model was built without. For other models it is the plain count.
    """
    return count_parameters(model, image_size) + _unused(model)


def _unused(model: nn.Module) -> int:
    return _UNUSED_IN_PUBLICATION.get(type(model), lambda _: 0)(model)


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
            options |= entry.variants[variant]
            model = create_model(name, variant, **{k: v for k, v in options.items() if k in entry.options})
            image_size = options["image_size"]
            image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
            parameters = count_parameters(model, image_size)
            rows.append(
                {
                    "model": name,
                    "variant": variant,
                    "default": variant == entry.default_variant,
                    "image_size": list(image_size),
                    "num_classes": entry.num_classes,
                    "parameters": parameters,
                    "parameters_as_published": parameters + _unused(model),
                    "gmacs": entry.macs(model, image_size) / 1e9,
                }
            )
    return rows
