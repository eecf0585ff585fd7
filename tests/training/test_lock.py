"""One trainer per workdir; a dead one does not block it."""

import json
import logging
import os
import subprocess
import sys
import time

import pytest

from jax_densevit.errors import UserError
from jax_densevit.training import lock
from jax_densevit.training.lock import WorkdirLock

HOLD = "import sys, time\nfrom jax_densevit.training.lock import WorkdirLock\n" \
       "with WorkdirLock(sys.argv[1]):\n    print('held', flush=True)\n    time.sleep(60)\n"  # fmt: skip


def test_second_refuses_and_a_dead_one_is_replaced(tmp_path, caplog):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"Process {holder.pid} on .* trains in"), WorkdirLock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    with caplog.at_level(logging.WARNING), WorkdirLock(tmp_path):
        assert f"Process {holder.pid} on" in caplog.text and "taking over" in caplog.text
        with pytest.raises(UserError, match=f"Process {os.getpid()} "), WorkdirLock(tmp_path):
            pass
    caplog.clear()
    with WorkdirLock(tmp_path):
        assert not caplog.text  # the one before took leave


def test_another_machine_counts_by_age(tmp_path, caplog):
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"pid": 12, "host": "elsewhere", "since": "yesterday"}))
    with pytest.raises(UserError, match=r"Process 12 on elsewhere .* try again in 1[12]\d s"), WorkdirLock(tmp_path):
        pass
    long_ago = time.time() - lock.STALE_SECONDS - 1
    os.utime(path, (long_ago, long_ago))
    with caplog.at_level(logging.WARNING), WorkdirLock(tmp_path):
        assert "Process 12 on elsewhere" in caplog.text
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_the_owner_keeps_its_lock_young(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCH_SECONDS", 0.02)
    with WorkdirLock(tmp_path):
        os.utime(tmp_path / ".lock", (0, 0))
        deadline = time.time() + 5
        while (tmp_path / ".lock").stat().st_mtime < 1 and time.time() < deadline:
            time.sleep(0.01)
        assert (tmp_path / ".lock").stat().st_mtime > 1


def test_garbage_in_the_lock_is_no_owner(tmp_path):
    (tmp_path / ".lock").write_text("{")
    with WorkdirLock(tmp_path):
        pass


def test_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write in workdir"), WorkdirLock(tmp_path / "file" / "run"):
        pass
