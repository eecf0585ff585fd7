"""Kernel distance between two sets of feature vectors: KID where they come from the FID network.

The unbiased estimate of the squared maximum mean discrepancy with the kernel `(x . y / D + 1)^3` (Binkowski et al.
2018, https://arxiv.org/abs/1801.01401). Unlike the Fréchet distance it does not depend on how many pictures there are,
but for its own noise, and may be a little below 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.metrics.frechet import SIDES, by_side
from jax_densevit.metrics.metric import State


class KernelDistance:
    """The mean over random subsets, or exactly where both sets fit into one subset.

    A state keeps vectors, at most `keep` a side: those whose places in their set hash lowest, a random choice that does
    not depend on batches, hosts or the order of merging. So neither does the result, to the last digit.

    Args:
      subsets: how many.
      subset_size: vectors of each side in a subset.
      seed: of the subsets.
      keep: vectors that a side keeps.
    """

    def __init__(self, subsets: int = 100, subset_size: int = 1000, seed: int = 0, keep: int = 10_000):
        self.subsets, self.subset_size, self.seed, self.keep = subsets, subset_size, seed, keep

    def empty(self) -> State:
        """Per side "rows" float32 `[n, D]`, "place" int64 `[n]`, sorted by the hash of the place."""
        return {side: {"rows": np.zeros((0, 0), np.float32), "place": np.zeros(0, np.int64)} for side in SIDES}

    def measure(
        self,
        pictures: jax.Array | None = None,
        reference: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        place: jax.Array,
    ) -> State:
        """The vectors of one batch, of one side or both; runs inside `jit`, whose results should be replicated.

        Args:
          pictures, reference: float `[B, D]`.
          mask: bool `[B]`; vectors where it is False count nothing. None counts all.
          place: int32 `[B]`, which picture of its set each is; two of a set never have the same.
        """
        return by_side(pictures, reference, mask, place=place.astype(jnp.int32))

    def merge(self, a: State, b: State) -> State:
        """The vectors of both, or those of lowest hash."""
        return {side: self._merge(a.get(side), b.get(side)) for side in SIDES}

    def compute(self, state: State) -> dict[str, Any]:
        """`kernel_distance` (None of fewer than two vectors a side), `kernel_distance_std` over the subsets (None where
        there was one), and how many `subsets` of what `subset_size` that is.
        """
        x, y = (state[side]["rows"].astype(np.float64) for side in SIDES)
        if min(len(x), len(y)) < 2:
            return {"kernel_distance": None, "kernel_distance_std": None, "subsets": 0, "subset_size": 0}
        if max(len(x), len(y)) <= self.subset_size:
            value = _discrepancy(x, y)
            size = min(len(x), len(y))
            return {"kernel_distance": value, "kernel_distance_std": None, "subsets": 1, "subset_size": size}
        size = min(self.subset_size, len(x), len(y))
        rng = np.random.default_rng(self.seed)
        values = [
            _discrepancy(*(rows[rng.choice(len(rows), size, replace=False)] for rows in (x, y)))
            for _ in range(self.subsets)
        ]
        return {
            "kernel_distance": float(np.mean(values)),
            "kernel_distance_std": float(np.std(values)),
            "subsets": self.subsets,
            "subset_size": size,
        }

    def _merge(self, a: State | None, b: State | None) -> State:
        parts = [_counted(side) for side in (a, b) if side is not None]
        parts = [part for part in parts if len(part["place"])] or parts[:1] or [self.empty()[SIDES[0]]]
        merged = {name: np.concatenate([part[name] for part in parts]) for name in ("rows", "place")}
        order = np.argsort(_hash(merged["place"]), kind="stable")[: self.keep]
        return {name: array[order] for name, array in merged.items()}


def _counted(side: State) -> State:
    kept = np.asarray(side["mask"]) if "mask" in side else slice(None)
    return {"rows": np.asarray(side["rows"])[kept], "place": np.asarray(side["place"], np.int64)[kept]}


def _discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """Of float64 `[n, D]` and `[m, D]`; a vector's product with itself counts nowhere."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        products = kernel(a, a)
        return (products.sum() - np.trace(products)) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def _hash(place: np.ndarray) -> np.ndarray:
    """SplitMix64 of whole numbers (Steele et al. 2014): uint64 that look random, different for different numbers."""
    z = place.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
