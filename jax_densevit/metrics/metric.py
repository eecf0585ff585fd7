"""The contract of a metric: a batch is measured on the device, the rest happens on the host in exact numbers.

With x64 off JAX has no int64 and no float64, float32 stops counting at 2**24 and int32 at 2**31. So `measure` returns
small per-batch counts (int32, a batch is far below 2**31 pixels), and `merge` adds them up in NumPy int64 or float64.
Merging is associative: batches, devices, hosts and resumed evaluations give the same number, to the last digit where
counts are integers.
"""

from typing import Any, Protocol

State = Any  # a pytree of NumPy arrays


class Metric(Protocol):
    """Streaming statistics of an evaluation."""

    def empty(self) -> State:
        """The state before any example (NumPy, int64 or float64)."""
        ...

    def measure(self, *arrays) -> State:
        """Counts of one batch; runs inside `jit`, over global arrays when sharded."""
        ...

    def merge(self, a: State, b: State) -> State:
        """The state of both parts together, on the host."""
        ...

    def compute(self, state: State) -> dict[str, Any]:
        """Named results, JSON-ready: floats, None for an undefined value (0/0), nested dicts and lists for tables."""
        ...
