"""Fréchet distance between two sets of feature vectors (Heusel et al. 2017, https://arxiv.org/abs/1706.08500).

`|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))` of the Gaussians fitted to both sets, covariances divided by
`n - 1`. Whose features they are is not known here: it is the FID only if they come from the FID network.

A set is its vectors as long as there are no more of them than features, then its mean and scatter matrix in float64,
added up by blocks (Chan et al. 1979), which never subtracts large numbers from each other: merging in any order gives
the same distance to about 1e-12.

With roots `S = L' L` (the centred vectors, or eigenvectors by the roots of their eigenvalues) the trace is the sum of
the singular values of `L1 L2'`. That is never complex, and keeps all digits where covariances are singular, which the
root of `S1 S2` or its eigenvalues do not: half of the digits go when the root of a rounded zero is taken.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.errors import UserError
from jax_densevit.metrics.metric import State

SIDES = ("pictures", "reference")
SMALL = 10_000  # pictures; below it the bias, which goes as 1 / n, is a large part of an FID


class FrechetDistance:
    """The distance of `pictures` from `reference`, two sets of vectors.

    The state of a side (`no_features`) is what a file of statistics keeps; `gaussian` makes mean and covariance of it.
    """

    def empty(self) -> State:
        """Both sides without a vector."""
        return {side: no_features() for side in SIDES}

    def measure(
        self,
        pictures: jax.Array | None = None,
        reference: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> State:
        """The vectors of one batch, of one side or both; runs inside `jit`, whose results should be replicated.

        Args:
          pictures, reference: float `[B, D]`.
          mask: bool `[B]`; vectors where it is False count nothing. None counts all.
        """
        return by_side(pictures, reference, mask)

    def merge(self, a: State, b: State) -> State:
        """The vectors of both; of states of batches and added up ones alike."""
        return {side: _merge(_counted(a.get(side)), _counted(b.get(side))) for side in SIDES}

    def compute(self, state: State) -> dict[str, Any]:
        """`frechet_distance` (None of fewer than two vectors a side), how many `pictures` and `reference` there were,
        and of how many `features`.

        Raises:
          UserError: vectors that are not finite.
        """
        sides = [state[side] for side in SIDES]
        counts = [count(side) for side in sides]
        return {
            "frechet_distance": _distance(*sides) if min(counts) > 1 else None,
            **dict(zip(SIDES, counts, strict=True)),
            "features": max(side["rows"].shape[1] for side in sides),
        }


def by_side(pictures: jax.Array | None, reference: jax.Array | None, mask: jax.Array | None, **more: Any) -> State:
    """What a batch gives for the sides that are there: "rows" float32 `[B, D]`, "mask" bool `[B]` and `more`."""
    sides = dict(zip(SIDES, (pictures, reference), strict=True))
    return {
        side: {"rows": rows.astype(jnp.float32), "mask": jnp.ones(len(rows), bool) if mask is None else mask, **more}
        for side, rows in sides.items()
        if rows is not None
    }


def no_features() -> State:
    """A set without vectors: "rows" float32 `[n, D]`; of those added up "count", "mean" `[D]`, "scatter" `[D, D]`."""
    nothing = np.zeros((0, 0), np.float32)
    return {"count": np.int64(0), "mean": np.zeros(0), "scatter": np.zeros((0, 0)), "rows": nothing}


def count(side: State) -> int:
    """How many vectors a set has."""
    return int(side["count"]) + len(side["rows"])


def gaussian(side: State) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[D]` and covariance `[D, D]`, divided by n - 1, of at least two vectors."""
    side = _add_up(side)
    return side["mean"], side["scatter"] / (int(side["count"]) - 1)


def from_gaussian(count: int, mean: np.ndarray, covariance: np.ndarray) -> State:
    """The inverse of `gaussian`, without the vectors."""
    rows = np.zeros((0, len(mean)), np.float32)
    return {"count": np.int64(count), "mean": mean, "scatter": covariance * (count - 1), "rows": rows}


def caution(pictures: int, reference: int, features: int) -> str:
    """A sentence about what so few vectors do to the distance, or ""."""
    least = min(pictures, reference)
    if least <= features:
        return (
            f"With {least:,} pictures for {features:,} features the covariance is singular and the distance is mostly "
            "bias: it says nothing beside numbers of other counts."
        )
    if least < SMALL:
        return (
            f"A small sample: of {least:,} pictures a good part of the distance is bias, which goes as 1 / n; compare "
            "it with numbers of the same counts only."
        )
    return ""


def _counted(side: State | None) -> State:
    if side is None:
        return no_features()
    if "mask" not in side:
        return side
    return {**no_features(), "rows": np.asarray(side["rows"], np.float32)[np.asarray(side["mask"])]}


def _merge(a: State, b: State) -> State:
    rows = [side["rows"] for side in (a, b) if len(side["rows"])]
    merged = {**_chan(a, b), "rows": np.concatenate(rows) if len(rows) == 2 else rows[0] if rows else a["rows"]}
    return _add_up(merged) if len(merged["rows"]) > merged["rows"].shape[1] else merged


def _add_up(side: State) -> State:
    rows = side["rows"].astype(np.float64)
    if not len(rows):
        return side
    mean = rows.mean(0)
    centred = rows - mean
    block = {"count": np.int64(len(rows)), "mean": mean, "scatter": centred.T @ centred}
    return {**_chan(side, block), "rows": side["rows"][:0]}


def _chan(a: State, b: State) -> State:
    """Count, mean and scatter of both sets' added up vectors."""
    if not (a["count"] and b["count"]):
        some = a if a["count"] else b
        return {name: some[name] for name in ("count", "mean", "scatter")}
    total = a["count"] + b["count"]
    apart = b["mean"] - a["mean"]
    share = b["count"] / total
    scatter = a["scatter"] + b["scatter"] + np.outer(apart, apart) * (a["count"] * share)
    return {"count": total, "mean": a["mean"] + apart * share, "scatter": scatter}


def _distance(a: State, b: State) -> float:
    if all(np.array_equal(a[name], b[name]) for name in a):
        return 0.0  # rounding would leave something like 1e-13, of either sign
    (mean_a, root_a), (mean_b, root_b) = _root(a), _root(b)
    product = root_a @ root_b.T
    if not np.isfinite(product).all():
        raise UserError("Some features are not finite: the network's weights are damaged.")
    trace = np.linalg.svd(product, compute_uv=False).sum()
    variances = np.square(root_a).sum() + np.square(root_b).sum()
    # Of the same vectors in another order, rounding leaves something like -5e-14.
    return max(float(np.square(mean_a - mean_b).sum() + variances - 2 * trace), 0.0)


def _root(side: State) -> tuple[np.ndarray, np.ndarray]:
    """Mean `[D]`, and `[., D]` whose product with itself is the covariance."""
    if not side["count"]:
        rows = side["rows"].astype(np.float64)
        mean = rows.mean(0)
        return mean, (rows - mean) / np.sqrt(len(rows) - 1)
    mean, covariance = gaussian(side)
    if not np.isfinite(covariance).all():
        return mean, covariance  # whoever uses it says so
    values, vectors = np.linalg.eigh(covariance)
    # What is below is rounding, of either sign; its root would not be small.
    above = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return mean, (vectors[:, above] * np.sqrt(values[above])).T
