"""What a person's terminal and machine do to a command: Ctrl-C, closed pipes, narrow, ASCII, no network, no home."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soak_kill
from PIL import Image
from untrained import digit_unet, save_untrained

from jax_densevit import evaluate, predict, prepare, train
from jax_densevit.console import run_command
from jax_densevit.data.sources.digit_scenes import DigitScenes
from jax_densevit.tasks.segmentation import SegmentationTask

CONFIG = """
from jax_densevit.configuration import ConfigDict, default_config

def get_config(arg=""):
    config = default_config()
    config.model = ConfigDict({"name": "unet", "base": 2})
    config.data.train = ConfigDict({"name": "digit_scenes", "split": "train", "length": 8, "size": (32, 32),
        "digits": (1, 2), "scale": (10, 16)})
    config.data.crop = (32, 32)
    config.update({"steps": 2, "batch_size": 8})
    return config
"""


@pytest.fixture(autouse=True)
def ctrl_c_counts():
    """Where the tests were started in the background, a shell has told them to ignore it, and their children too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A checkpoint of a tiny U-Net for digit scenes, with an evaluator."""
    config = digit_unet((32, 32), 3, batch_size=8, sheet=0)
    return save_untrained(config, tmp_path_factory.mktemp("run"))


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    return f"--config={tmp_path / 'config.py'}"


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def leave(monkeypatch, command, *arguments):
    """Runs a command as from the shell, in this process; returns its exit code."""
    monkeypatch.setattr(sys, "argv", [command.__name__, *map(str, arguments)])
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in a command whose imports are over
    with pytest.raises(SystemExit) as left:
        run_command(command.main)
    return left.value.code


def ctrl_c(at=1):
    """A function that is Ctrl-C when it is called for the `at`-th time, from whichever thread."""
    calls = itertools.count(1)
    return lambda *_: os.kill(os.getpid(), signal.SIGINT) if next(calls) == at else None


def test_ctrl_c_while_it_is_imported(tmp_path):
    (tmp_path / "jax.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "jax_densevit.train", "--config=none.py", "--workdir=none"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(train.__file__).parents[1]}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")  # a shell calls it 130
    assert files(tmp_path) == ["jax.py"] or files(tmp_path)[0].startswith("__pycache__")


def test_ctrl_c_before_the_first_step(monkeypatch, config, tmp_path, capsys):
    monkeypatch.setattr(train, "build", ctrl_c())
    assert leave(monkeypatch, train, config, f"--workdir={tmp_path / 'run'}") == 130
    assert capsys.readouterr().err == "stopped\n" and not (tmp_path / "run").exists()


def test_ctrl_c_while_others_work(monkeypatch, config, workdir, tmp_path, capsys):
    """Predicting, evaluating, preparing: 130, a word, and nothing half-written."""
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        Image.fromarray(np.full((32, 32, 3), 60 * i, np.uint8)).save(images / f"{i}.png")
    before, write, once = files(workdir), SegmentationTask.write, ctrl_c()
    with monkeypatch.context() as patch:
        patch.setattr(SegmentationTask, "write", lambda *arguments: (write(*arguments), once()))
        given = (f"--workdir={workdir}", f"--input={images}", f"--output={tmp_path / 'out'}")
        assert leave(patch, predict, *given) == 130
    names = files(tmp_path / "out")
    assert "0.json" in names and len(names) % 3 == 0 and not any(name.startswith(".") for name in names)
    read = DigitScenes.read
    for command, *arguments in (
        (evaluate, f"--workdir={workdir}"),
        (prepare, config, f"--output={tmp_path / 'prepared'}"),
    ):
        with monkeypatch.context() as patch:
            third = ctrl_c(at=3)
            patch.setattr(DigitScenes, "read", lambda *x, third=third: (read(*x), third())[0])
            assert leave(patch, command, *arguments) == 130
    assert files(workdir) == before and sorted(p.name for p in tmp_path.iterdir()) == ["config.py", "images", "out"]
    assert capsys.readouterr().err == "stopped\n" * 3


def test_a_reader_that_leaves(monkeypatch, workdir, tmp_path):
    """`| head`: training goes on and says so once; a command that only prints ends well."""
    options = {"steps": 12, "save_every": 4, "eval_every": 0, "log_every": 1, "evaluate": "false"}
    command = [sys.executable, soak_kill.PROGRAM, tmp_path / "run", *(f"{n}={v}" for n, v in options.items())]
    environment = {**os.environ, **soak_kill.ENVIRONMENT}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert "Training 12 steps" in process.stdout.readline()
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait() == 0
    assert "Nothing is printed any more (Broken pipe). Training goes on" in errors and len(errors.splitlines()) == 1
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 12

    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        assert leave(patch, evaluate, f"--workdir={workdir}") == 0


def test_twenty_columns_of_ascii(monkeypatch, workdir, tmp_path):
    monkeypatch.setenv("COLUMNS", "20")
    for number, encoding in enumerate(("ascii", "utf-8")):
        with open(tmp_path / "out", "w", encoding=encoding) as out, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            assert leave(patch, evaluate, f"--workdir={workdir}") == 0
        text = (tmp_path / "out").read_text(encoding=encoding)
        lines = [line for line in text.splitlines() if not line.startswith("/")]  # paths are never broken
        assert max(map(len, lines)) <= 20 and "mIoU" in text and "3 examples" in " ".join(text.split())
        score = json.loads((workdir / "eval/val-7.json").read_text())["summary"]["mIoU"]
        assert f"{100 * score:.2f}" in text, (number, text)


def test_names_that_are_no_unicode(monkeypatch, workdir, tmp_path, capsys):
    """A name in Latin-1, as old archives have it, and one that has blanks and umlauts."""
    images = tmp_path / "images"
    images.mkdir()
    for name in (b"f\xfcr.png", "f\xfcr alle.png".encode()):
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(images / os.fsdecode(name))
    assert leave(monkeypatch, predict, f"--workdir={workdir}", f"--input={images}", f"--output={tmp_path / 'out'}") == 0
    names = {os.fsencode(path.name) for path in (tmp_path / "out").glob("*.json")}
    assert names == {b"f\xfcr.json", "f\xfcr alle.json".encode()}
    told = [json.loads(path.read_bytes())["image"] for path in (tmp_path / "out").glob("*.json")]
    assert {os.fsencode(name) for name in told} == {b"f\xfcr.png", "f\xfcr alle.png".encode()}


def test_no_network_no_home_no_tensorboard_no_gpu(tmp_path):
    """A run from start to end where a connection fails at once, HOME cannot be written, and TensorBoard is missing."""
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\n\ndef refuse(*_, **__):\n    raise OSError(101, 'Network is unreachable')\n\n"
        "socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse\n"
    )
    (tmp_path / "tensorboard.py").write_text("raise ModuleNotFoundError(\"No module named 'tensorboard'\")\n")
    places = {"HOME": "/proc/nowhere", "PYTHONPATH": f"{tmp_path}:{soak_kill.HERE.parent}"}
    environment = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": "", **soak_kill.ENVIRONMENT, **places}
    del environment["JAX_PLATFORMS"]  # JAX looks for what there is
    command = [sys.executable, soak_kill.PROGRAM, tmp_path / "run", "steps=4", "log_every=4"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step 4/4" in done.stdout and "Traceback" not in done.stderr
    assert done.stderr.count("TensorBoard is off: ModuleNotFoundError") == 1
    assert {"val-4.json", "val-4_confusion.png", "val-4_sheet.png"} <= set(files(tmp_path / "run/eval"))
