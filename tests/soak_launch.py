"""Kills one of several launched processes with the babysitter watching, and compares the end with an undisturbed run.

    python tests/soak_launch.py [--processes 4] [--steps 40] [--folder DIR]

Both runs go through `python -m launch babysit` with the backend `local`. Exit code 0 when every array of the last
checkpoint (parameters, statistics, moving average, optimizer) and `metrics.jsonl` are the same bytes.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
ITEMS = ("params", "statistics", "ema", "optimizer")


def babysit(folder: Path, run_id: str, processes: int, config: str, arguments: str) -> tuple[subprocess.Popen, Path]:
    """Starts the babysitter of a run; its output goes to a file."""
    settings = folder / f"{run_id}.env"
    settings.write_text(
        f"BACKEND=local\nRUNS='{folder}'\nRUN_ID='{run_id}'\nPROCESSES={processes}\nCONFIG='{config}'\nARGS='{arguments}'\n"
    )
    output = folder / f"{run_id}.log"
    command = [sys.executable, "-m", "launch", "babysit", "--env", str(settings), "--poll", "0.5"]
    with open(output, "wb") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT), output


def end(process: subprocess.Popen, output: Path) -> None:
    """Waits for a babysitter; raises when training was not done."""
    code = process.wait()
    if code != 0:
        raise SystemExit(f"the babysitter ended with {code}:\n{output.read_text()}")


def steps(workdir: Path) -> list[int]:
    """The checkpoints that are there."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal())


def kill_one(workdir: Path, number: int, step: int) -> str:
    """Waits for the checkpoint of `step`, then kills process `number`; says when."""
    while not steps(workdir) or steps(workdir)[-1] < step:
        time.sleep(0.05)
    victim = int((workdir / f"hosts/{number}/pid").read_text())
    os.kill(victim, signal.SIGKILL)
    return f"process {number} killed with checkpoints {' '.join(map(str, steps(workdir)))}"


def differences(first: Path, second: Path) -> list[str]:
    """What is not the same at the end of two runs."""
    import jax

    from jax_densevit.pretrained.orbax_files import restore_item
    from jax_densevit.training.paths import named_leaves

    step, found, count = steps(first)[-1], [], 0
    if steps(second)[-1] != step:
        return [f"the last checkpoints are {step} and {steps(second)[-1]}"]
    for item in ITEMS:
        folders = [workdir / "checkpoints" / str(step) / item for workdir in (first, second)]
        if not folders[0].is_dir():
            continue
        one, two = (named_leaves(jax.device_get(restore_item(folder))) for folder in folders)
        count += len(one)
        found += [
            f"{item}/{name}" for name in one if np.asarray(one[name]).tobytes() != np.asarray(two[name]).tobytes()
        ]
    print(f"{count} arrays compared, {len(found)} differ")
    if (first / "metrics.jsonl").read_bytes() != (second / "metrics.jsonl").read_bytes():
        found.append("metrics.jsonl")
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", default=None, help="where the two runs go; by default a temporary folder")
    given = parser.parse_args()
    options = f"--config.steps={given.steps} --config.checkpoint.every=4"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given.folder or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        common = (given.processes, "configs/quickstart.py:quick", options)
        end(*babysit(folder, "whole", *common))
        sitter, output = babysit(folder, "killed", *common)
        print(kill_one(folder / "killed", 1, given.steps // 4))
        end(sitter, output)
        print(output.read_text().strip())
        found = differences(folder / "whole", folder / "killed")
    if found:
        print(f"different: {', '.join(found)}")
        return 1
    print("The same: every array and metrics.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
