"""A model and a task small enough to differentiate in a test, with everything that the training step must respect."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.tasks.task import LossTerm
from jax_densevit.training.mesh import batch_sharding, make_mesh, put_batch
from jax_densevit.training.optimizer import make_optimizer, trainable_parameters
from jax_densevit.training.state import abstract_parameters, abstract_state, init_state, state_shardings
from jax_densevit.training.step import make_train_step

SIZE, CLASSES = 4, 3


class TinyModel(nn.Module):
    """A per-pixel perceptron with optional batch norm, dropout and an auxiliary head."""

    width: int = 16
    norm: bool = False
    dropout: float = 0.0
    dtype: object = jnp.float32

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(self.width, dtype=self.dtype, name="stem")(images)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.gelu(x))
        x = nn.gelu(nn.Dense(self.width, dtype=self.dtype, name="body")(x))
        head = nn.Dense(CLASSES, dtype=self.dtype, name="head")(x).astype(jnp.float32)
        auxiliary = nn.Dense(CLASSES, dtype=self.dtype, name="auxiliary")(x).astype(jnp.float32)
        return head, auxiliary


class TinyTask:
    """Cross-entropy over the pixels that are not 255, and the squared logits of an auxiliary head over all pixels."""

    def inputs(self, batch):
        return (batch["image"].astype(jnp.float32) / 127.5 - 1,)

    def loss(self, output, batch):
        logits, auxiliary = output
        labels = batch["labels"].astype(jnp.int32)
        valid = labels != 255
        scores = jax.nn.log_softmax(logits)
        entropy = -jnp.take_along_axis(scores, jnp.where(valid, labels, 0)[..., None], axis=-1)[..., 0]
        return {
            "entropy": LossTerm(jnp.sum(entropy * valid), jnp.sum(valid, dtype=jnp.float32)),
            "size": LossTerm(jnp.sum(auxiliary**2), jnp.float32(auxiliary[..., 0].size), coefficient=0.4),
        }


def tiny_config(**changes):
    config = {
        "name": "sgd",
        "learning_rate": 0.1,
        "schedule": "constant",
        "warmup_steps": 0,
        "min_learning_rate": 0.0,
        "power": 0.9,
        "boundaries": (),
        "factors": (),
        "momentum": 0.9,
        "b1": 0.9,
        "b2": 0.999,
        "weight_decay": 0.0,
        "clip_norm": 0.0,
        "multipliers": (),
    }
    assert not set(changes) - set(config)
    return {**config, **changes}


def tiny_batch(size=16, seed=0, ignored=True):
    """Random pixels; the share of ignored labels differs from row to row."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, (size, SIZE, SIZE)).astype(np.uint8)
    if ignored:
        share = np.linspace(0, 0.95, size)[:, None, None]
        labels = np.where(rng.random(labels.shape) < share, 255, labels).astype(np.uint8)
    return {"image": rng.integers(0, 256, (size, SIZE, SIZE, 3)).astype(np.uint8), "labels": labels}


class Training:
    """A state and its compiled step on a mesh."""

    def __init__(self, *, model=None, task=None, batch=None, mesh=None, config=None, rules=(), minimum_bytes=None,
                 ema=0.0, steps=100, freeze=True, start=None, **options):  # fmt: skip
        self.mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
        self.model, self.task = model or TinyModel(), task or TinyTask()
        self.batch = tiny_batch() if batch is None else batch
        shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=batch_sharding(self.mesh))
                  for k, v in self.batch.items()}  # fmt: skip
        config = config or tiny_config()
        params = abstract_parameters(self.model, self.task, shapes)
        self.optimizer, self.schedule = make_optimizer(config, params, steps)
        self.abstract = abstract_state(self.model, self.task, self.optimizer, shapes, ema=bool(ema))
        self.shardings = state_shardings(self.abstract, self.mesh, rules, minimum_bytes)
        self.shapes = shapes
        if start is None:
            more = {"seed": 3, "ema": bool(ema)}
            self.state = init_state(self.model, self.task, self.optimizer, shapes, self.shardings, **more)
        else:
            self.state = start(self.abstract, self.shardings)
        self.step = make_train_step(
            self.model,
            self.task,
            self.optimizer,
            self.schedule,
            mesh=self.mesh,
            shardings=self.shardings,
            ema=ema,
            trainable=trainable_parameters(config["multipliers"], params) if freeze else None,
            **options,
        )

    def run(self, steps=1, batch=None):
        """Makes steps on one batch; returns the last numbers as Python floats."""
        for _ in range(steps):
            self.state, numbers = self.step(self.state, put_batch(self.batch if batch is None else batch, self.mesh))
        return {name: value.item() for name, value in numbers.items()}


def assert_trees_close(first, second, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance),
        first,
        second,
    )
