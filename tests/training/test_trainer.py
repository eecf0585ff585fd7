"""The training loop: starts, resumes to the bit, keeps the best, stops, refuses."""

import dataclasses
import json
import logging
import os
import re
import signal
import threading
import time

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from tiny_experiment import Bars, PoisonedTask, arrays, lines, tiny_experiment

from jax_densevit.errors import UserError
from jax_densevit.models.output import QueryOutput
from jax_densevit.tasks.instances import InstancesTask
from jax_densevit.training import trainer
from jax_densevit.training.checkpoint import Checkpoints
from jax_densevit.training.trainer import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("finished")
    assert train(tiny_experiment(), workdir, quiet=True) == 0
    return workdir


def test_a_run_leaves_everything(finished, capsys):
    log = lines(finished)
    assert [(line["step"], line.get("evaluator")) for line in log] == [
        (3, None), (6, None), (6, "val"), (9, None), (12, None), (12, "val"), (12, "test"),
    ]  # fmt: skip
    train_lines = [line for line in log if "evaluator" not in line]
    assert set(train_lines[0]) == {"step", "loss", "loss/segmentation", "grad_norm", "param_norm", "lr"}
    assert train_lines[-1]["loss"] < train_lines[0]["loss"]
    assert log[-1]["examples"] == 5 and 0 < log[-1]["mIoU"] <= 1
    names = sorted(path.relative_to(finished).as_posix() for path in (finished / "eval").iterdir())
    assert names == [
        "eval/test-12.json", "eval/test-12_confusion.png",
        "eval/val-12.json", "eval/val-12_confusion.png", "eval/val-12_sheet.png",
        "eval/val-6.json", "eval/val-6_confusion.png", "eval/val-6_sheet.png",
    ]  # fmt: skip
    assert json.loads((finished / "eval/val-12.json").read_text())["summary"]["mIoU"] == log[-2]["mIoU"]
    checkpoints = Checkpoints(finished, read_only=True, best="val/mIoU")
    best = max((line for line in log if line.get("evaluator") == "val"), key=lambda line: line["mIoU"])
    assert checkpoints.scores.latest() == {"score": "val/mIoU", "value": best["mIoU"], "step": best["step"]}
    assert checkpoints.preferred_step() == best["step"]
    assert {8, 12} <= set(checkpoints.steps()) <= {6, 8, 12}
    assert json.loads((finished / "config.json").read_text())["batch_size"] == 8
    timings = [line for line in lines(finished, "timings.jsonl") if "evaluator" not in line]
    assert all(line["images_per_second"] > 0 and 0 <= line["input_wait"] <= 1 for line in timings)
    # Running it again says so and changes nothing.
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file() and path.name != ".lock"}
    assert train(tiny_experiment(), finished, quiet=False) == 0
    assert "has reached step 12 already" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file() and path.name != ".lock"}
    assert {path: after[path] for path in before} == before


def test_stop_and_resume_to_the_bit(finished, tmp_path, monkeypatch, capsys):
    """Stopped after every other step, in the middle of logging intervals and before evaluations."""
    for _ in range(20):
        asked = []
        monkeypatch.setattr(trainer.StopRequest, "reached", lambda self, step, asked=asked: (asked.append(step), len(asked) > 1)[1])  # fmt: skip  # noqa: E501
        code = train(tiny_experiment(), tmp_path)
        if code == 0:
            break
        assert code == 75
    assert code == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert arrays(tmp_path, 12) == arrays(finished, 12)
    assert (tmp_path / "best.json").read_bytes() == (finished / "best.json").read_bytes()
    assert "run the same command again" in capsys.readouterr().out


