"""Data sources by name: one decorator registers a class or function, one function builds."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from jax_densevit.data.centre_crop import CentreCrop
from jax_densevit.data.class_names import default_palette
from jax_densevit.data.largest_crop import LargestCentreCrop
from jax_densevit.data.raw import is_inspecting
from jax_densevit.data.source import DataInfo, Source
from jax_densevit.data.tiles import Tiles
from jax_densevit.errors import UserError, check_name, did_you_mean

_REGISTRY: dict[str, Callable[..., Source]] = {}
_FACTS: dict[str, Callable[..., DataInfo]] = {}


def register_source(name: str, facts: Callable[..., DataInfo] | None = None):
    """Decorator that enters a source (a class, or a function that returns one) under `name`.

    Its keyword arguments are the options that a config gives beside the name; those without a default are required.
    `facts` tells the source's `info` from those of the options that it names, where no file has to be read for it.
    """

    def enter(build):
        if name in _REGISTRY:
            raise ValueError(f"source {name!r} is registered twice")
        _REGISTRY[name] = build
        if facts is not None:
            _FACTS[name] = facts
        return build

    return enter


def registered_sources() -> dict[str, Callable[..., Source]]:
    """All registered sources by name (a copy, sorted)."""
    import jax_densevit.data.sources  # noqa: F401  registers the package's own sources

    return {name: _REGISTRY[name] for name in sorted(_REGISTRY)}


def source_facts(name: str, **options: Any) -> DataInfo:
    """The `info` of the source that `create_source` would build, where possible without its data.

    Raises:
      UserError: an unknown name; what a source finds wrong that must be built to know its facts.
    """
    check_name("data source", name, registered_sources())
    if name not in _FACTS:
        return create_source(name, **options).info
    facts = _FACTS[name]
    known = inspect.signature(facts).parameters
    info = facts(**{option: value for option, value in options.items() if option in known})
    return info if info.palette else dataclasses.replace(info, palette=default_palette(len(info.classes)))


def create_source(
    name: str,
    *,
    centre_crop: Sequence[int] = (0, 0),
    largest_crop: Sequence[int] = (0, 0),
    tiles: Sequence[int] = (0, 0),
    **options: Any,
) -> Source:
    """Builds a source from its registered name: `create_source("ade20k", root="...", split="train")`.

    Args:
      name: the registered name.
      centre_crop: (height, width) of the middle of every example that is taken, whatever the source, see
        :class:`~jax_densevit.data.centre_crop.CentreCrop`; (0, 0) takes all. `check_data` looks at whole files.
      largest_crop: (height, width) to which the largest window of these proportions in the middle of every example is
        averaged, see :class:`~jax_densevit.data.largest_crop.LargestCentreCrop`.
      tiles: (height, width) of windows side by side that become examples, see :class:`~jax_densevit.data.tiles.Tiles`;
        of the centre crop where both are given.
      options: the source's own.

    Raises:
      UserError: unknown name or option, each with the nearest known one; a required option that is missing; and
        whatever the source itself finds wrong (a missing folder, an empty split).
    """
    known_sources = registered_sources()
    if name not in known_sources:
        raise UserError(f"There is no data source named {name!r}{did_you_mean(name, known_sources)}")
    build = known_sources[name]
    parameters = inspect.signature(build).parameters
    for option in options:
        if option not in parameters:
            known = [*parameters, "centre_crop", "largest_crop", "tiles"]
            raise UserError(f"Data source {name!r} has no option {option!r}{did_you_mean(option, known)}")
    for parameter in parameters.values():
        if parameter.default is parameter.empty and parameter.name not in options:
            raise UserError(f"Data source {name!r} needs the option {parameter.name!r}: give it in the config.")
    source = build(**options)
    if is_inspecting():
        return source
    for wrap, size in ((CentreCrop, centre_crop), (LargestCentreCrop, largest_crop), (Tiles, tiles)):
        source = source if tuple(size) == (0, 0) else wrap(source, size)
    return source
