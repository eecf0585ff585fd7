"""Programs over several virtual devices must run in program order.

Taken from the compile cache, XLA's CPU runtime (jax 0.10.2) otherwise runs independent operations of a program in any
order: collectives then hold the threads that other collectives wait for, until the process is aborted.
"""

import os

os.environ["XLA_FLAGS"] += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
