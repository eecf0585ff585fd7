"""Checkpoints: exact, verified, restored onto any mesh, never silently wrong."""

import json
import logging
import resource
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_training import TinyModel, Training, tiny_config

from jax_densevit.errors import UserError
from jax_densevit.manifest import find_damage
from jax_densevit.training.checkpoint import Checkpoints
from jax_densevit.training.mesh import make_mesh
from jax_densevit.training.paths import named_leaves
from jax_densevit.training.state import TrainState


def small_state(value: float = 0.0, width: int = 3) -> TrainState:
    mesh = make_mesh(devices=jax.devices()[:1])
    put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec()))  # noqa: E731
    params = {"a": {"kernel": put(np.arange(4.0 * width, dtype=np.float32).reshape(4, width) + value)}}
    return TrainState(step=put(np.int32(0)), params=params, statistics={}, ema=None, optimizer=())


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, small_state(step), {"step": step}, {"name": "x"})
    checkpoints.wait()


def equal(first, second) -> None:
    first, second = named_leaves(first), named_leaves(second)
    assert list(first) == list(second)
    for path in first:
        a, b = np.asarray(first[path]), np.asarray(second[path])
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.tobytes() == b.tobytes(), path


def data_file(step_folder: Path) -> Path:
    """The largest file with array data."""
    return max((p for p in (step_folder / "params").rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_round_trip_of_a_real_state(tmp_path):
    training = Training(model=TinyModel(norm=True), config=tiny_config(name="adamw", clip_norm=1.0), ema=0.9)
    training.run(3)
    with Checkpoints(tmp_path) as checkpoints:
        expected = jax.tree.map(np.array, training.state)
        checkpoints.save(3, training.state, {"step": 3}, {"tuple": (1, 2), "float": 0.1})
        # The step donates the state: the save under way must have its own copy.
        training.run(3)
        checkpoints.wait()
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), training.abstract, training.shardings
        )
        restored = checkpoints.restore(3, target)
        assert checkpoints.read_data(3) == {"step": 3}
        assert checkpoints.read_meta(3) == {"tuple": [1, 2], "float": 0.1}
        assert sorted(p.name for p in (tmp_path / "checkpoints/3").iterdir() if p.is_dir()) == [
            "data", "ema", "meta", "optimizer", "params", "statistics",
        ]  # fmt: skip
    equal(restored, expected)
    assert jax.tree.structure(restored) == jax.tree.structure(training.state)
    jax.tree.map(lambda x, s: None if x.sharding == s else pytest.fail(f"{x.sharding}"), restored, training.shardings)
    variables = Checkpoints(tmp_path, read_only=True).restore_variables(3, "ema")
    equal(variables, {"params": expected.ema["params"], "batch_stats": expected.ema["statistics"]})
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(variables))


def test_any_mesh_to_any_other(tmp_path):
    meshes = [
        make_mesh(data=2, fsdp=4),
        make_mesh(fsdp=2, devices=jax.devices()[:2]),
        make_mesh(devices=jax.devices()[:1]),
    ]
    first = Training(mesh=meshes[0], minimum_bytes=0, ema=0.5)
    first.run(1)
    expected = jax.tree.map(np.array, first.state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, first.state, {}, {})
        checkpoints.wait()
        for mesh in meshes[1:]:
            other = Training(mesh=mesh, minimum_bytes=0, ema=0.5)
            target = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), other.abstract, other.shardings
            )
            restored = checkpoints.restore(1, target)
            equal(restored, expected)
            assert restored.params["stem"]["kernel"].sharding == other.shardings.params["stem"]["kernel"]
            shardings = {"params": other.shardings.params}
            assert checkpoints.restore_variables(1, "params", shardings)["params"]["stem"]["bias"].sharding.mesh == mesh


def damage(kind: str, folder: Path) -> Path:
    victim = data_file(folder)
    if kind == "bit":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    elif kind == "truncated":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif kind == "deleted":
        victim.unlink()
    elif kind == "metadata":
        victim = folder / "params/_METADATA"
        victim.unlink()
    elif kind == "manifest":
        victim = folder / "manifest.json"
        victim.write_text(victim.read_text().replace("0", "1", 1))
    elif kind == "no manifest":
        victim = folder / "manifest.json"
        victim.unlink()
    elif kind == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
        victim = folder / "manifest.json"
    return victim


@pytest.mark.parametrize("kind", ["bit", "truncated", "deleted", "metadata", "manifest", "no manifest", "empty"])
def test_damage_falls_back_one_step(tmp_path, caplog, kind):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 10, 25)
    victim = damage(kind, tmp_path / "checkpoints/25")
    with caplog.at_level(logging.WARNING):
        checkpoints = Checkpoints(tmp_path)
        assert checkpoints.latest_intact() == 10
    assert str(victim) in caplog.text and "15 step(s) are lost" in caplog.text
    equal(checkpoints.restore(10, abstract(small_state())).params, small_state(10).params)
    with pytest.raises(UserError, match="damaged"):
        checkpoints.restore(25, abstract(small_state()))
    with pytest.raises(UserError, match="damaged"):
        checkpoints.restore_variables(25)
    with pytest.raises(UserError, match=r"newest checkpoint is damaged"):
        Checkpoints(tmp_path, strict=True).latest_intact()
    # Training writes the step again; the damaged one is kept for whoever wants to look.
    checkpoints.set_aside_after(10)
    assert checkpoints.steps() == [10] and (tmp_path / "checkpoints/damaged-25").is_dir()
    save(checkpoints, 25)
    assert find_damage(tmp_path / "checkpoints/25") is None
    checkpoints.close()


