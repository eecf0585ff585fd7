"""The command train: a config file and a workdir are all it takes; what is wrong is said in one sentence."""

import json
import os
import re
import subprocess
import sys

import pytest
from together import run_together

from jax_densevit import train
from jax_densevit.errors import UserError
from jax_densevit.training.checkpoint import Checkpoints

CONFIG = '''
from jax_densevit.configuration import default_config, default_evaluator, words


def get_config(arg=""):
    """A SETR of one layer for digit scenes of 16 x 16."""
    words(arg, "quick")
    digits = {"name": "digit_scenes", "size": (16, 16), "digits": (1, 1), "scale": (8, 12)}
    config = default_config()
    config.model.update({"name": "setr_naive", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_size": 16})
    config.model.update({"patch_size": 4, "head_channels": 8, "taps": (1,), "auxiliary": False})
    config.data.train.update({**digits, "split": "train", "length": 32})
    config.data.crop = (16, 16)
    config.update({"steps": 4, "batch_size": 8, "ema": 0.5})
    config.checkpoint.update({"every": 2, "best": "val/mIoU"})
    config.log.every = 2
    evaluator = default_evaluator()
    evaluator.data.update({**digits, "split": "val", "length": 5})
    evaluator.batch_size = 4
    config.eval.val = evaluator
    return config
'''


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "tiny.py"
    path.write_text(CONFIG)
    return str(path)


def test_dry_run_prints_and_writes_nothing(config, tmp_path, capsys):
    arguments = ["--dry_run", "--workdir", str(tmp_path / "run"), "--config.optimizer.learning_rate=0.125"]
    assert train.main([f"--config={config}", *arguments]) == 0
    out = capsys.readouterr().out
    for expected in ("learning_rate: 0.125", "/kernel", " parameters in ", "Memory of a step", "MACs"):
        assert expected in out
    assert not (tmp_path / "run").exists()


def test_plans_for_more_devices_than_there_are(config, capfd):
    """A line per number of devices; the more there are the less each holds, where they divide the state.

    Of the 270 MB of state nothing is ever allocated; 67 MB of parameters are gathered while a step runs.
    """
    sizes = ["--config.model.patch_size=16", "--config.model.mlp_size=524288"]
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=-1"]
    assert train.main([f"--config={config}", "--dry_run", "--devices=2,16", *sizes, *mesh]) == 0
    out, err = capfd.readouterr()  # of another process: this one has eight devices
    assert "2 devices: compiled in" in err and "16 devices: compiled in" in err
    rows = [line.split() for line in out.splitlines() if re.match(r"(2|16) +1 x ", line)]
    assert [row[:7] for row in rows] == [[n, *f"1 x {n} x 1".split(), batch] for n, batch in (("2", "8"), ("16", "64"))]
    gib = [float(row[7]) for row in rows]
    assert gib[0] > 0.1 and gib[1] < 0.6 * gib[0]
    predicted = [line for line in out.splitlines() if re.match(r"(2|16) .* %", line)]
    assert len(predicted) == 2 and "TPU v5p" in out


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ("0", "--devices=0 must be a number of devices"),
        ("-1", "--devices=-1 must be a number of devices"),
        ("a", "--devices=a must be a number of devices"),
        ("2,,x", "must be a number of devices, or several with commas"),
        (",", "--devices=, must be a number of devices"),
        ("6", "fsdp=4, tensor=1 does not fit 6 device"),
        ("6,8", "does not fit 6 device"),
    ],
)
def test_plans_for_numbers_that_cannot_be_are_refused(config, devices, message):
    arguments = [f"--config={config}", "--dry_run", f"--devices={devices}", "--config.mesh.fsdp=4"]
    with pytest.raises(UserError, match=message):
        train.main(arguments)


def test_a_plan_that_fails_in_the_other_process_fails(config, capfd):
    assert train.main([f"--config={config}", "--dry_run", "--devices=12", "--config.mesh.tensor=5"]) == 1
    out, err = capfd.readouterr()
    assert err.startswith("error: mesh: data=-1, fsdp=1, tensor=5 does not fit 12 device") and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=w", "--config.stepss=3"], "did you mean 'steps'"),
        (["--workdir=w", "--config.model.variant=17"], "has no variant"),
        (["--workdir=w", "--config.batch_size=12"], "must be a multiple|cannot be divided"),
        (["--workdir=w", "--config.checkpoint.keep=0"], "checkpoint.keep is 0"),
        ([], "--workdir is missing"),
        (["--workdir=w", "--coordinator=localhost:1"], "belong together"),
        (["--workdir=gs://bucket/run"], "no local path"),
    ],
)
def test_mistakes_are_named(config, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        train.main([f"--config={config}", *arguments])
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"] == []


@pytest.mark.multiprocess
def test_saved_on_eight_devices_evaluated_on_one_and_by_two_processes(config, tmp_path, capsys):
    """From the shell, as a user does it; the tests' own process has eight devices, the one started here has one."""
    assert train.main([f"--config={config}:quick", "--workdir", str(tmp_path), "--quiet"]) == 0
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.steps() == [2, 4] and checkpoints.read_meta(4)["config"]["steps"] == 4
    (trained,) = (
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "evaluator" in line
    )
    environment = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "jax_densevit.evaluate", "--workdir", str(tmp_path)]
    (tmp_path / "eval/val-4.json").unlink()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    alone = json.loads((tmp_path / "eval/val-4.json").read_text())
    assert alone["device"].startswith("1 x ")
    assert alone["examples"] == trained["examples"] == 5
    assert alone["summary"]["pixel_accuracy"] == pytest.approx(trained["pixel_accuracy"], abs=2e-3)
    # Two processes share the work, and the first one writes.
    (tmp_path / "eval/val-4.json").unlink()
    assert [code for code, _, _ in run_together(command, environment)] == [0, 0]
    two = json.loads((tmp_path / "eval/val-4.json").read_text())
    assert two["device"].startswith("2 x ") and two["examples"] == 5
    assert two["summary"] == pytest.approx(alone["summary"], abs=2e-3)
    for code, _, said in run_together(command, environment, second=("--limit", "3")):
        assert code == 1 and "error: The processes do not agree. Process 0 -> process 1: flags.limit: None -> 3" in said
    # The same command again: done already; and from the shell an error is one sentence.
    assert train.main([f"--config={config}", "--workdir", str(tmp_path)]) == 0
    assert "has reached step 4 already" in capsys.readouterr().out
    command = [sys.executable, "-m", "jax_densevit.train", f"--config={config}", "--workdir", str(tmp_path)]
    failed = subprocess.run([*command, "--config.seed=1"], capture_output=True, text=True, env=environment)
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1 and failed.stderr.startswith("error: ") and "seed" in failed.stderr
