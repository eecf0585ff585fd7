"""Several processes on this machine: killed, told to stop, and working together."""

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from soak_kill import differences, finish, killed
from started import start

from jax_densevit.training.checkpoint import Checkpoints
from jax_densevit.training.paths import named_leaves

pytestmark = pytest.mark.multiprocess


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_two(workdir: Path, options: dict) -> list[tuple[subprocess.Popen, Path]]:
    """Two processes with one device each, one workdir, one training."""
    address = json.dumps(f"127.0.0.1:{free_port()}")
    return [
        start(workdir, {**options, "coordinator": address, "processes": 2, "process": number}, number)
        for number in range(2)
    ]


def ended(processes: list[tuple[subprocess.Popen, Path]]) -> list[int]:
    """Exit codes, and what was printed where they are not the same."""
    codes = [process.wait(timeout=120) for process, _ in processes]
    if len(set(codes)) > 1 or codes[0] not in (0, 75):
        print("\n".join(output.read_text() for _, output in processes))
    return codes


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, "it took too long"
        time.sleep(0.02)


def test_killed_twice_ends_as_if_never_killed(tmp_path):
    options = {"steps": 40, "save_every": 5, "eval_every": 20, "log_every": 7, "slow": 0.01}
    finish(tmp_path / "whole", options)
    moments = killed(tmp_path / "killed", options, kills=2, seed=0, longest=0.4)
    assert not any("was over" in moment for moment in moments), moments
    assert differences(tmp_path / "whole", tmp_path / "killed", options) == []


def test_two_processes_are_one_and_a_signal_to_one_stops_both(tmp_path):
    """The whole life of a preempted run: two processes, SIGTERM to one of them, both resumed, and the same numbers."""
    options = {"steps": 40, "save_every": 25, "eval_every": 0, "log_every": 3, "slow": 0.03}
    finish(tmp_path / "one", options)

    workdir = tmp_path / "two"
    processes = start_two(workdir, options)
    wait_for(lambda: (workdir / "metrics.jsonl").exists())
    processes[1][0].send_signal(signal.SIGTERM)  # not the process that writes
    assert ended(processes) == [75, 75]
    steps = Checkpoints(workdir, read_only=True).steps()
    assert steps and 3 <= steps[-1] < 40

    processes = start_two(workdir, options)
    assert ended(processes) == [0, 0]
    assert f"Resuming from step {steps[-1]} of 40" in processes[0][1].read_text()
    one, two = metrics(tmp_path / "one"), metrics(workdir)
    assert [(line["step"], line.get("evaluator")) for line in one] == [(x["step"], x.get("evaluator")) for x in two]
    for a, b in zip(one, two, strict=True):
        if "loss" in a:
            np.testing.assert_allclose(b["loss"], a["loss"], rtol=1e-6, err_msg=f"step {a['step']}")
        else:
            np.testing.assert_allclose(b["mIoU"], a["mIoU"], atol=2e-3, err_msg=f"step {a['step']}")
    first, second = (
        named_leaves(Checkpoints(folder, read_only=True).restore_variables(40, "ema"))
        for folder in (tmp_path / "one", workdir)
    )
    for name, value in first.items():
        np.testing.assert_allclose(second[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert "step" not in processes[1][1].read_text()  # process 1 prints nothing


def test_processes_with_different_configs_stop_at_once(tmp_path):
    address = json.dumps(f"127.0.0.1:{free_port()}")
    common = {"coordinator": address, "processes": 2, "steps": 50}
    processes = [
        start(tmp_path / "run", {**common, "process": 0, "optimizer.learning_rate": 0.01}, 0),
        start(tmp_path / "run", {**common, "process": 1, "optimizer.learning_rate": 0.02}, 1),
    ]
    assert [process.wait(timeout=60) for process, _ in processes] == [1, 1]
    for _, output in processes:
        sentence = "error: The processes do not agree. Process 0 -> process 1: config.optimizer.learning_rate: 0.01 -> "
        assert sentence in output.read_text()
        assert "Traceback" not in output.read_text()


def test_second_signal_ends_at_once(tmp_path):
    process, output = start(tmp_path / "run", {"steps": 10000, "save_every": 0, "eval_every": 0, "slow": 1.0})
    wait_for(lambda: b"Training 10000 steps" in output.read_bytes())
    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: b"a second signal ends at once" in output.read_bytes())
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=10) == 130