def test_every_bit_of_every_file_is_covered(tmp_path):
    """One flipped bit in each file of a step, the manifest included."""
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
    folder = tmp_path / "checkpoints/1"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    rng = np.random.default_rng(0)
    for path in files:
        original = path.read_bytes()
        flipped = bytearray(original)
        flipped[rng.integers(len(flipped))] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        assert path.name in (find_damage(folder) or "") or path.name == "manifest.json" and find_damage(folder), path
        path.write_bytes(original)
    assert find_damage(folder) is None


def test_all_damaged_never_starts_from_scratch(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1, 2)
    for step in (1, 2):
        damage("bit", tmp_path / f"checkpoints/{step}")
    with pytest.raises(UserError, match="Every checkpoint .* is damaged"):
        Checkpoints(tmp_path).latest_intact()


def test_nothing_there(tmp_path):
    assert Checkpoints(tmp_path).latest_intact() is None
    missing = tmp_path / "no such"
    with pytest.raises(UserError, match="There is no checkpoint in"):
        Checkpoints(missing, read_only=True).preferred_step()
    assert not missing.exists()
    with pytest.raises(UserError, match="There is no checkpoint of step 7"):
        Checkpoints(missing, read_only=True).restore_variables(7)


def test_keeps_the_latest_and_the_best(tmp_path):
    with Checkpoints(tmp_path, keep=2, best="val/mIoU") as checkpoints:
        for step, score in [(1, 0.1), (2, 0.7), (3, 0.5), (4, 0.6), (5, float("nan"))]:
            assert checkpoints.scores.record(step, {"val/mIoU": score, "val/other": 9.0}) == (step < 3)
            save(checkpoints, step)
        assert checkpoints.steps() == [2, 4, 5]
    again = Checkpoints(tmp_path, keep=2, best="val/mIoU")
    assert again.scores.latest() == {"score": "val/mIoU", "value": 0.7, "step": 2} and again.preferred_step() == 2
    assert not again.scores.record(6, {"val/mIoU": 0.65})
    again.scores.forget_after(1)
    assert again.scores.latest()["value"] == 0.1
    with Checkpoints(tmp_path / "loss", keep=1, best="-val/loss") as smaller:
        assert [smaller.scores.record(s, {"val/loss": v}) for s, v in [(1, 2.0), (2, 3.0), (3, 1.0)]] == [
            True,
            False,
            True,
        ]


def test_mismatches_are_listed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        with pytest.raises(UserError, match=r"params/a/kernel is float32\[4,3\] in the checkpoint and float32\[4,5\]"):
            checkpoints.restore(1, abstract(small_state(width=5)))
        state = small_state()
        state = state.replace(params={"a": {"kernel": state.params["a"]["kernel"].astype(jnp.bfloat16)}})
        with pytest.raises(UserError, match=r"float32\[4,3\] in the checkpoint and bfloat16\[4,3\]"):
            checkpoints.restore(1, abstract(state))
        renamed = small_state().replace(params={"b": small_state().params["a"]}, ema={"params": small_state().params})
        with pytest.raises(UserError) as failure:
            checkpoints.restore(1, abstract(renamed))
        message = str(failure.value)
        assert "params/b/kernel is not in the checkpoint" in message
        assert "params/a/kernel is only in the checkpoint" in message
        assert "ema/params/a/kernel is not in the checkpoint" in message
        with pytest.raises(UserError, match="has no ema"):
            checkpoints.restore_variables(1, "ema")


def test_arrays_without_elements(tmp_path):
    state = small_state()
    empty = jax.device_put(np.zeros((0, 3), np.float32), state.step.sharding)
    state = state.replace(params={**state.params, "none": empty})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, {})
        checkpoints.wait()
        assert checkpoints.restore(1, abstract(state)).params["none"].shape == (0, 3)


def test_leftovers_of_a_killed_save_go_away(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
    folder = tmp_path / "checkpoints"
    for name in ("2.unverified", "3.unverified.orbax-checkpoint-tmp", "4.deleting"):
        shutil.copytree(folder / "1", folder / name)
    assert Checkpoints(tmp_path, read_only=True).steps() == [1]
    assert (folder / "2.unverified").exists()
    assert Checkpoints(tmp_path).latest_intact() == 1
    assert [path.name for path in folder.iterdir()] == ["1"]


def test_failed_save_leaves_the_earlier_ones(tmp_path):
    """A file-size limit stands for the full disk: what writes gets an error in the middle."""
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        big = small_state().replace(params={"a": jax.random.normal(jax.random.key(0), (400, 1000))})
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            checkpoints.save(2, big, {}, {})
            with pytest.raises(UserError, match=r"Saving step 2 .* failed: .*; the checkpoints of steps 1 are intact"):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
        save(checkpoints, 3)  # room again: the failure is not remembered
        assert Checkpoints(tmp_path).latest_intact() == 3


def test_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write in workdir"):
        Checkpoints(tmp_path / "file")
    with pytest.raises(UserError, match="is no local path"):
        Checkpoints("gs://bucket/run")
    with Checkpoints(tmp_path / "run") as checkpoints:
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(UserError, match="Saving step 1 .* the folder is gone"):
            save(checkpoints, 1)


def test_unreadable_best_file_is_a_warning(tmp_path, caplog):
    (tmp_path / "best.json").write_text("{")
    with Checkpoints(tmp_path, best="val/mIoU") as checkpoints, caplog.at_level(logging.WARNING):
        assert checkpoints.scores.latest() is None
        assert "best.json" in caplog.text
        checkpoints.scores.record(1, {"val/mIoU": 0.5})
    assert json.loads((tmp_path / "best.json").read_text())[-1]["step"] == 1
