"""What stays in the process after it is freed, and what goes back."""

import platform
import subprocess
import sys

from jax_densevit.training.allocator import keep_freed_memory

SCRIPT = """
import ctypes, resource, sys
from jax_densevit.training.allocator import keep_freed_memory
done = keep_freed_memory() if sys.argv[1] == "keep" else True
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
size = 100 << 20
def touch():
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    touch()
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_second_use_of_a_block_faults_no_pages():
    if not (sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"):
        assert keep_freed_memory() is False  # nothing to be done with another allocator, and said so
        return
    faults = {}
    for mode in ("keep", "default"):
        done, count = subprocess.check_output([sys.executable, "-c", SCRIPT, mode], text=True).split()
        assert done == "True"
        faults[mode] = int(count)
    assert faults["keep"] < 100 < faults["default"]


PINNED = """
import ctypes, gc, re
from pathlib import Path
from jax_densevit.training.allocator import give_back_freed_memory, leave_out_of_garbage_collection
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
blocks = [libc.malloc(60_000) for _ in range(2000)]
for block in blocks:
    ctypes.memset(block, 1, 60_000)
pin = libc.malloc(60_000)  # what is in use at the end of the heap keeps all below it
for block in blocks:
    libc.free(block)
before = held()
class Ring:
    gone = 0
    def __init__(self):
        self.ring = self
    def __del__(self):
        Ring.gone += 1
gc.disable()
Ring()
leave_out_of_garbage_collection()
Ring()
give_back_freed_memory()
print(before - held(), Ring.gone, gc.get_freeze_count() > 10_000)
"""


def test_freed_pages_go_back_and_cycles_are_collected():
    given_back, gone, frozen = subprocess.check_output([sys.executable, "-c", PINNED], text=True).split()
    assert (gone, frozen) == ("2", "True")
    if sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc":
        assert int(given_back) > 100  # of 114 MiB
