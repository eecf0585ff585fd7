import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import TinyModel, TinyTask, Training, assert_trees_close, tiny_batch, tiny_config

from jax_densevit.errors import UserError
from jax_densevit.tasks.task import LossTerm
from jax_densevit.training.mesh import make_mesh, put_batch
from jax_densevit.training.paths import named_leaves
from jax_densevit.training.sharding import size_in_bytes
from jax_densevit.training.step import moving_average, stream_key


def values(tree):
    return jax.tree.map(np.asarray, tree)


def test_numbers_and_update_equal_plain_jax():
    training = Training(config=tiny_config(momentum=0.0, clip_norm=0.05))
    params, batch = values(training.state.params), training.batch

    def loss(params):
        terms = training.task.loss(training.model.apply({"params": params}, *training.task.inputs(batch)), batch)
        means = {name: term.sum / term.weight for name, term in terms.items()}
        return means["entropy"] + 0.4 * means["size"], means

    (expected, means), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(gradient)))
    numbers = training.run()
    assert set(numbers) == {
        "loss", "loss/entropy", "loss/size", "grad_norm", "param_norm", "lr", "finite"
    }  # fmt: skip
    assert numbers["finite"] is True
    assert numbers["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert numbers["loss/entropy"] == pytest.approx(float(means["entropy"]), rel=1e-6)
    assert numbers["loss/size"] == pytest.approx(float(means["size"]), rel=1e-6)
    assert numbers["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 0.05
    assert numbers["lr"] == pytest.approx(0.1)
    total = sum(np.sum(np.asarray(p, np.float64) ** 2) for p in jax.tree.leaves(params))
    assert numbers["param_norm"] == pytest.approx(np.sqrt(total), rel=1e-5)
    updated = jax.tree.map(lambda p, g: p - 0.1 * g * 0.05 / norm, params, gradient)
    assert_trees_close(training.state.params, updated, 1e-6)
    assert int(training.state.step) == 1


@pytest.mark.parametrize("accumulate", [4, 16])
def test_accumulation_with_uneven_masks_changes_nothing(accumulate):
    whole, parts = Training(), Training(accumulate=accumulate)
    for _ in range(3):
        first, second = whole.run(), parts.run()
        assert_trees_close(list(first.values()), [second[name] for name in first], 1e-6)
    assert_trees_close(whole.state.params, parts.state.params, 1e-6)
    assert_trees_close(whole.state.optimizer, parts.state.optimizer, 1e-6)


def test_accumulation_runs_the_model_once_per_microbatch():
    """The totals of the weights must not cost a forward pass; XLA counts the body of a scan once."""

    def flops(**options):
        training = Training(model=TinyModel(width=256), **options)
        return training.step.lower(training.abstract, training.shapes).compile().cost_analysis()["flops"]

    assert flops(accumulate=4) * 4 == pytest.approx(flops(), rel=0.1)


def test_accumulation_moves_no_rows_between_devices():
    training = Training(mesh=make_mesh(), accumulate=2)
    text = training.step.lower(training.abstract, training.shapes).compile().as_text()
    assert "all-reduce" in text
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert f" {collective}(" not in text


MESHES = {
    "data": ({}, ()),
    "fsdp": ({"data": 1, "fsdp": 8}, ()),
    "data_fsdp": ({"data": 2, "fsdp": 4}, ()),
    "fsdp_tensor": (
        {"data": 2, "fsdp": 2, "tensor": 2},
        (("body/kernel", (None, "tensor")), ("body/bias", ("tensor",)), ("head/kernel", ("tensor", None))),
    ),
}


@pytest.mark.parametrize("name, accumulate", [("data", 1), ("fsdp", 1), ("data_fsdp", 2), ("fsdp_tensor", 2)])
def test_eight_devices_equal_one(name, accumulate):
    sizes, rules = MESHES[name]
    # (Not Adam: what batch norm cancels has gradients of pure rounding noise, which Adam scales up to full steps.)
    options = {
        "model": TinyModel(norm=True),
        "config": tiny_config(clip_norm=0.2),
        "ema": 0.9,
        "accumulate": accumulate,
    }
    one = Training(**options)
    eight = Training(**options, mesh=make_mesh(**sizes), rules=rules, minimum_bytes=0)
    assert_trees_close(one.state, eight.state, 0)  # initial values depend on the seed alone
    for _ in range(2):
        first, second = one.run(), eight.run()
        assert_trees_close(list(first.values()), [second[key] for key in first], 1e-5)
    assert_trees_close(one.state, eight.state, 1e-5)
    # Nothing has moved away from where it belongs.
    for leaf, sharding in zip(jax.tree.leaves(eight.state), jax.tree.leaves(eight.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fsdp_gathers_parameters_and_never_activations(accumulate):
    training = Training(
        model=TinyModel(width=64, norm=True), mesh=make_mesh(data=1, fsdp=8), minimum_bytes=0, accumulate=accumulate
    )
    text = training.step.lower(training.abstract, training.shapes).compile().as_text()
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text)
    shapes = {",".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(training.abstract.params)}
    assert "64,64" in gathered and set(gathered) <= shapes
    assert " all-to-all(" not in text and " collective-permute(" not in text


@pytest.mark.parametrize("fsdp", [2, 8])
def test_bytes_per_device_fall_with_the_fsdp_axis(fsdp):
    """Of the large tensors every device holds 1/N, measured on the arrays."""
    training = Training(
        model=TinyModel(width=128), config=tiny_config(name="adamw"), ema=0.9,
        mesh=make_mesh(data=-1, fsdp=fsdp), minimum_bytes=4 * 128 * 128,
    )  # fmt: skip
    training.run()
    large = [leaf for leaf in jax.tree.leaves(training.state) if leaf.shape == (128, 128)]
    assert len(large) == 4  # parameter, average and two moments
    held = {device: 0 for device in training.mesh.devices.flat}
    for leaf in large:
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {sum(size_in_bytes(leaf) for leaf in large) // fsdp}


def test_running_statistics_are_those_of_the_whole_batch_and_follow_the_microbatches():
    model, task, batch = TinyModel(norm=True), TinyTask(), tiny_batch()
    training = Training(model=model, batch=batch, mesh=make_mesh(), config=tiny_config(learning_rate=0.0))
    kernel = np.asarray(training.state.params["stem"]["kernel"], np.float64)
    before = np.asarray(task.inputs(batch)[0], np.float64) @ kernel
    training.run()
    np.testing.assert_allclose(
        training.state.statistics["norm"]["mean"], 0.1 * before.mean((0, 1, 2)), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
        training.state.statistics["norm"]["var"], 0.9 + 0.1 * before.var((0, 1, 2)), rtol=1e-4, atol=1e-6
    )
    parts = Training(model=model, batch=batch, accumulate=4, config=tiny_config(learning_rate=0.0))
    parts.run()
    mean = 0
    for number in range(4):
        mean = 0.9 * mean + 0.1 * before[number::4].mean((0, 1, 2))
    np.testing.assert_allclose(parts.state.statistics["norm"]["mean"], mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_batch_without_labels_has_no_gradient(accumulate):
    class Labelled(TinyTask):
        def loss(self, output, batch):
            return {"entropy": super().loss(output, batch)["entropy"]}

    batch = tiny_batch()
    batch["labels"][:] = 255
    training = Training(task=Labelled(), accumulate=accumulate)
    before = values(training.state.params)
    numbers = training.run(batch=batch)
    assert numbers["loss"] == numbers["grad_norm"] == 0.0 and numbers["finite"]
    jax.tree.map(np.testing.assert_array_equal, values(training.state.params), before)
    assert training.run()["grad_norm"] > 0


def test_microbatches_without_labels_count_nothing():
    batch = tiny_batch(ignored=False)
    batch["labels"][1::2] = 255
    whole, parts = Training(batch=batch), Training(batch=batch, accumulate=2)
    assert parts.run()["loss"] == pytest.approx(whole.run()["loss"], rel=1e-6)
    assert_trees_close(whole.state.params, parts.state.params, 1e-6)


@dataclasses.dataclass
class Breaking(TinyTask):
    """A loss or a gradient that is not finite wherever a batch has the label 7."""

    what: str

    def loss(self, output, batch):
        broken = jnp.any(batch["labels"] == 7)
        terms = super().loss(output, {**batch, "labels": jnp.where(batch["labels"] == 7, 0, batch["labels"])})
        if self.what == "loss":
            extra = jnp.where(broken, jnp.nan, 0.0)
        else:  # finite value, infinite slope
            extra = jnp.sqrt(jnp.where(broken, jnp.sum(output[0] ** 2) * 0, 1.0))
        return {**terms, "extra": LossTerm(extra, jnp.float32(1))}


@pytest.mark.parametrize("what, accumulate", [("loss", 1), ("gradient", 1), ("gradient", 2)])
def test_a_step_that_is_not_finite_changes_nothing_but_counters(what, accumulate):
    training = Training(
        model=TinyModel(norm=True),
        task=Breaking(what),
        config=tiny_config(name="adamw"),
        ema=0.9,
        accumulate=accumulate,
    )
    training.run(2)
    good = values(training.state)
    broken = tiny_batch()
    broken["labels"][0, 0, 0] = 7
    numbers = training.run(batch=broken)
    assert numbers["finite"] is False
    assert np.isfinite(numbers["loss"]) == (what == "gradient")
    after = values(training.state)
    differ = {name for name, leaf in named_leaves(after).items() if (leaf != named_leaves(good)[name]).any()}
    assert differ == {"step", "optimizer/1/count"} and after.step == after.optimizer[1].count == 3
    numbers = training.run()
    assert numbers["finite"] is True and int(training.state.step) == 4


def test_average_equals_a_loop_and_starts_at_the_parameters():
    training = Training(model=TinyModel(norm=True), ema=0.9)

    def averaged():
        return values({"params": training.state.params, "statistics": training.state.statistics})

    average = averaged()
    assert jax.tree.leaves(average["statistics"])  # batch norm's, which belong to the average as much as the parameters
    jax.tree.map(np.testing.assert_array_equal, values(training.state.ema), average)
    for _ in range(5):
        training.run()
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, averaged())
    assert_trees_close(training.state.ema, average, 1e-6)


@pytest.mark.reference
def test_reference_average(reference_data):
    with np.load(reference_data / "goldens/coltran/optim.npz") as file:
        deltas, trace = file["ema/deltas"], file["ema/trace"]
    average, params = {"w": trace[0]}, {"w": trace[0]}
    for delta, expected in zip(deltas, trace[1:], strict=True):
        params = {"w": params["w"] + delta}
        average = moving_average(average, params, 0.999)
        np.testing.assert_allclose(average["w"], expected, rtol=3e-6, atol=1e-8)


def test_computing_in_bfloat16_keeps_float32_parameters():
    training = Training(model=TinyModel(norm=True, dtype=jnp.bfloat16), ema=0.9, config=tiny_config(name="adamw"))
    exact = Training(model=TinyModel(norm=True), ema=0.9, config=tiny_config(name="adamw"))
    numbers = training.run(2)
    assert {leaf.dtype for leaf in jax.tree.leaves(training.state)} == {jnp.dtype("float32"), jnp.dtype("int32")}
    assert numbers["finite"] and numbers["loss"] == pytest.approx(exact.run(2)["loss"], abs=0.02)
    assert "bf16" in training.step.lower(training.abstract, training.shapes).as_text()


def test_nothing_is_transferred_behind_the_users_back():
    with jax.transfer_guard("disallow"):
        training = Training(mesh=make_mesh(fsdp=2), minimum_bytes=0, ema=0.9, accumulate=2)
        batch = put_batch(training.batch, training.mesh)
        for _ in range(2):
            training.state, numbers = training.step(training.state, batch)
        numbers = jax.device_get(numbers)
    assert numbers["finite"]


def test_the_state_is_donated():
    training = Training(config=tiny_config(name="adamw"), ema=0.9)
    before = training.state
    training.run()
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))


def test_dropout_is_a_function_of_seed_step_and_microbatch():
    def losses(seed, **options):
        training = Training(model=TinyModel(dropout=0.5), config=tiny_config(learning_rate=0.0), seed=seed, **options)
        return [training.run()["loss"] for _ in range(3)]

    first = losses(0)
    assert len(set(first)) == 3  # another mask at every step
    assert losses(0, mesh=make_mesh()) == pytest.approx(first, rel=1e-5)
    assert losses(1) != pytest.approx(first, rel=1e-5)
    keys = [stream_key(seed, stream, step) for seed in (0, 1) for stream in ("a", "b") for step in (0, 1)]
    keys = {jax.random.key_data(key).tobytes() for key in keys}
    assert len(keys) == 8


def test_augmentation_runs_on_the_batch_before_anything_else():
    def invert(batch):
        return {**batch, "image": 255 - batch["image"]}

    plain = Training()
    inverted = Training(batch={**plain.batch, "image": 255 - plain.batch["image"]}, augment=invert, accumulate=2)
    assert inverted.run()["loss"] == pytest.approx(plain.run()["loss"], rel=1e-6)


def test_frozen_parameters_have_no_gradient():
    config = tiny_config(name="adamw", weight_decay=0.1, multipliers=(("stem|body", 0),))
    frozen, wasteful = Training(config=config), Training(config=config, freeze=False)
    before = values(frozen.state.params)
    numbers, more = frozen.run(), wasteful.run()
    assert numbers["grad_norm"] < more["grad_norm"]
    jax.tree.map(np.testing.assert_array_equal, values(frozen.state.params["stem"]), before["stem"])
    jax.tree.map(np.testing.assert_array_equal, values(frozen.state.params["body"]), before["body"])
    assert_trees_close(frozen.state.params, wasteful.state.params, 1e-6)
    assert np.any(np.asarray(frozen.state.params["head"]["kernel"]) != before["head"]["kernel"])


def test_a_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(UserError, match="batch_size 16 cannot be divided into 4 microbatch.*multiple of 32"):
        Training(mesh=make_mesh(), accumulate=4).run()
