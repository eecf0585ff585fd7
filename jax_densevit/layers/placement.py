"""Parameters of scanned layers that lie in pieces on several devices: made whole one layer at a time, where it is used.

A module that scans over stacked layers passes each layer's parameters through :func:`whole_layer`. Nothing happens
unless somebody above said, for the time of a trace, how a layer becomes whole (:func:`layers_made_whole_by`).
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

_MAKE_WHOLE: contextvars.ContextVar[Callable[[tuple[str, ...], Any], Any] | None] = contextvars.ContextVar(
    "make_whole", default=None
)


def whole_layer(path: tuple[str, ...], params: Any) -> Any:
    """The parameters of one layer as it computes with them.

    Args:
      path: where the stacked layers are held in the model's parameters.
      params: those of one layer: the tree found there without its first axis.
    """
    make_whole = _MAKE_WHOLE.get()
    return params if make_whole is None else make_whole(path, params)


@contextlib.contextmanager
def layers_made_whole_by(make_whole: Callable[[tuple[str, ...], Any], Any]) -> Iterator[None]:
    """Within it, :func:`whole_layer` answers with `make_whole(path, params)`."""
    token = _MAKE_WHOLE.set(make_whole)
    try:
        yield
    finally:
        _MAKE_WHOLE.reset(token)
