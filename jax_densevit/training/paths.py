"""Parameter paths ("encoder/block_0/attention/kernel") and the patterns that select parameters by them.

Learning-rate multipliers, sharding rules and the list of parameters that a new run may leave at their initial values
are all written as `(regular expression, value)`; the first expression found in a path decides.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from jax_densevit.errors import UserError


def path_name(path: Sequence[Any]) -> str:
    """`"a/b/c"` of a key path as JAX's tree functions give it."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path, in the tree's own order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def first_match(patterns: Sequence[str], paths: Iterable[str], what: str) -> dict[str, int]:
    """Which pattern decides each path.

    Args:
      patterns: regular expressions, searched for anywhere in the path, in order of precedence.
      paths: parameter paths.
      what: the config field that the patterns come from, for error messages.

    Returns:
      The index of the first matching pattern, by path; paths that no pattern matches are absent.

    Raises:
      UserError: a pattern that is no regular expression, that matches nothing, or that an earlier one always overrules:
        each of them would otherwise be silently without effect.
    """
    paths = list(paths)
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise UserError(f"{what}: {pattern!r} is not a regular expression ({error}).") from error
    decided: dict[str, int] = {}
    for path in paths:
        for number, pattern in enumerate(compiled):
            if pattern.search(path):
                decided[path] = number
                break
    for number, pattern in enumerate(compiled):
        if number in decided.values():
            continue
        if any(pattern.search(path) for path in paths):
            raise UserError(
                f"{what}: {pattern.pattern!r} never decides, because earlier patterns match the same parameters first; "
                "move it up or remove it."
            )
        raise UserError(
            f"{what}: {pattern.pattern!r} matches no parameter; --dry_run lists them all, for example "
            f"{', '.join(paths[:: max(1, len(paths) // 3)])}."
        )
    return decided
