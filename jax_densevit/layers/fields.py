"""Options that a module passes on to the modules in it, by their names."""

import dataclasses
from typing import Any

import flax.linen as nn


def shared_fields(module: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    """The fields of `kind` that `module` has, too, with its values; the others keep the defaults of `kind`."""
    names = (field.name for field in dataclasses.fields(kind) if field.name not in ("parent", "name"))
    return {name: getattr(module, name) for name in names if hasattr(module, name)}
