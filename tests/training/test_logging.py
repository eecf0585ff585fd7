"""The log: deterministic lines that can be cut, timings apart, TensorBoard that may fail."""

import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jax_densevit.errors import UserError
from jax_densevit.training.logging import JsonLines, RunLog, TensorBoard, human_line


def test_lines_keep_every_digit(tmp_path):
    values = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 1e-300}, {"step": 3, "loss": math.nan, "n": 3}]
    file = JsonLines(tmp_path / "metrics.jsonl")
    for line in values:
        file.append(line)
    assert file.read() == [*values[:2], {"step": 3, "loss": None, "n": 3}]


def test_cut_drops_later_steps_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    file = JsonLines(path)
    for step in range(1, 6):
        file.append({"step": step, "loss": step / 3})
    whole = path.read_bytes()
    third = b"".join(whole.splitlines(keepends=True)[:3])
    path.write_bytes(whole + b'{"step": 6, "lo')
    file.cut_after(3)
    assert path.read_bytes() == third
    file.append({"step": 4, "loss": 4 / 3})  # the file is open again, at its new end
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:4])
    path.write_bytes(third + b"\x00\x00\x00\n" + whole)  # zeros, as some file systems leave them after a power cut
    file.cut_after(5)
    assert path.read_bytes() == third
    before = path.stat().st_mtime_ns
    file.cut_after(3)
    assert path.stat().st_mtime_ns == before  # nothing to do, nothing done
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(No such file or directory\)"):
        JsonLines(tmp_path / "gone" / "metrics.jsonl").append({"step": 1})
    with pytest.raises(UserError, match=r"/dev/full cannot be written \(No space left on device\)"):
        file = JsonLines(Path("/dev/full"))
        file.append({"step": 1})


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_files_can_be_read_and_a_restart_voids_later_steps(tmp_path):
    first = TensorBoard(tmp_path, 0)
    for step in (1, 2, 3, 4):
        first.scalars(step, {"train/loss": float(step)})
    first.close()
    second = TensorBoard(tmp_path, 2)
    second.scalars(3, {"train/loss": 30.0})
    second.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert events(tmp_path)["train/loss"] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_failing_tensorboard_is_one_warning(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        log = RunLog(tmp_path, step=0, steps=10, quiet=True)
        log.train(1, {"loss": 1.0}, {})
        log.train(2, {"loss": 1.0}, {})
        board = TensorBoard(tmp_path / "other", 0)
        board._file.close()  # the disk goes away under it
        board.scalars(1, {"a": 1.0})
        board.scalars(2, {"a": 1.0})
    assert [record.message.count("TensorBoard is off") for record in caplog.records] == [1, 1]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    log.close()


def test_run_log(tmp_path, capsys):
    log = RunLog(tmp_path, step=0, steps=100)
    timing = {"images_per_second": 312.4, "input_wait": 0.021, "mfu": 0.341, "seconds_left": 3725.0, "skipped": 3}
    log.train(50, {"loss": 0.81234567, "lr": 1e-3, "grad_norm": 2.0}, timing)
    log.evaluation(50, "val", {"mIoU": 0.5}, 7, 1.25)
    assert log.evaluated(50) == {"val"} and log.evaluated(40) == set()
    log.close()
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "step 50/100  loss 0.8123  lr 1.00e-03  312 images/s  MFU 34.1%  input wait 2%  ETA 1:02:05  "
        "3 unreadable files skipped",
        "step 50  val: mIoU 0.5000  (7 images, 1.2 s)",
    ]
    metrics = (tmp_path / "metrics.jsonl").read_text()
    assert "images" not in metrics.splitlines()[0] and "seconds" not in metrics
    assert json.loads((tmp_path / "timings.jsonl").read_text().splitlines()[0])["mfu"] == 0.341
    assert events(tmp_path / "tensorboard")["train/loss"][0][0] == 50


def test_other_processes_are_silent(tmp_path, capsys):
    log = RunLog(tmp_path, step=0, steps=100, main=False)
    log.train(50, {"loss": 0.8}, {})
    log.evaluation(50, "val", {"mIoU": 0.5}, 7, 1.25)
    log.say("hello")
    log.close()
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_a_line_with_what_is_known():
    assert human_line(1, 2, {"loss": 1.0}, {"images_per_second": 12345.0, "mfu": None, "goodput": 0.934}) == (
        "step 1/2  loss 1.0000  12,345 images/s  goodput 93%"
    )


def test_no_tensorflow_and_a_bar_only_on_a_terminal(tmp_path):
    """In a fresh process, with and without a pseudo-terminal."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom jax_densevit.training.logging import RunLog\n"
        f"log = RunLog(Path({str(tmp_path)!r}), step=0, steps=9)\n"
        "log.progress(4)\nlog.train(5, {'loss': 1.0}, {})\nlog.close()\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    plain = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert plain.stdout == "step 5/9  loss 1.0000\n"
    on_terminal = f"import pty, sys\nsys.exit(pty.spawn([sys.executable, '-c', {program!r}]))"
    environment = {**os.environ, "TERM": "xterm"}
    command, options = [sys.executable, "-c", on_terminal], {"stdin": subprocess.DEVNULL, "env": environment}
    shown = subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout
    assert "4/9" in shown and "step 5/9  loss 1.0000" in shown
