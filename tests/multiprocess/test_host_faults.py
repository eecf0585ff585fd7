"""Faults of a disk and of hosts: full, read-only, late, failing, and one that cannot write. Real processes each."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import soak_kill
from started import start
from test_processes import ended, free_port, metrics

from jax_densevit.training.checkpoint import Checkpoints

pytestmark = pytest.mark.multiprocess
RUN = {"steps": 10, "save_every": 5, "eval_every": 0, "log_every": 5, "evaluate": "false"}


def program(workdir, options):
    """The command that trains in `workdir`, for a shell."""
    return shlex.join([sys.executable, str(soak_kill.PROGRAM), str(workdir), *(f"{n}={v}" for n, v in options.items())])


OWN_MOUNTS = ["unshare", "--map-root-user", "--mount"]  # which nobody else sees


def shell(script, before=()):
    """Runs a script, behind a command that changes its surroundings; returns exit code and what was printed."""
    command, environment = [*before, "bash", "-c", script], {**os.environ, **soak_kill.ENVIRONMENT}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    return done.returncode, done.stdout


def two(workdir, first, second):
    """Two processes of one training, with options of their own."""
    address = json.dumps(f"127.0.0.1:{free_port()}")
    common = {**RUN, "coordinator": address, "processes": 2, "heartbeat": 10}
    return [start(workdir, {**common, "process": i, **more}, i) for i, more in enumerate((first, second))]


def test_a_full_disk_and_a_read_only_one(tmp_path):
    """A disk of 400 KB fills up in the second save; enlarged, the same command goes on; read-only, it says so.

    Where nothing may be mounted (a container without the right) a limit for files stands for the full disk.
    """
    run, disk = program(tmp_path / "disk/run", RUN), tmp_path / "disk"
    disk.mkdir()
    if shell(f"mount -t tmpfs -o size=400k none {disk}", OWN_MOUNTS)[0] != 0:
        code, printed = shell(f'(ulimit -f 4; {run}); echo "left with $?"; {run}; echo "left with $?"')
        assert code == 0 and "Traceback" not in printed
        limited, again, last = printed.split("left with ")
        assert "Saving step 5 in" in limited and "there is no earlier checkpoint. Put it right and run" in limited
        assert again.startswith("1\n") and last == "0\n"
        return
    code, printed = shell(
        f"""
        mount -t tmpfs -o size=400k none {tmp_path}/disk
        {run}; echo "left with $?"; ls {tmp_path}/disk/run/checkpoints
        mount -o remount,size=20m {tmp_path}/disk
        {run}; echo "left with $?"; ls {tmp_path}/disk/run/checkpoints
        mount -o remount,ro {tmp_path}/disk
        {run}; echo "left with $?"
        """,
        OWN_MOUNTS,
    )
    assert code == 0 and "Traceback" not in printed
    full, enlarged, read_only, _ = printed.split("left with ")
    assert "Saving step 10 in" in full and "failed: the disk is full; the checkpoints of steps 5 are intact" in full
    assert enlarged.startswith("1\n5\n") and "Resuming from step 5 of 10" in enlarged
    assert read_only.startswith("0\n10\n5\n") and "Read-only file system; choose another --workdir." in read_only
    assert printed.endswith("left with 1\n")


KILLED_BEFORE_THE_NAME = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))
import tiny_experiment
from jax_densevit.training import checkpoint
write_manifest = checkpoint.write_manifest
def write_and_die(folder):
    write_manifest(folder)
    if folder.name.startswith("10."):
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.write_manifest = write_and_die
tiny_experiment.main(sys.argv[1:])
"""


def test_killed_between_the_last_byte_and_the_name(tmp_path):
    """Everything of step 10 is on disk, its manifest too, and the process is killed before the folder has its name."""
    options = [str(soak_kill.PROGRAM.parent), str(tmp_path / "run"), *(f"{n}={v}" for n, v in RUN.items())]
    command = [sys.executable, "-c", KILLED_BEFORE_THE_NAME, *options]
    done = subprocess.run(command, env={**os.environ, **soak_kill.ENVIRONMENT}, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    folder = tmp_path / "run/checkpoints"
    assert {path.name for path in folder.iterdir()} == {"5", "10.unverified"}
    with Checkpoints(tmp_path / "run") as checkpoints:  # what resuming begins with
        assert checkpoints.latest_intact() == 5
    assert [path.name for path in folder.iterdir()] == ["5"]


def test_a_process_that_fails_takes_the_other_along(tmp_path):
    """One meets a file that it cannot read; the other, which waits for it in a collective, ends too."""
    processes = two(tmp_path / "run", {}, {"bad": 4})
    assert ended(processes) == [1, 1]
    first, second = (output.read_text() for _, output in processes)
    assert "error: bar 4 cannot be read." in second
    assert "error: Another process ended or cannot be reached" in first
    assert "Traceback" not in first + second


def test_a_process_with_other_data_stops_all(tmp_path):
    """Its copy lacks a file, so its examples come in another order."""
    processes = two(tmp_path / "run", {}, {"length": 23})
    assert ended(processes) == [1, 1]
    for _, output in processes:
        assert re.search(r"error: The processes do not agree.*data.train.examples: 24 -> 23", output.read_text())
    assert not Checkpoints(tmp_path / "run", read_only=True).steps()


def test_a_process_that_is_late_is_no_fault(tmp_path):
    """One reads for longer than the heartbeat's time-out, as from a cold cache; nobody is given up."""
    assert ended(two(tmp_path / "run", {}, {"late": 12.0})) == [0, 0]
    assert [line["step"] for line in metrics(tmp_path / "run")] == [5, 10]
    assert Checkpoints(tmp_path / "run", read_only=True).steps() == [5, 10]


def test_a_process_that_cannot_write_stops_all(tmp_path):
    """Both stop before the first step, and say whose fault it is."""
    workdir = tmp_path / "run"
    options = {**RUN, "coordinator": json.dumps(f"127.0.0.1:{free_port()}"), "processes": 2}
    writing, output = start(workdir, {**options, "process": 0})
    code, printed = shell(program("/proc/nowhere", {**options, "process": 1}))  # not even root can write there
    assert code == 1 and "error: Process 1: Cannot write in workdir /proc/nowhere" in printed
    assert writing.wait(timeout=60) == 1
    assert "error: Another process: Cannot write in workdir" in output.read_text()
    assert "Training" not in output.read_text() and not Checkpoints(workdir, read_only=True).steps()
