"""Large blocks stay in the process after they are freed."""

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
