"""What of the freed memory a process keeps, for programs on a CPU, and what it gives back, in runs of days."""

import ctypes
import gc
import sys
from typing import Any

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
    mallopt = _of_glibc("mallopt")
    # No block in a mapping of its own; never give back the top of the heap.
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def give_back_freed_memory() -> None:
    """Collects Python's garbage in cycles, and has glibc's malloc return all free pages to the system.

    Compiling frees hundreds of megabytes, which else stay until something at the end of the heap happens to be freed;
    figures of picture sheets are cycles. Takes milliseconds.
    """
    gc.collect()
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def leave_out_of_garbage_collection() -> None:
    """Leaves everything that exists now out of Python's searches for garbage in cycles, until `gc.unfreeze()`.

    Importing and compiling made a million objects. With them a search takes half a second; and by itself Python makes a
    thorough one only after a quarter more have come to stay, which in a training is hours.
    """
    gc.collect()
    gc.freeze()


def _of_glibc(name: str) -> Any:
    """A function of the C library; None on another system or where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
