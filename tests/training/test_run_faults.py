"""Faults of a run that need no second process: clocks, averages, parameters alone, Ctrl-C where nobody waits for it."""

import itertools
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_experiment import PoisonedTask, arrays, lines, tiny_experiment

from jax_densevit.errors import UserError
from jax_densevit.pretrained import memory
from jax_densevit.training import trainer
from jax_densevit.training.checkpoint import Checkpoints
from jax_densevit.training.state import TrainState
from jax_densevit.training.trainer import train


def files(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A workdir with parameters alone, as `convert` writes it."""
    experiment, workdir = tiny_experiment(), tmp_path_factory.mktemp("alone")
    variables = experiment.model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    with Checkpoints(workdir) as checkpoints:
        state = TrainState(np.int32(0), variables["params"], variables["batch_stats"], None, {})
        checkpoints.save(0, state, {}, experiment.meta())
    return workdir


def test_parameters_alone_are_nothing_to_resume(alone, tmp_path, capsys):
    before = files(alone / "checkpoints")
    with pytest.raises(UserError, match=r"no state of training.*name another --workdir.*--config.init.workdir=.*alone"):
        train(tiny_experiment(), alone, quiet=True)
    assert files(alone / "checkpoints") == before
    experiment = tiny_experiment(steps=1, evaluate=False, **{"init.workdir": str(alone)})
    assert train(experiment, tmp_path) == 0  # what the sentence advises
    assert "7 arrays taken over" in capsys.readouterr().out
    # The other way round, parameters out of a whole state, is what every evaluation does.
    assert Checkpoints(tmp_path, read_only=True).restore_variables(1).keys() == {"params", "batch_stats"}


def test_parameters_larger_than_the_machine_are_not_loaded(alone, monkeypatch):
    checkpoints = Checkpoints(alone, read_only=True)
    monkeypatch.setattr(memory, "machine_bytes", lambda: 100)
    with pytest.raises(UserError, match=r"0\.0 GiB of arrays and this machine has"):
        checkpoints.restore_variables(0)
    monkeypatch.undo()
    monkeypatch.setattr(memory, "MAX_ARRAYS", 4)
    with pytest.raises(UserError, match="params holds 5 arrays, and no model has more than 4"):
        checkpoints.restore_variables(0)


def test_clocks_that_jump_back_and_stand_still(tmp_path, monkeypatch):
    """Stopped and started again within one second of a clock that runs backwards: nothing written is lost."""
    assert train(tiny_experiment(), tmp_path / "straight", quiet=True) == 0
    back, still = itertools.count(10**9, -100), itertools.count(10**18)
    monkeypatch.setattr(time, "time", lambda: float(next(back)))
    monkeypatch.setattr(time, "time_ns", lambda: next(still))
    written = {}
    for stop_at in (5, 9, None):
        with monkeypatch.context() as patch:
            patch.setattr(trainer.StopRequest, "reached", lambda self, step, stop_at=stop_at: step == stop_at)
            assert train(tiny_experiment(), tmp_path / "run", quiet=True) == (75 if stop_at else 0)
        boards = {name: path.read_bytes() for name, path in files(tmp_path / "run/tensorboard").items()}
        assert written.items() <= boards.items() and len(boards) == len(written) + 1
        written = boards
    for name in ("metrics.jsonl", "best.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert Checkpoints(tmp_path / "run", read_only=True).steps()[-1] == 12
    assert len((tmp_path / "run/timings.jsonl").read_text().splitlines()) == 7


def test_skipped_steps_change_nothing_and_are_counted(tmp_path, monkeypatch, caplog):
    """One example is poison, and each epoch of three steps loses one: however often the run is stopped."""

    def experiment():
        made = tiny_experiment(steps=9, save_every=2, evaluate=False, log_every=4, on_not_finite="skip")
        made.task = PoisonedTask(made.task, 5)
        return made

    assert train(experiment(), tmp_path / "straight", quiet=True) == 0
    said = [line for line in caplog.messages if "is not finite (loss nan" in line]
    assert len(said) == 3 and all("bar 5" in line and line.count("bar ") == 8 for line in said)
    logged = lines(tmp_path / "straight", "metrics.jsonl")
    assert sum(line.get("not_finite", 0) for line in logged) == 3
    assert all(np.isfinite(line["loss"]) for line in logged)
    for stop_at in (3, 5, 6, None):
        with monkeypatch.context() as patch:
            patch.setattr(trainer.StopRequest, "reached", lambda self, step, stop_at=stop_at: step == stop_at)
            assert train(experiment(), tmp_path / "parts", quiet=True) == (75 if stop_at else 0)
    assert arrays(tmp_path / "parts", 9) == arrays(tmp_path / "straight", 9)
    assert lines(tmp_path / "parts", "metrics.jsonl") == logged


def test_ten_steps_in_a_row_that_are_not_finite_stop(tmp_path):
    experiment = tiny_experiment(save_every=4, evaluate=False, log_every=2, on_not_finite="skip")
    experiment.task = PoisonedTask(experiment.task, -1)
    with pytest.raises(UserError, match="Step 10 is not finite .* It is the 10th such step in a row.* saved step is 8"):
        train(experiment, tmp_path, quiet=True)
    assert lines(tmp_path, "metrics.jsonl")[0] == {"step": 2, "not_finite": 2}
    assert Checkpoints(tmp_path, read_only=True).steps() == [4, 8]


def test_an_average_that_is_not_finite_is_never_saved(tmp_path, monkeypatch):
    """Loss, gradients and parameters are; only the moving average is not, from the sixth step on."""
    prepare, steps = trainer.prepare, itertools.count(1)
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * jnp.nan, tree))

    def spoiling(*arguments):
        parts = prepare(*arguments)
        step = parts.step

        def spoiled(state, batch):
            state, numbers = step(state, batch)
            return (state.replace(ema=spoil(state.ema)) if next(steps) == 6 else state), numbers

        object.__setattr__(parts, "step", spoiled)
        return parts

    monkeypatch.setattr(trainer, "prepare", spoiling)
    with pytest.raises(UserError, match="not finite after step 8, though its loss is; .* last saved step is 4"):
        train(tiny_experiment(evaluate=False), tmp_path, quiet=True)
    assert Checkpoints(tmp_path, read_only=True).steps() == [4]


def test_ctrl_c_while_compiling_and_in_the_last_save(tmp_path, monkeypatch, capfd):
    def then_ctrl_c(function):
        def call(*arguments):
            os.kill(os.getpid(), signal.SIGINT)
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "prepare", then_ctrl_c(trainer.prepare))
        assert train(tiny_experiment(evaluate=False), tmp_path, quiet=True) == 75
    assert Checkpoints(tmp_path, read_only=True).steps() == [1]  # the first step was made, and is kept
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_finish", then_ctrl_c(Checkpoints._finish))
        assert train(tiny_experiment(evaluate=False, save_every=0), tmp_path, quiet=True) == 0
    assert Checkpoints(tmp_path, read_only=True).steps() == [1, 12]
    assert capfd.readouterr().err.count("Stopping: the current step ends and is saved") == 2
