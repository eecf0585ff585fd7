"""Test set-up: CPU, eight virtual devices, fast compiles, a compile cache, shapes checked at run time."""

import os
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs over several virtual devices must run in program order: taken from the compile cache, XLA's CPU runtime
# (jax 0.10.2) otherwise runs independent operations in any order, and collectives then hold the threads that other
# collectives wait for, until the process is aborted.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_cpu_enable_concurrency_optimized_scheduler=false"
)
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
os.environ.setdefault("MPLBACKEND", "agg")

import jax  # noqa: E402
import pytest  # noqa: E402

# Tiny models: compiling costs more than running.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_compilation_cache_dir", str(Path(tempfile.gettempdir()) / "jax_densevit_test_cache"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def pytest_addoption(parser):
    parser.addoption(
        "--reference-data", default=None, help="a folder with `goldens/` and `data/`: run the extra suite on it"
    )

    parser.addoption(
        "--peers", action="store_true", help="run the suite against PyTorch packages (pip install '.[test,peers]')"
    )


def pytest_collection_modifyitems(config, items):
    """The extra suites are collected only when their data or packages are named: there is nothing to skip."""
    asked = {"reference": config.getoption("--reference-data") is not None, "peers": config.getoption("--peers")}
    dropped = [item for item in items if any(mark in item.keywords and not asked[mark] for mark in asked)]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in dropped]


@pytest.fixture(scope="session")
def reference_data(request) -> Path:
    """The folder given by `--reference-data`."""
    return Path(request.config.getoption("--reference-data")).resolve()
