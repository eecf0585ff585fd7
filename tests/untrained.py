"""Workdirs of models that nobody trained."""

import jax
import numpy as np

from jax_densevit.experiment import build
from jax_densevit.training.checkpoint import Checkpoints
from jax_densevit.training.state import TrainState, initial_variables


def save_untrained(config, folder):
    """A checkpoint of a config's last step with parameters at their initial values, their average twice that."""
    experiment = build(config)
    batch = {"image": np.zeros((1, 32, 32, 3), np.uint8)}
    params, statistics = initial_variables(experiment.model, experiment.task, batch, jax.random.key(0))
    ema = {"params": jax.tree.map(lambda x: x * 2, params), "statistics": statistics}
    with Checkpoints(folder) as checkpoints:
        state = TrainState(np.int32(config.steps), params, statistics, ema, {"count": np.zeros((), np.int32)})
        checkpoints.save(config.steps, state, {}, experiment.meta())
    return folder
