"""The order of training examples: a pure function of (seed, epoch, position), in plain NumPy.

The stream of a run is endless: position p is example `epoch_order(seed, p // n)[p % n]`. Every epoch holds every
example once, batches cross the borders of epochs, and nothing has to be remembered to resume but the step. The hash is
written out here (SplitMix64, Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), so
no version of any library can change the order of a run that is under way.
"""

import functools

import numpy as np

from jax_densevit.errors import UserError

_ORDER = 0x6F72646572  # what a hash is for: streams of different purposes are independent
_AUGMENTATION = 0x61756775
_MASK = 2**64 - 1


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 on uint64, after one step of its counter."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def counter_hash(*counters) -> np.ndarray:
    """A 64-bit hash of integer counters (scalars or arrays, broadcast together; negative ones are allowed): uint64."""
    mixed = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is the point
        for counter in counters:
            if isinstance(counter, int):
                counter = np.uint64(counter & _MASK)
            mixed = _splitmix64(mixed ^ _splitmix64(np.asarray(counter).astype(np.uint64)))
    return np.asarray(mixed)


def scalar_hash(*counters: int, start: int = 0) -> int:
    """:func:`counter_hash` of Python integers: for a single number several times faster than NumPy.

    `scalar_hash(a, b)` is `scalar_hash(b, start=scalar_hash(a))`.
    """
    mixed = start
    for counter in counters:
        mixed = _splitmix64_of_int(mixed ^ _splitmix64_of_int(counter & _MASK))
    return mixed


def _splitmix64_of_int(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of one epoch: int64 [n], read-only. The last few are kept, since neighbouring batches share them.

    It sorts the examples by a 64-bit hash of (seed, epoch, index); the sort is stable, so that even equal hashes have
    one order.
    """
    order = np.argsort(counter_hash(_ORDER, seed, epoch, np.arange(n)), kind="stable")
    order.flags.writeable = False
    return order


def examples_at(positions: np.ndarray, seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The examples at positions of the endless stream over a set of `n`.

    Args:
      positions: non-negative integers of any shape.
      seed: the seed of the run.
      n: the number of examples.

    Returns:
      (index, epoch), both int64 of the shape of `positions`.

    Raises:
      UserError: the set is empty.
    """
    if n < 1:
        raise UserError("The training set has no examples: check the data source's folder, split and list.")
    positions = np.asarray(positions, np.int64)
    if positions.size and positions.min() < 0:
        raise ValueError(f"positions of a stream start at 0, got {positions.min()}")
    epoch, place = np.divmod(positions, n)
    index = np.empty_like(place)
    for e in np.unique(epoch):
        chosen = epoch == e
        index[chosen] = epoch_order(int(seed), int(e), int(n))[place[chosen]]
    return index, epoch


def augmentation_seeds(seed: int, epoch: np.ndarray, index: np.ndarray) -> np.ndarray:
    """The seed of each example's augmentation: uint32 [..., 2], a hash of (seed, epoch, index) only."""
    mixed = counter_hash(_AUGMENTATION, seed, epoch, index)
    return np.stack([mixed >> np.uint64(32), mixed & np.uint64(0xFFFF_FFFF)], axis=-1).astype(np.uint32)


def augmentation_seed(seed: int, epoch: int, index: int) -> tuple[int, int]:
    """:func:`augmentation_seeds` of one example, as Python integers."""
    mixed = scalar_hash(_AUGMENTATION, seed, epoch, index)
    return mixed >> 32, mixed & 0xFFFF_FFFF


def host_rows(batch_size: int, process_index: int = 0, process_count: int = 1) -> slice:
    """The rows of each global batch that belong to one host: contiguous, so that the hosts' rows in turn are the batch.

    Raises:
      UserError: the batch size does not divide among the hosts.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size is {batch_size}, which {process_count} host(s) cannot share equally: "
            f"choose a positive multiple of {process_count}."
        )
    rows = batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)
