"""Trains the quickstart for a long time, with evaluations, checkpoints and picture sheets on, and watches its memory.

    python tests/soak_memory.py --minutes 45 [--folder DIR] [--warm_up 8]

The training is the command that a user runs, small enough for thousands of steps: it is never asked to end, only to
stop when the time is over. The anonymous memory of the process and its children, in memory or swapped out, is read
twice a second: what they hold. Pages of files (libraries, memory-mapped arrays) come and go as the system likes, and
are printed apart. Exit code 0 when the median of the last quarter is at most 1 % above that of the first quarter after
the warm-up (compiling, first evaluations, threads that start), and the run stopped with 75 and left a checkpoint.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TRAINING = (
    "--config=configs/quickstart.py:quick",
    "--config.steps=10000000",
    "--config.log.every=100",
    # Every seven minutes or so, the best among them: TensorStore leaks with each, see docs/reliability.md.
    "--config.checkpoint.every=20000",
    "--config.checkpoint.best=test/mIoU",
    "--config.eval.val.every=500",
    "--config.eval.val.data.length=24",
    "--config.eval.test.every=20000",
)
ALLOWED = 0.01


def held(pid: int) -> tuple[int, int]:
    """Bytes of a process and all below it: (anonymous memory and swap, pages of files in memory); 0 when ended."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        own, swapped, files = (1024 * int(status[name].split()[0]) for name in ("RssAnon", "VmSwap", "RssFile"))
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, KeyError):
        return 0, 0
    below = [held(int(child)) for child in children]
    return own + swapped + sum(anonymous for anonymous, _ in below), files + sum(mapped for _, mapped in below)


def watched(workdir: Path, seconds: float) -> tuple[list[tuple[float, int]], int]:
    """(time, bytes) pairs of a training that is stopped after `seconds`, and its exit code."""
    command = [sys.executable, "-m", "jax_densevit.train", *TRAINING, f"--workdir={workdir}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE.parent)}
    start, samples, said = time.monotonic(), [], 0
    with open(workdir.with_name(f"{workdir.name}.log"), "wb") as output:
        process = subprocess.Popen(command, cwd=HERE.parent, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while (now := time.monotonic() - start) < seconds and process.poll() is None:
            anonymous, files = held(process.pid)
            samples.append((now, anonymous))
            if now >= 60 * said:
                said += 5
                print(f"{now / 60:5.1f} min  {anonymous / 2**20:8.1f} MiB, files {files / 2**20:.1f} MiB", flush=True)
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    return [(when, size) for when, size in samples if size], code


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--warm_up", type=float, default=8, help="minutes that do not count")
    parser.add_argument("--folder", default=None, help="where the run goes; by default a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        workdir = Path(arguments.folder or temporary) / "run"
        workdir.parent.mkdir(parents=True, exist_ok=True)
        samples, code = watched(workdir, 60 * arguments.minutes)
        if code != 75:
            print(f"the training ended with {code}:\n{workdir.with_name('run.log').read_text()[-2000:]}")
            return 1
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        evaluations = sum("evaluator" in line for line in lines)
        sheets = len(list((workdir / "eval").glob("*_sheet.png")))
        checkpoints = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    counted = [(when, size) for when, size in samples if when >= 60 * arguments.warm_up]
    if not checkpoints or not sheets or len(counted) < 8:
        print(f"{len(counted)} samples, {sheets} picture sheets, checkpoints {checkpoints}: too short to show anything")
        return 1
    quarter = len(counted) // 4
    first, last = (statistics.median(size for _, size in part) for part in (counted[:quarter], counted[-quarter:]))
    growth = last / first - 1
    print(
        f"{checkpoints[-1]} steps, {evaluations} evaluations, {sheets} picture sheets in "
        f"{samples[-1][0] / 60:.1f} min; stopped with {code}\n"
        f"memory held: {first / 2**20:.1f} MiB after the warm-up, {last / 2**20:.1f} MiB at "
        f"the end ({100 * growth:+.2f} %), highest {max(size for _, size in counted) / 2**20:.1f} MiB"
    )
    return 0 if growth <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
