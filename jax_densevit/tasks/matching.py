"""Which query answers for which object: the exact assignment of least total cost, for a batch, inside `jit`.

`"augmenting_path"` inserts one target after another by the shortest augmenting path (Jonker and Volgenant 1987; Crouse
2016, what `scipy.optimize.linear_sum_assignment` runs). All images of a batch share one loop, in which each is at its
own target: a step scans one row of costs, or turns one edge of a path. An image is done after its last real target, so
padded targets cost nothing. Rows' potentials are not kept: that of an assigned row is its cost minus the potential of
its column.

`"scipy"` asks SciPy on the host, in float64: a check, and a way out where steps on the device are slow. It moves the
costs to the host in every step, and a program that calls the host is not kept in JAX's compile cache.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.errors import check_name


@flax.struct.dataclass
class Assignment:
    """Who answers for whom.

    Attributes:
      query: int32 `[B, T]`: the query of each target; -1 for padding, and for targets left without a query.
      finite: bool `[B]`: whether all costs of the image's targets were finite. Where not, pairs without a
        finite cost were not matched, and the losses of `mask_losses.py` are NaN, so that training stops and names the
        image (`training/culprits.py`).
    """

    query: jax.Array
    finite: jax.Array


def match(costs: jax.Array, n_valid: jax.Array, method: str = "augmenting_path") -> Assignment:
    """The assignment of least total cost of each image; as many pairs as there can be.

    Args:
      costs: `[B, Q, T]` of query and target, any real type; computed with in float32, without a gradient.
      n_valid: int `[B]`: targets 0..n_valid-1 are real, the others padding.
      method: "augmenting_path" or "scipy".

    An image with more targets than queries leaves those targets unmatched whose matching would cost most in total.
    """
    check_name("matching method", method, METHODS)
    costs = jax.lax.stop_gradient(costs).astype(jnp.float32)
    batch, queries, targets = costs.shape
    n_valid = jnp.clip(n_valid.astype(jnp.int32), 0, targets)
    valid = jnp.arange(targets) < n_valid[:, None]
    fine = jnp.isfinite(costs)
    finite = (fine | ~valid[:, None]).all((1, 2))
    if not batch or not queries or not targets:
        return Assignment(jnp.full((batch, targets), -1, jnp.int32), finite)
    return Assignment(METHODS[method](jnp.where(fine, costs, jnp.inf), n_valid), finite)


def target_of_query(query: jax.Array, queries: int) -> jax.Array:
    """int32 `[B, Q]`: the target that each query answers for, -1 for none; the inverse of `Assignment.query`."""
    batch, targets = query.shape
    at = jnp.where(query < 0, queries, query)
    found = jnp.full((batch, queries + 1), -1, jnp.int32)
    return found.at[jnp.arange(batch)[:, None], at].set(jnp.arange(targets, dtype=jnp.int32))[:, :queries]


def _augmenting_path(costs: jax.Array, n_valid: jax.Array) -> jax.Array:
    """`[B, Q, T], [B] -> int32 [B, T]`; infinite costs are never used."""
    _, queries, targets = costs.shape
    rows = costs.swapaxes(1, 2)
    if targets <= queries:
        return _insert_rows(rows, n_valid)
    # Rows must not outnumber columns: where targets do, queries are inserted instead.
    crowded = n_valid > queries
    padded = jnp.arange(targets) >= n_valid[:, None]
    wide = jnp.where(padded[:, None], jnp.inf, costs)  # [B, Q, T], to hold beside [B, T, Q]
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, targets - queries)), constant_values=jnp.inf)
    wide = jnp.pad(wide, ((0, 0), (0, targets - queries), (0, 0)), constant_values=jnp.inf)
    rows = jnp.where(crowded[:, None, None], wide, rows)
    column = _insert_rows(rows, jnp.where(crowded, queries, n_valid))
    return jnp.where(crowded[:, None], target_of_query(column, targets), column)


def _insert_rows(costs: jax.Array, n_rows: jax.Array) -> jax.Array:
    """The column of each of the first `n_rows` rows: `[B, R, C], [B] -> int32 [B, R]`, -1 where there is none."""
    batch, rows, columns = costs.shape
    inf, none = jnp.float32(jnp.inf), jnp.int32(-1)
    row_ids, column_ids = jnp.arange(rows, dtype=jnp.int32), jnp.arange(columns, dtype=jnp.int32)

    def per_column(value):
        return jnp.full((batch, columns), value)

    def per_image(value):
        return jnp.full((batch,), value)

    def pick(values, index):
        return jnp.take_along_axis(values, index[:, None], 1, mode="clip")[:, 0]

    start = {
        "row": per_image(jnp.int32(0)),  # being inserted
        "from": per_image(jnp.int32(0)),  # row being scanned
        "base": per_image(jnp.float32(0)),  # cost of the path to it, less its potential
        "end": per_image(none),  # column at the open end of a path that is being turned, -1: scanning
        "potential": per_column(jnp.float32(0)),
        "shortest": per_column(inf),  # path to the column
        "before": per_column(none),  # the row before it on that path
        "scanned": per_column(False),
        "row_of": per_column(none),
        "column_of": jnp.full((batch, rows), none),
    }

    def step(s):
        working = s["row"] < n_rows
        scanning = working & (s["end"] < 0)
        # Scan a row of costs.
        cost = jnp.take_along_axis(costs, s["from"][:, None, None], 1, mode="clip")[:, 0]
        reached = s["base"][:, None] + (cost - s["potential"])
        closer = scanning[:, None] & ~s["scanned"] & (reached < s["shortest"])
        shortest = jnp.where(closer, reached, s["shortest"])
        before = jnp.where(closer, s["from"][:, None], s["before"])
        # The nearest open column; among equals a free one, then the first.
        distance = jnp.where(s["scanned"], inf, shortest)
        nearest = distance.min(1)
        rank = jnp.where(s["row_of"] < 0, column_ids - columns, column_ids)
        rank = jnp.where(distance == nearest[:, None], rank, columns).min(1)
        free, blocked = scanning & (rank < 0), scanning & (nearest == inf)
        column = jnp.where(rank < 0, rank + columns, rank)
        onward = scanning & ~free & ~blocked
        scanned = s["scanned"] | (onward[:, None] & (column_ids == column[:, None]))
        potential = jnp.where(
            free[:, None] & s["scanned"], s["potential"] + (shortest - nearest[:, None]), s["potential"]
        )
        following = pick(s["row_of"], column)
        base = nearest - (pick(costs.reshape(batch, -1), following * columns + column) - pick(s["potential"], column))
        # Turn one edge of a path that has reached a free column.
        end = jnp.where(free, column, s["end"])
        turning = working & (end >= 0)
        source = pick(before, end)
        row_of = jnp.where(turning[:, None] & (column_ids == end[:, None]), source[:, None], s["row_of"])
        here = turning[:, None] & (row_ids == source[:, None])
        rest = pick(s["column_of"], source)
        column_of = jnp.where(here, end[:, None], s["column_of"])
        done = (turning & (source == s["row"])) | blocked
        row = s["row"] + done
        fresh = done[:, None]
        return {
            "row": row,
            "from": jnp.where(done, row, jnp.where(onward, following, s["from"])),
            "base": jnp.where(done, 0, jnp.where(onward, base, s["base"])),
            "end": jnp.where(done, none, jnp.where(turning, rest, end)),
            "potential": potential,
            "shortest": jnp.where(fresh, inf, shortest),
            "before": before,
            "scanned": scanned & ~fresh,
            "row_of": row_of,
            "column_of": column_of,
        }

    return jax.lax.while_loop(lambda s: (s["row"] < n_rows).any(), step, start)["column_of"]


def _scipy(costs: jax.Array, n_valid: jax.Array) -> jax.Array:
    """`[B, Q, T], [B] -> int32 [B, T]`, by SciPy on the host."""
    shape = jax.ShapeDtypeStruct((costs.shape[0], costs.shape[2]), jnp.int32)
    return jax.pure_callback(_on_the_host, shape, costs, n_valid, vmap_method="expand_dims")


def _on_the_host(costs, n_valid) -> np.ndarray:
    """NumPy only, and no exception: neither JAX nor an error may come up inside a callback."""
    from scipy.optimize import linear_sum_assignment  # takes 0.2 s to import

    costs, n_valid = np.asarray(costs, np.float64), np.asarray(n_valid)
    lead, (queries, targets) = costs.shape[:-2], costs.shape[-2:]
    found = np.full((*lead, targets), -1, np.int32)
    for index in np.ndindex(lead):
        count = int(np.broadcast_to(n_valid, lead)[index])
        cost = costs[index][:, :count]
        usable = np.isfinite(cost)
        if not usable.any():
            continue
        # SciPy refuses a matrix whose infinities leave no whole assignment. A cost above every sum is chosen last.
        most = np.abs(cost[usable]).max()
        cost = np.where(usable, cost, (2 * most + 1) * (min(queries, count) + 1))
        chosen, target = linear_sum_assignment(cost)
        kept = usable[chosen, target]
        found[index][target[kept]] = chosen[kept]
    return found


METHODS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "augmenting_path": _augmenting_path,
    "scipy": _scipy,
}
