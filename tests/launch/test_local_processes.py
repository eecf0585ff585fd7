"""Real processes under `job.sh` and the babysitter: killed, stopped by hand, started twice."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_cloud import write_settings

from launch.babysit import Babysitter, Bounds
from launch.backend import State
from launch.local import Local
from launch.settings import read_settings
from launch.shell import CommandFailed, Shell

PROGRAM = Path(__file__).with_name("slow_counting.py")
pytestmark = pytest.mark.multiprocess


@pytest.fixture
def local(tmp_path, monkeypatch):
    monkeypatch.setattr(Local, "python", f"{shlex.quote(sys.executable)} {shlex.quote(str(PROGRAM))}")
    backend = Local(read_settings(write_settings(tmp_path, "local", PROCESSES="3")), Shell())
    yield backend
    backend.kill()


def workdir(tmp_path) -> Path:
    return tmp_path / "all runs/my run"


def pid(tmp_path, number: int) -> int:
    return int((workdir(tmp_path) / f"hosts/{number}/pid").read_text())


def wait_for(condition) -> None:
    deadline = time.time() + 60
    while not condition():
        assert time.time() < deadline, "it took too long"
        time.sleep(0.02)


def watch(backend) -> tuple[threading.Thread, list, list]:
    codes, said = [], []
    sitter = Babysitter(backend, Bounds(poll=0.05), say=said.append)
    thread = threading.Thread(target=lambda: codes.append(sitter.watch()))
    thread.start()
    return thread, codes, said


def test_one_is_killed_and_all_start_again(local, tmp_path):
    thread, codes, said = watch(local)
    wait_for(lambda: (workdir(tmp_path) / "checkpoints/50").exists())
    before = [pid(tmp_path, number) for number in range(3)]
    os.kill(before[1], signal.SIGKILL)
    thread.join(60)
    assert codes == [0], said
    after = [pid(tmp_path, number) for number in range(3)]
    assert not set(before) & set(after)
    logs = [(workdir(tmp_path) / f"hosts/{number}/log").read_text() for number in range(3)]
    assert all("exit code 137" in log and "exit code 0" in log for log in logs)
    starts = [[int(line.split()[1]) for line in log.splitlines() if line.startswith("from")] for log in logs]
    # On a busy machine one may start after another has counted to ten; nobody starts again below what was kept.
    assert all(len(of_one) == 2 and of_one[0] < of_one[1] >= 50 for of_one in starts), starts
    assert any(of_one[0] == 0 for of_one in starts)
    assert f"--process_id={2}" in logs[2] and "--coordinator=127.0.0.1:" in logs[2]


def test_stop_saves_and_is_not_undone(local, tmp_path):
    thread, codes, said = watch(local)
    wait_for(lambda: (workdir(tmp_path) / "checkpoints/20").exists())
    with pytest.raises(CommandFailed, match="is still there; stop it first"):
        local.run()
    local.stop()
    thread.join(60)
    assert codes == [75], said
    job = local.job()
    assert job.state is State.HALTED and job.detail.count("halted 75") == 3 and job.step >= 20
    for number in range(3):
        assert subprocess.run(["kill", "-0", str(pid(tmp_path, number))], stderr=subprocess.DEVNULL).returncode != 0
    local.run()  # by hand it goes on
    assert local.job().state is State.RUNNING


def test_a_machine_that_was_switched_off_and_on(local, tmp_path):
    """Process numbers come again after a boot: the number in the file must not be taken for the training."""
    local.run()
    wait_for(lambda: local.job().state is State.RUNNING)
    for number in range(3):
        (workdir(tmp_path) / f"hosts/{number}/boot").write_text("another boot\n")
    assert local.job().state is State.KILLED and "died" in local.job().detail
    for number in range(3):
        os.kill(pid(tmp_path, number), signal.SIGKILL)


def test_the_launcher_needs_no_packages():
    program = "import launch.__main__, sys; assert not {'jax', 'numpy', 'rich', 'tensorflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=PROGRAM.parents[2], check=True)
