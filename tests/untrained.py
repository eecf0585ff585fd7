"""Workdirs of models that nobody trained."""

import jax
import numpy as np

from jax_densevit.configuration import default_config, default_evaluator
from jax_densevit.experiment import build
from jax_densevit.training.checkpoint import Checkpoints
from jax_densevit.training.state import TrainState, initial_variables


def digit_unet(size, length, **evaluator):
    """A tiny U-Net for digit scenes, with an evaluator "val" of `length` scenes of this size: its config."""
    config, digits = default_config(), {"name": "digit_scenes", "digits": (1, 2), "scale": (10, 16)}
    config.model.update({"name": "unet", "base": 2})
    config.data.train.update({"split": "train", "length": 8, "size": (32, 32), **digits})
    config.update({"steps": 7, "batch_size": 8, "ema": 0.9})
    config.data.crop = (32, 32)
    config.eval.val = default_evaluator()
    config.eval.val.data.update({"split": "val", "length": length, "size": size, **digits})
    config.eval.val.update(evaluator)
    return config


def save_untrained(config, folder):
    """A checkpoint of a config's last step with random numbers for parameters, their average twice that."""
    experiment = build(config)
    batch = {"image": np.zeros((1, 32, 32, 3), np.uint8)}
    shapes = jax.eval_shape(lambda: initial_variables(experiment.model, experiment.task, batch, jax.random.key(0)))
    rng = np.random.default_rng(0)

    def draw(path, leaf):  # nothing is compiled for them
        values = rng.normal(0, 0.2, leaf.shape).astype(leaf.dtype)
        return 1 + np.abs(values) if path[-1].key in ("scale", "pool", "var") else values

    params, statistics = jax.tree_util.tree_map_with_path(draw, shapes)
    ema = {"params": jax.tree.map(lambda x: x * 2, params), "statistics": statistics}
    with Checkpoints(folder) as checkpoints:
        state = TrainState(np.int32(config.steps), params, statistics, ema, {"count": np.zeros((), np.int32)})
        checkpoints.save(config.steps, state, {}, experiment.meta())
    return folder
