"""Inception-v3 of 2015-12-05, the network of the Fréchet Inception distance (Szegedy et al. 2015,
https://arxiv.org/abs/1512.00567; Heusel et al. 2017, https://arxiv.org/abs/1706.08500).

It differs from the Inception-v3 of later collections: 1008 classes, no auxiliary classifier, averages that leave out
the border's zeros, and a maximum where the last block should average. The last is believed a slip of the published
graph; every FID ever reported has it. 23,850,960 parameters. The blocks are written down once, as data, for the model,
its count of operations and the table of published names.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError
from jax_densevit.layers.convolution import ConvNorm, classifier
from jax_densevit.models.output import ClassOutput
from jax_densevit.models.registry import register_model

SMALLEST = 75  # pixels of a side, for the last block to have something to look at
_WIDTH = 2048  # of the features


@dataclasses.dataclass(frozen=True)
class Unit:
    """A convolution, batch norm (epsilon 0.001) and ReLU; the name is the published one within its block."""

    name: str
    features: int
    kernel_size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


# A branch is a chain of units and pools; a tuple of units in it is a fork whose ends are put side by side.
AVERAGE, MAXIMUM, HALVE = "average", "maximum", "halve"  # 3x3: keeping the size, the same, with stride 2 and no border
_3X3, _5X5, _ROW, _COLUMN = (3, 3), (5, 5), (1, 7), (7, 1)


def _block_a(pool: int) -> tuple:
    return (
        (Unit("branch1x1", 64),),
        (Unit("branch5x5_1", 48), Unit("branch5x5_2", 64, _5X5)),
        (Unit("branch3x3dbl_1", 64), Unit("branch3x3dbl_2", 96, _3X3), Unit("branch3x3dbl_3", 96, _3X3)),
        (AVERAGE, Unit("branch_pool", pool)),
    )


def _block_b() -> tuple:
    double = (Unit("branch3x3dbl_1", 64), Unit("branch3x3dbl_2", 96, _3X3))
    return (
        (Unit("branch3x3", 384, _3X3, 2, "VALID"),),
        (*double, Unit("branch3x3dbl_3", 96, _3X3, 2, "VALID")),
        (HALVE,),
    )


def _block_c(inner: int) -> tuple:
    kernels = (_COLUMN, _ROW, _COLUMN, _ROW)
    double = [Unit(f"branch7x7dbl_{i + 2}", inner if i < 3 else 192, kernel) for i, kernel in enumerate(kernels)]
    return (
        (Unit("branch1x1", 192),),
        (Unit("branch7x7_1", inner), Unit("branch7x7_2", inner, _ROW), Unit("branch7x7_3", 192, _COLUMN)),
        (Unit("branch7x7dbl_1", inner), *double),
        (AVERAGE, Unit("branch_pool", 192)),
    )


def _block_d() -> tuple:
    seven = (Unit("branch7x7x3_1", 192), Unit("branch7x7x3_2", 192, _ROW), Unit("branch7x7x3_3", 192, _COLUMN))
    return (
        (Unit("branch3x3_1", 192), Unit("branch3x3_2", 320, _3X3, 2, "VALID")),
        (*seven, Unit("branch7x7x3_4", 192, _3X3, 2, "VALID")),
        (HALVE,),
    )


def _block_e(pool: str) -> tuple:
    def fork(name: str) -> tuple:
        return Unit(f"{name}a", 384, (1, 3)), Unit(f"{name}b", 384, (3, 1))

    return (
        (Unit("branch1x1", 320),),
        (Unit("branch3x3_1", 384), fork("branch3x3_2")),
        (Unit("branch3x3dbl_1", 448), Unit("branch3x3dbl_2", 384, _3X3), fork("branch3x3dbl_3")),
        (pool, Unit("branch_pool", 192)),
    )


# (name of the block, the published one but for the stem, which has none; branches; name of the result as a feature)
BLOCKS: tuple[tuple[str, tuple, str], ...] = (
    (
        "stem_0",
        (
            (
                Unit("Conv2d_1a_3x3", 32, _3X3, 2, "VALID"),
                Unit("Conv2d_2a_3x3", 32, _3X3, 1, "VALID"),
                Unit("Conv2d_2b_3x3", 64, _3X3),
                HALVE,
            ),
        ),
        "maps_64",
    ),
    ("stem_1", ((Unit("Conv2d_3b_1x1", 80), Unit("Conv2d_4a_3x3", 192, _3X3, 1, "VALID"), HALVE),), "maps_192"),
    ("Mixed_5b", _block_a(32), ""),
    ("Mixed_5c", _block_a(64), ""),
    ("Mixed_5d", _block_a(64), ""),
    ("Mixed_6a", _block_b(), ""),
    ("Mixed_6b", _block_c(128), ""),
    ("Mixed_6c", _block_c(160), ""),
    ("Mixed_6d", _block_c(160), ""),
    ("Mixed_6e", _block_c(192), "maps_768"),
    ("Mixed_7a", _block_d(), ""),
    ("Mixed_7b", _block_e(AVERAGE), ""),
    ("Mixed_7c", _block_e(MAXIMUM), ""),
)


def unit_names() -> dict[str, str]:
    """Published name -> our path of all 94 units: `Mixed_5b.branch1x1`, `Mixed_5b/branch1x1`."""
    names = {}
    for block, branches, _ in BLOCKS:
        steps = [step for branch in branches for step in branch]
        for unit in [unit for step in steps for unit in (step if isinstance(step, tuple) else (step,))]:
            if isinstance(unit, Unit):
                published = unit.name if block.startswith("stem") else f"{block}.{unit.name}"
                names[published] = f"{block}/{unit.name}"
    return names


def inception_macs(model: "Inception", size: tuple[int, int]) -> int:
    """Multiply-accumulates of one image of (height, width), borders counted in full."""
    total, state = 0, (*size, 3)

    def after(state: tuple[int, int, int], step: Any) -> tuple[int, int, int]:
        nonlocal total
        height, width, channels = state
        if isinstance(step, tuple):
            ends = [after(state, unit) for unit in step]
            return (*ends[0][:2], sum(end[2] for end in ends))
        if step in (AVERAGE, MAXIMUM):
            return state
        unit = Unit("", 0, _3X3, 2, "VALID") if step == HALVE else step
        rows, columns = unit.kernel_size
        if unit.padding == "VALID":
            height, width = (height - rows) // unit.stride + 1, (width - columns) // unit.stride + 1
        if step == HALVE:
            return height, width, channels
        features = unit.features // model.divide
        total += height * width * rows * columns * channels * features
        return height, width, features

    for _, branches, _ in BLOCKS:
        ends = []
        for branch in branches:
            end = state
            for step in branch:
                end = after(end, step)
            ends.append(end)
        state = (*ends[0][:2], sum(end[2] for end in ends))
    return total + state[2] * model.num_classes


class _Block(nn.Module):
    """Branches of `BLOCKS` side by side along the channels."""

    branches: tuple
    divide: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        ends = []
        for branch in self.branches:
            end = x
            for step in branch:
                units = step if isinstance(step, tuple) else (step,)
                end = jnp.concatenate([self._step(end, unit, train) for unit in units], -1)
            ends.append(end)
        return jnp.concatenate(ends, -1)

    def _step(self, x: jax.Array, step: Any, train: bool) -> jax.Array:
        if step == AVERAGE:
            return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
        if step == MAXIMUM:
            return nn.max_pool(x, (3, 3), (1, 1), "SAME")
        if step == HALVE:
            return nn.max_pool(x, (3, 3), (2, 2), "VALID")
        return ConvNorm(
            step.features // self.divide,
            step.kernel_size,
            dtype=self.dtype,
            stride=step.stride,
            padding=step.padding,
            epsilon=1e-3,
            name=step.name,
        )(x, train=train)


@register_model(
    "inception_fid",
    variants={"2015-12-05": {}},
    default_variant="2015-12-05",
    macs=inception_macs,
    image_size=(299, 299),
    num_classes=1008,
)
class Inception(nn.Module):
    """The network of the Fréchet Inception distance; see the head of this file.

    Parameters: `stem_<0|1>/<unit>` and `Mixed_<5b..7c>/<unit>`, each unit a `ConvNorm`; `classifier/{kernel,bias}`.

    Attributes:
      num_classes: K.
      divide: all widths are divided by it: for tests, and for a network that is quick to train.
      dtype: type of the computation; parameters and statistics are float32. FID is defined in float32.
    """

    num_classes: int = 1008
    divide: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> ClassOutput:
        """`[B, H, W, 3]` images in [-1, 1], 299 x 299 for FID and at least 75 x 75 -> logits `[B, K]`.

        `features`: "pool" `[B, 2048]` float32, which FID compares; "maps_64", "maps_192" and "maps_768", the maps after
        the first and second maximum and before the last halving.

        Raises:
          UserError: an image smaller than 75 x 75.
        """
        if min(images.shape[1:3]) < SMALLEST:
            size = "{} x {}".format(*images.shape[1:3])
            raise UserError(f"Inception-v3 needs images of at least {SMALLEST} x {SMALLEST} pixels, not {size}.")
        x, features = images.astype(self.dtype), {}
        for name, branches, feature in BLOCKS:
            x = _Block(branches, self.divide, self.dtype, name=name)(x, train)
            if feature:
                features[feature] = x
        features["pool"] = x.mean((1, 2), dtype=jnp.float32)
        logits = classifier(self.num_classes, _WIDTH // self.divide, self.dtype, name="classifier")(features["pool"])
        return ClassOutput(logits=logits, features=features)
