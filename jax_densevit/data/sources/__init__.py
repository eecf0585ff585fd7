"""Data sources by name. Every file in this folder is imported here, so that its sources register themselves."""

import importlib
import pkgutil

from jax_densevit.data.sources.registry import create_source, register_source, registered_sources

__all__ = ["create_source", "register_source", "registered_sources"]

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
