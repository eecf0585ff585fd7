"""Batches on their way to the devices while the devices compute."""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_densevit.training.mesh import put_batch


class Feed:
    """An iterator over global device batches, filled by a thread.

    Args:
      stream: this process's rows of every global batch; closed with the feed if it can be.
      mesh: the batches are laid over it.
      depth: how many batches wait on the devices.
    """

    def __init__(self, stream: Iterator[dict[str, np.ndarray]], mesh: Mesh, depth: int = 2):
        self._stream, self._mesh = stream, mesh
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="feed", daemon=True)
        self._thread.start()

    @property
    def bad(self) -> int:
        """How many unreadable files were skipped so far."""
        return int(getattr(self._stream, "bad", 0))

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> dict[str, jax.Array]:
        item = self._queue.get()
        if isinstance(item, BaseException):
            self._queue.put(item)  # whoever asks again gets the same answer
            raise item
        return item

    def close(self) -> None:
        """Ends the thread and the stream."""
        self._ended.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)
        if hasattr(self._stream, "close"):
            self._stream.close()

    def _fill(self) -> None:
        try:
            for batch in self._stream:
                if not self._put(put_batch(batch, self._mesh)):
                    return
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._ended.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
