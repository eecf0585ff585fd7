"""The step with the real models: eight devices are one."""

import jax
import numpy as np
import pytest
from tiny_training import Training, assert_trees_close, tiny_config

from jax_densevit.data.source import DataInfo
from jax_densevit.models import create_model
from jax_densevit.tasks.segmentation import SegmentationTask
from jax_densevit.training.mesh import make_mesh

TASK = SegmentationTask(DataInfo("tiny", classes=("a", "b", "c")), denominator="valid")


MODELS = {
    # One of each kind of mesh axis; layers in one scanned segment, rematerialised.
    "setr": (
        lambda: create_model(
            "setr_naive",
            "Ti/16",
            num_classes=3,
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            mlp_size=64,
            patch_size=4,
            image_size=16,
            head_channels=8,
            taps=(2, 2, 2, 2),
            auxiliary=False,
            scan=True,
            remat="full",
        ),
        {"data": 2, "fsdp": 2, "tensor": 2},
        (
            ("mlp/fc1/kernel", (None, None, "tensor")),
            ("mlp/fc1/bias", (None, "tensor")),
            ("mlp/fc2/kernel", (None, "tensor")),
            ("attention/qkv/kernel", (None, None, None, "tensor")),
            ("attention/out/kernel", (None, "tensor")),
        ),
    ),
    "unet": (lambda: create_model("unet", "16", base=4, num_classes=3), {}, ()),
}


def batch(size=8, side=16):
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 3, (size, side, side)).astype(np.uint8)
    labels[rng.random(labels.shape) < np.linspace(0, 0.9, size)[:, None, None]] = 255
    return {"image": rng.integers(0, 256, (size, side, side, 3)).astype(np.uint8), "labels": labels}


@pytest.mark.parametrize("name", MODELS)
def test_eight_devices_equal_one(name):
    build, sizes, rules = MODELS[name]
    options = {"task": TASK, "batch": batch(), "config": tiny_config(learning_rate=0.01, clip_norm=1.0)}
    one = Training(model=build(), **options)
    eight = Training(model=build(), mesh=make_mesh(**sizes), rules=rules, minimum_bytes=0, **options)
    assert_trees_close(one.state.params, eight.state.params, 0)
    for _ in range(2):
        first, second = one.run(), eight.run()
        assert first["finite"] and first["grad_norm"] > 0
        assert_trees_close(list(first.values()), [second[key] for key in first], 1e-5)
    assert_trees_close(one.state.params, eight.state.params, 1e-5)
    assert jax.tree.leaves(one.state.statistics)  # both have batch norm: its statistics are those of the whole batch
    assert_trees_close(one.state.statistics, eight.state.statistics, 1e-5)
