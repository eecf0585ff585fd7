"""Which examples make a training step fail, when only its sum says so.

Halves of the batch are tried until single examples are left. A try is the training step itself, on a batch of the same
size that repeats its suspects: nothing is compiled, nothing needs more memory, and "finite" means what it means in
training. It works for every task and model, and over several processes.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_densevit.data.source import Source
from jax_densevit.training.mesh import batch_sharding, replicated

LISTED = 32  # examples named in one sentence
MOST = 4  # groups that are searched further; where more fail, it is not the doing of single examples


def find_culprits(step: Callable[..., Any], state: Any, batch: dict[str, jax.Array], mesh: Mesh) -> list[int]:
    """The indices in their source of the examples of a failed step that are not finite without the others.

    Where it is not single examples, because nearly all fail or none does without the others, these are all examples
    that cannot be told apart. Every process asks, and hears the same.

    Args:
      step: the compiled training step.
      state: any near the step that failed; it is donated, and worth nothing afterwards.
      batch: of the step, with "index" int32 `[B]`.
      mesh: over which they lie.
    """
    pick = jax.jit(lambda batch, rows: jax.tree.map(lambda x: x[rows], batch), out_shardings=batch_sharding(mesh))

    def fails(rows: np.ndarray) -> bool:
        nonlocal state
        state, numbers = step(state, pick(batch, np.resize(rows, size)))
        return not numbers["finite"].item()

    index = indices(batch, mesh)
    size = len(index)
    with jax.transfer_guard("allow"):
        groups = [np.arange(size)]
        while len(groups) <= MOST and any(len(rows) > 1 for rows in groups):
            halves = [half for rows in groups for half in np.array_split(rows, 2) if half.size]
            failing = [half for half in halves if fails(half)]
            if not failing or MOST <= len(failing) == len(halves):
                break
            groups = failing
        return sorted(set(index[np.concatenate(groups)].tolist()))


def indices(batch: dict[str, jax.Array], mesh: Mesh) -> np.ndarray:
    """The index of every example of a global batch in its source, int32 `[B]`; every process asks."""
    with jax.transfer_guard("allow"):
        return np.asarray(jax.jit(lambda x: x, out_shardings=replicated(mesh))(batch["index"]))


def names(source: Source, index: Iterable[int]) -> str:
    """What the examples are called, "a, b, c"; "example 7" for one that cannot be read now."""
    index, found = list(index), []
    for number in index[:LISTED]:
        try:
            found.append(str(source.read(number)["id"]))
        except Exception:  # naming them must not hide what happened to them
            found.append(f"example {number}")
    return ", ".join(found) + (f" and {len(index) - LISTED} more" if len(index) > LISTED else "")
