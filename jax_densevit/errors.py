"""Errors a person can act on, and the search for the name that was meant.

A :class:`UserError` is one sentence with the file, the cause and the way out. Commands print it without a traceback
and leave with a non-zero exit code; anything else that escapes is a defect of ours and keeps its traceback.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable


class UserError(Exception):
    """Something outside the program is wrong: a file, a config, a flag, a machine. The message says what to do."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Says which of `known` was probably meant, as the end of a sentence: ``"; did you mean 'steps'?"`` or the list."""
    known = sorted(str(k) for k in known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}." if known else "."


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Raises :class:`UserError` with the nearest known name when `name` is not among `known`; `what` says of what."""
    known = list(known)
    if name not in known:
        raise UserError(f"There is no {what} named {name!r}{did_you_mean(name, known)}")


def check_options(owner: str, build: Callable, options: Iterable[str], taken: Iterable[str] = ()) -> None:
    """Raises :class:`UserError` for an option that `build` does not take, or that is in `taken` (set elsewhere)."""
    known = [name for name in inspect.signature(build).parameters if name not in taken]
    for option in options:
        if option not in known:
            raise UserError(f"{owner} has no option {option!r}{did_you_mean(option, known)}")
