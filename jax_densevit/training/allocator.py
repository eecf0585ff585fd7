"""What of the freed memory a process keeps, for programs on a CPU, and what it gives back, in runs of days."""

import ctypes
import gc
import importlib.util
import os
import sys
from importlib import metadata
from typing import Any

import jax

# Parameters of glibc's mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to keep large blocks when they are freed, instead of returning them to the system.

    An XLA program takes its working memory in one block, gigabytes for a training step, at every execution. By default
    glibc maps such a block afresh each time, and the system zeroes it page by page while the program first touches it:
    a fifth to a third of the processor time of a Uformer's step. The price is memory: the process holds the most it
    ever used, and up to three times that, where what was allocated in between leaves no place large enough and the
    block moves. Accelerators gain nothing.

    To be called before JAX starts its backend. XLA allocates in threads of its own, and only what comes from the main
    arena is kept: other arenas map large blocks whatever they are told, and a thread stays with the arena it has.

    Returns:
      Whether it was done: only on Linux with glibc, and only where JAX can find nothing but CPUs.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is None or not _cpu_alone():
        return False
    # One arena for all threads; no block in a mapping of its own; never give back the top of the heap.
    settings = {_M_ARENA_MAX: 1, _M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}
    return all([bool(mallopt(name, value)) for name, value in settings.items()])


def _cpu_alone() -> bool:
    """Whether JAX will compute on CPUs, said without starting its backend: by its setting, or for want of plugins."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms == "cpu"
    plugins = any(importlib.util.find_spec(package) for package in ("jax_plugins", "libtpu"))
    return not plugins and not metadata.entry_points(group="jax_plugins")


def limit_arenas() -> None:
    """Has glibc's malloc serve all threads from as many arenas as there are cores; by default there are eight a core.

    What is freed in one arena serves no thread of another, so that memory grows with the arenas: threads of XLA, of
    TensorFlow and of readers spread over all of them in the course of hours. To be called before they start.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, os.cpu_count() or 1)


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
