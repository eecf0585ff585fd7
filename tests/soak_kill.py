"""Kills a training run at random moments, resumes it, and compares its end with that of a run nobody killed.

    python tests/soak_kill.py --kills 10 --seed 0 [--steps 150] [--folder DIR]

Exit code 0 when every array of the last checkpoint (parameters, statistics, moving average, optimizer), the list of
best scores and `metrics.jsonl` are the same bytes.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "training/tiny_experiment.py"
ENVIRONMENT = {
    "PYTHONPATH": str(HERE.parent),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "jax_densevit_test_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def start(workdir: Path, options: dict, number: int = 0) -> tuple[subprocess.Popen, Path]:
    """Starts a training process; its output goes to a file beside the workdir."""
    output = workdir.with_name(f"{workdir.name}.{number}.log")
    command = [sys.executable, str(PROGRAM), str(workdir), *(f"{name}={value}" for name, value in options.items())]
    with open(output, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **ENVIRONMENT})
    return process, output


def finish(workdir: Path, options: dict) -> None:
    """Trains to the end."""
    process, output = start(workdir, options, 999)
    if process.wait() != 0:
        raise SystemExit(f"{workdir} ended with {process.returncode}:\n{output.read_text()}")


def killed(workdir: Path, options: dict, kills: int, seed: int, longest: float = 1.5) -> list[str]:
    """Kills a run `kills` times, then lets it end. Three kills of four wait for the first step, the others do not.

    Returns:
      For every kill, when it came and what was in the checkpoint folder then.
    """
    chance, moments = random.Random(seed), []
    for number in range(kills):
        process, output = start(workdir, options, number)
        began = time.time()
        if number % 4 != 3:
            while b"first step done" not in output.read_bytes() and process.poll() is None:
                time.sleep(0.01)
        delay = chance.uniform(0.0, longest)
        time.sleep(delay)
        if process.poll() is not None:
            moments.append(f"kill {number}: the run was over ({process.returncode}) after {time.time() - began:.1f} s")
            continue
        process.kill()
        process.wait()
        folder = workdir / "checkpoints"
        there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        moments.append(f"kill {number}: after {time.time() - began:.1f} s, checkpoints {' '.join(there) or 'none'}")
    finish(workdir, options)
    return moments


def differences(first: Path, second: Path, options: dict) -> list[str]:
    """What is not the same at the end of two runs; empty when nothing is."""
    sys.path.insert(0, str(PROGRAM.parent))
    import jax
    from tiny_experiment import tiny_experiment

    from jax_densevit.training.checkpoint import Checkpoints
    from jax_densevit.training.parts import prepare
    from jax_densevit.training.paths import named_leaves

    experiment = tiny_experiment(**options)
    stream = experiment.train_stream(0)
    target = prepare(experiment, next(stream)).target
    stream.close()
    states = [
        named_leaves(jax.device_get(Checkpoints(workdir, read_only=True).restore(experiment.steps, target)))
        for workdir in (first, second)
    ]
    found = [name for name in states[0] if states[0][name].tobytes() != states[1][name].tobytes()]
    print(f"{len(states[0])} arrays compared, {len(found)} differ")
    for name in ("metrics.jsonl", "best.json"):
        if (first / name).read_bytes() != (second / name).read_bytes():
            found.append(name)
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--folder", default=None, help="where the two runs go; by default a temporary folder")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    options = {"steps": arguments.steps, "save_every": 5, "eval_every": 50, "log_every": 7, "slow": 0.01}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        finish(folder / "whole", options)
        for moment in killed(folder / "killed", options, arguments.kills, arguments.seed):
            print(moment)
        found = differences(folder / "whole", folder / "killed", options)
        lines = len((folder / "whole/metrics.jsonl").read_text().splitlines())
    if found:
        print(f"different: {', '.join(found)}")
        return 1
    print(f"The same after {arguments.kills} kills: every array, best.json and the {lines} lines of metrics.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
