"""Exact sums over pictures, a few whole numbers each: states that merge in any order without a rounding error."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.metrics.metric import State

_PIECE = 8192  # pixels of a row that one int32 adds up, each below 2**18
_LOW = 16  # bits of a sum that go into "low"


def exact_sum(name: str, values: jax.Array) -> dict[str, jax.Array]:
    """The sums of int32 `[B, H, W]`, each below 2**18 in size, as `high * 2**16 + low`: int32 `[B]` both.

    Exact up to 2**15 rows of 8192 pixels, twice the most that an image file may have.
    """
    batch, _, width = values.shape
    if values.size == 0:
        return {f"{name}_{part}": jnp.zeros(batch, jnp.int32) for part in ("high", "low")}
    if width > _PIECE:
        values = jnp.pad(values, ((0, 0), (0, 0), (0, -width % _PIECE)))
    pieces = values.reshape(batch, -1, min(width, _PIECE)).sum(-1)
    high, low = pieces >> _LOW, pieces & (2**_LOW - 1)
    return {f"{name}_high": high.sum(-1), f"{name}_low": low.sum(-1)}


def sums(name: str, state: State) -> np.ndarray:
    """float64 `[pictures]` of what :func:`exact_sum` split."""
    return (state[f"{name}_high"] * 2**_LOW + state[f"{name}_low"]).astype(np.float64)


def no_pictures(*names: str) -> State:
    """Empty int64 arrays under these names."""
    return {name: np.zeros(0, np.int64) for name in names}


def together(a: State, b: State, count: str) -> State:
    """The pictures of both states; those whose `count` is 0 were masked out."""
    counted = [np.asarray(state[count]) > 0 for state in (a, b)]
    return {
        name: np.concatenate(
            [np.asarray(state[name], np.int64)[kept] for state, kept in zip((a, b), counted, strict=True)]
        )
        for name in a
    }


def exact_mean(values: np.ndarray) -> float | None:
    """The mean, the same in any order; None of nothing."""
    return math.fsum(values) / len(values) if len(values) else None
