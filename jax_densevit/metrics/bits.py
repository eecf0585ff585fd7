"""Bits per symbol: how many bits a model needs to write down the true picture, exactly summed over pictures."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.metrics.metric import State
from jax_densevit.metrics.sums import exact_sum, no_pictures, sums, together

UNIT = 2**-14  # to which the bits of a symbol are rounded before they are added up


class Bits:
    """Mean of -log2 of the probability of the true symbol, over all symbols of all pictures, and what two trivial
    models need: a uniform one, and the best one that knows nothing but how often each value occurs in this very set.

    A symbol is counted as `context * values + value`, where the context is what the trivial models know of it too: its
    color channel, or coarser bits of it.

    Args:
      values: number of values that a symbol can take in its context.
      contexts: number of contexts.
    """

    def __init__(self, values: int, contexts: int = 1):
        self.values, self.contexts = values, contexts

    def empty(self) -> State:
        """`histogram` int64 `[contexts * values]`; per picture int64 `symbols`, the sum of their bits in units of
        2**-14, `bits_*`, and how many bits were not finite or too many to be counted, `lost`.
        """
        histogram = np.zeros(self.contexts * self.values, np.int64)
        return {"histogram": histogram, **no_pictures("symbols", "bits_high", "bits_low", "lost")}

    def measure(self, bits: jax.Array, symbols: jax.Array, mask: jax.Array | None = None) -> State:
        """Counts of one batch; runs inside `jit`.

        Args:
          bits: float32 `[B, ..., W]`, bits that the model needs for each symbol.
          symbols: int `[B, ..., W]`, `context * values + value`.
          mask: bool `[B]`; examples where it is False count nothing. None counts all.
        """
        batch, width = len(bits), bits.shape[-1]
        bits, symbols = (x.reshape(batch, -1, width) for x in (bits, symbols))
        counted = jnp.ones(batch, bool) if mask is None else mask
        # A row is added up in int32.
        fits = bits < UNIT * (2**31 // min(width, 8192) - 1)
        whole = jnp.where(fits, jnp.round(bits / UNIT), 0).astype(jnp.int32)
        kept = jnp.where(counted[:, None, None], symbols, len(self.empty()["histogram"])).reshape(batch, -1)
        counts = jax.vmap(lambda row: jnp.zeros(self.contexts * self.values + 1, jnp.int32).at[row].add(1))(kept)
        size = counted.astype(jnp.int32)
        return {
            "histogram": counts[:, :-1].sum(0),
            "symbols": size * symbols[0].size,
            **exact_sum("bits", jnp.where(counted[:, None, None], whole, 0)),
            "lost": size * (~fits).sum((1, 2), dtype=jnp.int32),
        }

    def merge(self, a: State, b: State) -> State:
        """The pictures of both; histograms are added."""
        histogram = np.asarray(a["histogram"], np.int64) + np.asarray(b["histogram"], np.int64)
        rest = [{name: rows for name, rows in state.items() if name != "histogram"} for state in (a, b)]
        return {"histogram": histogram, **together(*rest, "symbols")}

    def compute(self, state: State) -> dict[str, Any]:
        """`bits` per symbol (None of nothing, and where a bit was lost), `uniform_bits`, `marginal_bits`, `symbols`,
        `pictures`, `lost`.
        """
        symbols, lost = int(state["symbols"].sum()), int(state["lost"].sum())
        return {
            "bits": float(sums("bits", state).sum()) * UNIT / symbols if symbols and not lost else None,
            "uniform_bits": float(np.log2(self.values)),
            "marginal_bits": self._marginal(state["histogram"]) if symbols else None,
            "symbols": symbols,
            "pictures": len(state["symbols"]),
            "lost": lost,
        }

    def _marginal(self, histogram: np.ndarray) -> float:
        counts = histogram.reshape(self.contexts, self.values).astype(np.float64)
        totals = counts.sum(1, keepdims=True)
        some = counts > 0
        shares = np.where(some, counts, 1) / np.where(some, totals, 1)
        return float(-(np.where(some, counts, 0) * np.log2(shares)).sum() / totals.sum())
