"""An experiment small enough to train in a second, and a program that trains it: what is killed and resumed in tests.

python tiny_experiment.py WORKDIR field=value ...      fields of the config, or of `tiny_experiment`
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jax_densevit.configuration import default_config
from jax_densevit.data.augment import augment
from jax_densevit.data.pipeline import train_stream
from jax_densevit.data.source import DataInfo
from jax_densevit.errors import UserError
from jax_densevit.hosts import together
from jax_densevit.models.output import DenseOutput
from jax_densevit.tasks.segmentation import SegmentationTask
from jax_densevit.training.checkpoint import Checkpoints
from jax_densevit.training.mesh import make_mesh
from jax_densevit.training.optimizer import make_optimizer
from jax_densevit.training.paths import named_leaves
from jax_densevit.training.trainer import train

INFO = DataInfo("bars", classes=("dark", "bright"), palette=((0, 0, 0), (255, 255, 255)))


class TinyNet(nn.Module):
    """Per-pixel, with everything that has state or randomness: batch norm and dropout."""

    width: int = 8

    @nn.compact
    def __call__(self, images, train=False):
        # No bias before batch norm: its gradient would be rounding noise, which Adam blows up to whole steps.
        x = nn.Dense(self.width, use_bias=False, name="stem")(images)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
        return DenseOutput(nn.Dense(2, name="head")(x), covers=images.shape[1:3])


class Bars:
    """Noisy pictures, bright or dark by the half; a pure function of the index. `slow` seconds a read.

    The one with the index `bad` cannot be read; the first read of all takes `late` seconds, as from a cold cache.
    """

    info = INFO

    def __init__(self, length=24, slow=0.0, bad=None, late=0.0):
        self.length, self.slow, self.bad, self.late = length, slow, bad, late

    def __len__(self):
        return self.length

    def size(self, index):
        return (8, 8)

    def read(self, index):
        late, self.late = self.late, 0.0
        time.sleep(self.slow + late)
        if index == self.bad:
            raise UserError(f"bar {index} cannot be read.")
        rng = np.random.default_rng(index)
        labels = np.zeros((8, 8), np.uint8)
        labels[:, rng.integers(1, 8) :] = 1
        image = np.clip(labels[..., None] * 90 + rng.integers(0, 140, (8, 8, 3)), 0, 255).astype(np.uint8)
        return {"image": image, "labels": labels, "id": f"bar {index}"}


class PoisonedTask:
    """A task whose loss is not finite for one example; for each, when its index is negative."""

    def __init__(self, task, index):
        self._task, self._index = task, index

    def __getattr__(self, name):
        return getattr(self._task, name)

    def loss(self, output, batch):
        terms = self._task.loss(output, batch)
        poison = jax.numpy.where(((batch["index"] == self._index) | (self._index < 0)).any(), jax.numpy.nan, 0.0)
        return {name: term.replace(sum=term.sum + poison) for name, term in terms.items()}


@dataclasses.dataclass(frozen=True)
class TinyEvaluator:
    name: str
    source: Any
    task: Any
    every: int = 0
    batch_size: int = 4
    limit: int = 0
    sheet: int = 2


@dataclasses.dataclass
class TinyExperiment:
    """The attributes that the trainer asks of an experiment."""

    config: Any
    source: Any
    model: Any
    task: Any
    mesh: Any
    steps: int
    evaluators: tuple
    augment: Any
    info: DataInfo = INFO

    def make_optimizer(self, params):
        return make_optimizer(self.config.optimizer, params, self.steps)

    def train_stream(self, start_step):
        return train_stream(
            self.source,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            on_bad=self.config.data.on_bad,
            threads=2,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            feeder="threads",
        )

    def macs(self):
        return 8 * 8 * (3 * 8 + 8 * 2)

    def meta(self):
        return {"config": self.config.to_dict(), "info": self.info.to_json(), "versions": {"jax": jax.__version__}}


def tiny_experiment(
    *,
    steps=12,
    save_every=4,
    eval_every=6,
    log_every=3,
    devices=1,
    slow=0.0,
    evaluate=True,
    bad=None,
    late=0.0,
    length=24,
    **changes,
):
    """Builds one. `changes` are fields of the config by path, e.g. `{"optimizer.learning_rate": 1.0}`."""
    config = default_config()
    config.update({"steps": steps, "batch_size": 8, "ema": 0.9, "seed": 3})
    config.optimizer.update({"name": "adamw", "learning_rate": 0.02})
    config.checkpoint.update({"every": save_every, "keep": 2, "best": "val/mIoU"})
    config.log.every = log_every
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    source, task = Bars(length, slow, bad, late), SegmentationTask(INFO)
    evaluators = (TinyEvaluator("val", Bars(7), task, every=eval_every), TinyEvaluator("test", Bars(5), task, sheet=0))
    return TinyExperiment(
        config=config,
        source=source,
        model=TinyNet(),
        task=task,
        mesh=make_mesh(devices=jax.devices()[:devices] if jax.process_count() == 1 else None),
        steps=steps,
        evaluators=evaluators if evaluate else (),
        augment=lambda batch: augment(batch, flip=0.5, vertical_flip=0.0, rotate90=False, photometric=False),
    )


def lines(workdir, name="metrics.jsonl"):
    """The records of a log of a run."""
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def arrays(workdir, step):
    """Every array of a checkpoint, as bytes."""
    checkpoints = Checkpoints(workdir, read_only=True)
    found = {}
    for which in ("params", "ema"):
        found |= {
            f"{which}/{k}": v.tobytes() for k, v in named_leaves(checkpoints.restore_variables(step, which)).items()
        }
    return found


def main(argv):
    """Trains; leaves with the trainer's exit code, or 1 and the sentence of a `UserError`.

    Several processes: `coordinator="HOST:PORT"`, `processes=N`, `process=I`; a dead one is missed after `heartbeat` s.
    """
    workdir, *changes = argv
    options = {name: json.loads(value) for name, _, value in (change.partition("=") for change in changes)}
    jax.distributed.initialize = functools.partial(
        jax.distributed.initialize, heartbeat_timeout_seconds=options.pop("heartbeat", 100)
    )
    who = [options.pop(name, None) for name in ("coordinator", "processes", "process")]
    names = ("coordinator", "num_processes", "process_id")
    flags = argparse.Namespace(distributed=False, **dict(zip(names, who, strict=True)))
    try:
        with together(flags):
            return train(tiny_experiment(**options), workdir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
