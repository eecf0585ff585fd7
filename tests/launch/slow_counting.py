"""Stands in for a training: counts to 200, keeps every tenth number as a checkpoint, and knows the exit codes."""

import os
import signal
import sys
import time
from pathlib import Path

stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
workdir = Path(next(word for word in sys.argv if word.startswith("--workdir=")).partition("=")[2])
checkpoints = workdir / "checkpoints"
checkpoints.mkdir(parents=True, exist_ok=True)
step = max((int(path.name) for path in checkpoints.iterdir()), default=0)
print("from", step, "as", sys.argv[-1], flush=True)
while step < 200:
    time.sleep(0.01)
    step += 1
    if step % 10 == 0 or stop:
        (checkpoints / str(step)).mkdir(exist_ok=True)
    if stop:
        sys.exit(75)
# Wait for the others, as the processes of a real training do.
(workdir / f"end{os.environ['DENSEVIT_PROCESS']}").touch()
while len(list(workdir.glob("end*"))) < 3:
    time.sleep(0.01)
