"""Large blocks stay in the process after they are freed."""

import subprocess
import sys

import pytest

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_second_use_of_a_block_faults_no_pages():
    faults = {}
    for mode in ("keep", "default"):
        done, count = subprocess.check_output([sys.executable, "-c", SCRIPT, mode], text=True).split()
        assert done == "True"
        faults[mode] = int(count)
    assert faults["keep"] < 100 < faults["default"]
