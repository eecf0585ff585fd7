"""Trees of arrays as plain nested dicts, the form in which checkpoints hold them: no class of any library in it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.training.paths import named_leaves


def to_plain(tree: Any) -> dict[str, Any]:
    """Any tree as nested dicts by the names of its path (`{"0": {"mu": {...}}}`).

    Arrays without elements, which Orbax refuses, are left out; :func:`from_plain` makes them again.
    """
    result: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if 0 in leaf.shape:
            continue
        *parents, last = [jax.tree_util.keystr((key,), simple=True) for key in path]
        place = result
        for key in parents:
            place = place.setdefault(key, {})
        place[last] = leaf
    return result


def from_plain(plain: Mapping[str, Any], tree: Any) -> Any:
    """The inverse: the structure of `tree` (leaves with shape, dtype and sharding) with the leaves of `plain`."""

    def leaf(path, abstract):
        if 0 in abstract.shape:
            return jax.device_put(np.zeros(abstract.shape, abstract.dtype), abstract.sharding)
        place = plain
        for key in path:
            place = place[jax.tree_util.keystr((key,), simple=True)]
        return place

    return jax.tree_util.tree_map_with_path(leaf, tree)


def mismatches(name: str, stored: Any, asked: Any) -> list[str]:
    """How what a checkpoint holds differs from what is asked for: paths, shapes and dtypes, one phrase each."""
    there, here = named_leaves(stored), named_leaves(asked)
    found = [f"{name}/{path} is not in the checkpoint" for path in here if path not in there]
    found += [f"{name}/{path} is only in the checkpoint" for path in there if path not in here]
    for path in here.keys() & there.keys():
        old, new = _describe(there[path]), _describe(here[path])
        if old != new:
            found.append(f"{name}/{path} is {old} in the checkpoint and {new} in the config's model")
    return found


def _describe(leaf: Any) -> str:
    return f"{jnp.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
