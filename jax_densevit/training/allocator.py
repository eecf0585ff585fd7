"""Keeping freed memory in the process, so that programs on a CPU do not fault in the same pages at every execution."""

import ctypes
import sys

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep large blocks when they are freed, instead of returning them to the system.

    An XLA program takes its working memory in one block, gigabytes for a training step, at every execution. By default
    glibc maps such a block afresh each time, and the system zeroes it page by page while the program first touches it.
    The price is that the process holds the most memory it ever used until it ends. Accelerators gain nothing.

    Returns:
      Whether it was done: only on Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # No block in a mapping of its own; never give back the top of the heap.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
