"""Tasks by name."""

from collections.abc import Callable
from typing import Any

from jax_densevit.data.source import DataInfo
from jax_densevit.errors import check_name, check_options
from jax_densevit.tasks.task import Task

_REGISTRY: dict[str, Callable[..., Task]] = {}


def register_task(name: str):
    """Decorator that enters a task class, built as `cls(info, **options)`, under `name`."""

    def enter(build):
        if name in _REGISTRY:
            raise ValueError(f"task {name!r} is registered twice")
        _REGISTRY[name] = build
        return build

    return enter


def create_task(name: str, info: DataInfo, **options: Any) -> Task:
    """Builds a task for data described by `info`; :class:`UserError` for an unknown name or option."""
    check_name("task", name, _REGISTRY)
    check_options(f"Task {name!r}", _REGISTRY[name], options, taken=("info",))
    return _REGISTRY[name](info, **options)