def test_falls_back_over_a_damaged_step_and_cuts_the_log(finished, tmp_path, caplog):
    train(tiny_experiment(), tmp_path, quiet=True)
    victim = next((tmp_path / "checkpoints/12/params/d").iterdir())
    victim.write_bytes(victim.read_bytes()[:-3])
    with caplog.at_level(logging.WARNING):
        assert train(tiny_experiment(), tmp_path, quiet=True) == 0
    assert str(victim) in caplog.text and "Continuing from step 8; 4 step(s) are lost" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert arrays(tmp_path, 12) == arrays(finished, 12)
    with pytest.raises(UserError, match="damaged"):
        for victim in (tmp_path / "checkpoints").rglob("_METADATA"):
            victim.write_text("")
        train(tiny_experiment(), tmp_path, quiet=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_and_saves(tmp_path, number, capfd):
    experiment = tiny_experiment(steps=10_000, save_every=0, eval_every=0, slow=0.002)

    def soon():
        while not (tmp_path / "metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=soon, daemon=True).start()
    before = signal.getsignal(number)
    assert train(experiment, tmp_path) == 75
    assert signal.getsignal(number) is before
    (step,) = Checkpoints(tmp_path, read_only=True).steps()
    assert 3 <= step < 10_000
    captured = capfd.readouterr()
    assert "a second signal ends at once" in captured.err and "the state is saved" in captured.out


def test_signal_during_an_evaluation_leaves_it_and_repeats_it(tmp_path, finished):
    experiment = tiny_experiment(save_every=0)
    experiment.evaluators[0].source.slow = 0.2

    def soon():
        while not any(line["step"] == 6 for line in lines(tmp_path)) if (tmp_path / "metrics.jsonl").exists() else True:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=soon, daemon=True).start()
    assert train(experiment, tmp_path, quiet=True) == 75
    assert Checkpoints(tmp_path, read_only=True).steps() == [6]
    assert not any("evaluator" in line for line in lines(tmp_path))
    assert train(tiny_experiment(save_every=0), tmp_path, quiet=True) == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_not_finite_stops_and_names_the_examples(tmp_path):
    # Example 5 comes once an epoch of three steps: find its first step, and save at every step before it.
    experiment = tiny_experiment(save_every=1, evaluate=False)
    stream = experiment.train_stream(0)
    indices = [next(stream)["index"] for _ in range(3)]
    stream.close()
    bad = int(indices[2][0])
    experiment.task = PoisonedTask(experiment.task, bad)
    with pytest.raises(UserError) as failure:
        train(experiment, tmp_path, quiet=True)
    message = str(failure.value)
    assert "Step 3 is not finite (loss nan" in message and "last saved step is 2" in message
    assert f"it is so for these: bar {bad}." in message
    assert Checkpoints(tmp_path, read_only=True).steps() == [1, 2]
    assert (
        [line["step"] for line in lines(tmp_path, "metrics.jsonl")] == []
        if (tmp_path / "metrics.jsonl").exists()
        else True
    )


class NormalisedQueries(nn.Module):
    """Objects from each picture divided by its own contrast: a picture of one color has none."""

    @nn.compact
    def __call__(self, images, train=False):
        x = images / (images.max((1, 2), keepdims=True) - images.min((1, 2), keepdims=True))
        masks = jax.numpy.moveaxis(nn.Dense(3, name="masks")(x), -1, 1)
        classes = nn.Dense(3 * 3, name="classes")(x.mean((1, 2))).reshape(-1, 3, 3)
        return QueryOutput(classes, masks, covers=images.shape[1:3])


class Pairs(Bars):
    """The two halves of each bar as objects; some pictures are of one color."""

    def __init__(self, plain):
        super().__init__()
        self.plain = plain

    def read(self, index):
        example = super().read(index)
        image = np.full_like(example["image"], 70) if index in self.plain else example["image"]
        return {**example, "image": image, "instances": example["labels"].astype(np.uint16) + 1}


@pytest.mark.parametrize("count", [2, 24])
def test_matching_costs_that_are_no_numbers_are_named_with_their_pictures(tmp_path, count):
    """The true task, matching and trainer: nothing loops, and where all fail none is blamed."""
    experiment = tiny_experiment(steps=3, evaluate=False, devices=2)
    plain = sorted(np.random.default_rng(1).permutation(24)[:count].tolist())
    experiment.source, experiment.model = Pairs(plain), NormalisedQueries()
    experiment.task = InstancesTask(Bars.info, slots=2, bce_weight=1.0)
    stream = experiment.train_stream(0)
    batches = [sorted(set(next(stream)["index"].tolist()) & set(plain)) for _ in range(3)]
    stream.close()
    step = next(i for i, found in enumerate(batches) if found)
    with pytest.raises(UserError, match=f"Step {step + 1} is not finite .loss nan") as failure:
        train(experiment, tmp_path, quiet=True)
    named = {f"bar {index}" for index in batches[step]}
    said = re.search(r"(it is so for these|its examples): (.*?)\. Look", str(failure.value))
    assert said[1] == ("its examples" if count == 24 else "it is so for these")
    assert set(said[2].split(", ")) == named


def test_not_finite_parameters_are_never_saved(tmp_path):
    """The loss is finite, the update is not."""
    experiment = tiny_experiment(save_every=2, evaluate=False)

    def make_optimizer(params):
        transform, schedule = type(experiment).make_optimizer(experiment, params)
        broken = optax.stateless(lambda updates, _: jax.tree.map(lambda u: u * jax.numpy.inf, updates))
        return optax.chain(transform, broken), schedule

    experiment.make_optimizer = make_optimizer
    with pytest.raises(UserError, match="not finite"):
        train(experiment, tmp_path / "second", quiet=True)
    experiment.config.checkpoint.every = 1
    with pytest.raises(UserError, match="parameters are not finite after step 1, .* Nothing was saved yet"):
        train(experiment, tmp_path / "first", quiet=True)
    assert Checkpoints(tmp_path / "first", read_only=True).steps() == []


def test_takes_over_the_parameters_of_another_run(finished, tmp_path, capsys):
    experiment = tiny_experiment(
        steps=1, evaluate=False, **{"init.workdir": str(finished), "optimizer.learning_rate": 0.0}
    )
    assert train(experiment, tmp_path) == 0
    step = Checkpoints(finished, read_only=True).preferred_step()
    taken = {key: value for key, value in arrays(tmp_path, 1).items() if "params/params" in key}
    source = arrays(finished, step)
    assert taken == {key: source[key.replace("params/params", "ema/params")] for key in taken}
    said = capsys.readouterr().out
    assert "7 arrays taken over, 0 left" in said and "Images came" not in said

    wide = tiny_experiment(steps=1, evaluate=False, **{"init.workdir": str(finished)})
    wide.model = wide.model.clone(width=9)
    with pytest.raises(UserError, match=r"head/kernel is float32\[8, 2\] there, float32\[9, 2\] here"):
        train(wide, tmp_path / "wide", quiet=True)
    with wide.config.unlocked():
        wide.config.init.leave_out = ("stem", "norm", "head/kernel")
    wide.info = dataclasses.replace(wide.info, mean=(0.5,) * 3)
    assert train(wide, tmp_path / "wide") == 0
    said = capsys.readouterr().out
    assert "Images came to it with mean 0.485 0.456 0.406, std" in said and "with mean 0.5 0.5 0.5, std" in said
    with pytest.raises(UserError, match="There is no checkpoint"):
        train(tiny_experiment(**{"init.workdir": str(tmp_path / "none")}), tmp_path / "other", quiet=True)


def test_other_order_or_less_steps_are_refused(finished, capsys):
    with pytest.raises(UserError, match="trained with batch_size 8 and config.batch_size is 4"):
        train(tiny_experiment(batch_size=4, steps=20), finished, quiet=True)
    with pytest.raises(UserError, match="trained with seed 3"):
        train(tiny_experiment(seed=4, steps=20), finished, quiet=True)
    with pytest.raises(UserError, match="is at step 12, beyond the 6 steps"):
        train(tiny_experiment(steps=6), finished, quiet=True)


def test_more_steps_than_before(tmp_path, capsys):
    assert train(tiny_experiment(steps=3, evaluate=False), tmp_path, quiet=True) == 0
    assert train(tiny_experiment(steps=5, evaluate=False), tmp_path) == 0
    out = capsys.readouterr().out
    assert "Resuming from step 3 of 5" in out and "config.steps: 3 -> 5" in out
    assert [line["step"] for line in lines(tmp_path)] == [3, 5]


def test_an_unreadable_example_stops_with_its_own_sentence(tmp_path):
    with pytest.raises(UserError, match="bar 4 cannot be read"):
        train(tiny_experiment(bad=4), tmp_path, quiet=True)
    assert threading.active_count() < 20
    experiment = tiny_experiment(bad=4, steps=4, evaluate=False, **{"data.on_bad": "skip"})
    experiment.source = Bars(length=100, bad=4)
    assert train(experiment, tmp_path / "skip", quiet=True) == 0


def test_profile(tmp_path, capsys):
    experiment = tiny_experiment(steps=9, evaluate=False, **{"log.profile_at": 2, "log.profile_steps": 3})
    assert train(experiment, tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    written = next(i for i, line in enumerate(lines) if "Profile written" in line)
    # Step 5 is the last of the window; the line of step 6 comes later.
    before = "\n".join(lines[:written])
    assert "step 3/9" in before and "step 6/9" not in before
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_goodput_counts_steps_only(tmp_path):
    assert train(tiny_experiment(steps=8, slow=0.01), tmp_path, quiet=True) == 0
    timings = [json.loads(line) for line in (tmp_path / "timings.jsonl").read_text().splitlines()]
    shares = [line["goodput"] for line in timings if "goodput" in line]
    assert shares and all(0 < share < 0.9 for share in shares)  # compiling and waiting for data are no steps


def test_eight_devices_are_one(tmp_path):
    one = tiny_experiment(evaluate=False)
    eight = tiny_experiment(evaluate=False, devices=8)
    for experiment, name in ((one, "one"), (eight, "eight")):
        assert train(experiment, tmp_path / name, quiet=True) == 0
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "eight"), strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
    # Saved on eight, resumed on one.
    assert train(tiny_experiment(evaluate=False, steps=14), tmp_path / "eight", quiet=True) == 0
    assert train(tiny_experiment(evaluate=False, steps=14, devices=8), tmp_path / "one", quiet=True) == 0
    np.testing.assert_allclose(lines(tmp_path / "one")[-1]["loss"], lines(tmp_path / "eight")[-1]["loss"], rtol=1e-4)
