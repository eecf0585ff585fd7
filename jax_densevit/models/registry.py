"""Models by name. One decorator registers, one function builds, one lists."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError, check_name, check_options, did_you_mean


@dataclasses.dataclass(frozen=True)
class Entry:
    """A registered model: its Flax class, its named variants (keyword arguments each) and what it costs.

    Attributes:
      name: the registered name.
      build: the Flax module class.
      variants: variant name -> keyword arguments.
      default_variant: the variant taken when none is named.
      macs: `macs(model, (height, width)) -> int`, multiply-accumulates of one forward pass (evaluation graph) of one
        image, counted analytically (XLA's own count sees a scanned layer once).
      image_size: the (height, width) that the published counts are for, shown by `python -m jax_densevit.models`.
      num_classes: the number of classes that the published counts are for.
    """

    name: str
    build: Callable[..., nn.Module]
    variants: Mapping[str, Mapping[str, Any]]
    default_variant: str
    macs: Callable[[nn.Module, tuple[int, int]], int]
    image_size: tuple[int, int]
    num_classes: int

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the keyword arguments that the module takes."""
        return tuple(p for p in inspect.signature(self.build).parameters if p not in ("parent", "name"))


_REGISTRY: dict[str, Entry] = {}


def register_model(
    name: str,
    *,
    variants: Mapping[str, Mapping[str, Any]],
    default_variant: str,
    macs: Callable[[nn.Module, tuple[int, int]], int],
    image_size: tuple[int, int],
    num_classes: int,
):
    """Class decorator that enters a Flax module in the registry; arguments as in :class:`Entry`."""

    def enter(build):
        if name in _REGISTRY:
            raise ValueError(f"model {name!r} is registered twice")
        if default_variant not in variants:
            raise ValueError(f"model {name!r}: default variant {default_variant!r} is not among its variants")
        _REGISTRY[name] = Entry(name, build, dict(variants), default_variant, macs, image_size, num_classes)
        return build

    return enter


def registered_models() -> dict[str, Entry]:
    """All registered models by name (a copy, sorted)."""
    return {name: _REGISTRY[name] for name in sorted(_REGISTRY)}


def find_model(name: str) -> Entry:
    """The registry entry of `name`; :class:`UserError` with the nearest name when there is none."""
    check_name("model", name, _REGISTRY)
    return _REGISTRY[name]


def example_inputs(
    model: nn.Module, image_size: tuple[int, int], batch_size: int = 1
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What `model` is called with, as shapes: for counting and timing.

    That is one float32 batch of images `[B, H, W, 3]`, unless the module has a method of the same name
    (`example_inputs(image_size, batch_size)`) that says otherwise.
    """
    if hasattr(model, "example_inputs"):
        return model.example_inputs(image_size, batch_size)
    return (jax.ShapeDtypeStruct((batch_size, *image_size, 3), jnp.float32),)


def create_model(name: str, variant: str | None = None, **options: Any) -> nn.Module:
    """Builds a model from its registered name: `create_model("setr_pup", variant="L/16", num_classes=19)`.

    Args:
      name: a registered name; `registered_models()` lists them.
      variant: one of the model's variants; None takes its default.
      **options: fields of the module; they win over the variant's. `dtype` may be a string ("bfloat16").

    Raises:
      UserError: unknown name, variant or option, each with the nearest known one.
    """
    entry = find_model(name)
    variant = entry.default_variant if variant is None else variant
    if variant not in entry.variants:
        raise UserError(f"Model {name!r} has no variant {variant!r}{did_you_mean(variant, entry.variants)}")
    check_options(f"Model {name!r}", entry.build, options, taken=("parent", "name"))
    options = {**entry.variants[variant], **options}
    if isinstance(options.get("dtype"), str):
        try:
            options["dtype"] = jnp.dtype(options["dtype"])
        except TypeError as error:
            raise UserError(
                f"Model {name!r}: dtype {options['dtype']!r} is not a number type; try 'bfloat16'."
            ) from error
    # Lists from configs and JSON become tuples: Flax module fields must be hashable.
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    return entry.build(**options)
