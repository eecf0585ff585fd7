"""Parameters of scanned layers that lie in pieces on several devices: made whole one layer at a time, where it is used.

A module that scans over stacked layers asks :func:`layer_maker` for a function and passes each layer's parameters
through it. It does nothing unless somebody above said, for the time of a trace, how a layer becomes whole
(:func:`layers_made_whole_by`).
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

_MAKE_WHOLE: contextvars.ContextVar[Callable[[tuple[str, ...], Any], Any] | None] = contextvars.ContextVar(
    "make_whole", default=None
)


def layer_maker(path: tuple[str, ...]) -> Callable[[Any], Any]:
    """What makes of one layer's parameters those that it computes with.

    It is asked for in the forward pass, and holds in backward passes too that are traced after the call has returned.

    Args:
      path: where the stacked layers, or a part of them, are held in the model's parameters. What it makes has that tree
        without the first axes.
    """
    make_whole = _MAKE_WHOLE.get()
    return (lambda params: params) if make_whole is None else functools.partial(make_whole, path)


@contextlib.contextmanager
def layers_made_whole_by(make_whole: Callable[[tuple[str, ...], Any], Any]) -> Iterator[None]:
    """Within it, functions of :func:`layer_maker` answer with `make_whole(path, params)`."""
    token = _MAKE_WHOLE.set(make_whole)
    try:
        yield
    finally:
        _MAKE_WHOLE.reset(token)
