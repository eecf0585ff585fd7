"""What a table of names is made of, and the rows that several tables share."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jax_densevit.data.source import IMAGENET_MEAN, IMAGENET_STD
from jax_densevit.pretrained.tables import layouts
from jax_densevit.pretrained.tables.layouts import Layout

Tensors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Row:
    """One array of ours and what it is called there.

    `{i}` and the like stand for numbers, the same on both sides.

    Attributes:
      theirs: names there, several where ours is made of several.
      ours: our path, folders joined by slashes.
      layout: the maps between their arrays and ours.
      absent: the value of an array that some files leave out; None where it must be there.
    """

    theirs: str | tuple[str, ...]
    ours: str
    layout: Layout = layouts.SAME
    absent: float | None = None

    def match(self, path: str) -> tuple[str, ...] | None:
        """Their names of our array `path`; None when the row is about others."""
        match = _compiled(self.ours).fullmatch(path)
        if match is None:
            return None
        names = (self.theirs,) if isinstance(self.theirs, str) else self.theirs
        return tuple(name.format(**match.groupdict()) for name in names)


@functools.cache
def _compiled(template: str) -> re.Pattern:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(template)))


@dataclasses.dataclass(frozen=True)
class Source:
    """A published system's files.

    Attributes:
      rows: the table for a model of ours; rows about arrays that the model lacks do no harm.
      models: the classes of ours that the source is for.
      pos_rule: how the system resizes position tables, a name of `layers.embedding.POSITION_RULES`.
      unused: regular expressions of their names that have no meaning here: buffers, and layers that the published
        modules own but never call.
      prepare: brings a file's names into the table's form; may fold arrays. Gets the tensors and the model.
      normalisation: (mean, std) per channel of images in [0, 1] that the published models were trained with, where the
        system has one; None where its input is no normalised picture.
    """

    rows: Callable[[Any], Sequence[Row]]
    models: tuple[type, ...]
    pos_rule: str = "setr"
    unused: tuple[str, ...] = ()
    prepare: Callable[[Tensors, Any], Tensors] = lambda tensors, model: tensors
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None


HALF = (0.5,) * 3, (0.5,) * 3
IMAGENET = IMAGENET_MEAN, IMAGENET_STD
UNIT = (0.0,) * 3, (1.0,) * 3


# What wraps a state dict in a file, and what a training state has beside it.
_WRAPPERS = ("state_dict.", "model_state_dict.", "model.", "module.")
_BESIDE = re.compile(
    r"(optim|lr_scheduler|scheduler|scaler|amp|criterion|args|config|meta|message_hub|mask_values|rng)"
)


def unwrap(tensors: Tensors, model: Any) -> Tensors:
    """Takes PyTorch's wrappers off the names: dicts around the state dict, `module.` of data-parallel training.

    What lies beside a wrapper stays, to be reported, unless it is an optimizer's or the like.
    """
    del model
    for _ in range(4):
        wrapper = next((w for w in _WRAPPERS if any(name.startswith(w) for name in tensors)), None)
        if wrapper is None:
            break
        inside = {name[len(wrapper) :]: array for name, array in tensors.items() if name.startswith(wrapper)}
        beside = {name: array for name, array in tensors.items() if not name.startswith(wrapper)}
        tensors = inside | {name: a for name, a in beside.items() if not _BESIDE.match(name) and name not in inside}
    return {name: array for name, array in tensors.items() if not name.startswith(("optimizer.", "mask_values"))}


def affine(theirs: str, ours: str, kernel: Layout = layouts.LINEAR, bias: Layout = layouts.SAME) -> list[Row]:
    """`weight` and `bias` of a linear layer or a convolution."""
    return [Row(f"{theirs}.weight", f"{ours}/kernel", kernel), Row(f"{theirs}.bias", f"{ours}/bias", bias)]


def norm(theirs: str, ours: str) -> list[Row]:
    """Scale and bias of a norm, and a batch norm's statistics."""
    pairs = (("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "var"))
    return [Row(f"{theirs}.{name}", f"{ours}/{leaf}") for name, leaf in pairs]


def conv_norm(conv: str, norm_name: str, ours: str, kernel: Layout = layouts.CONV) -> list[Row]:
    """A convolution with batch norm: our `ConvNorm`."""
    return [*affine(conv, f"{ours}/conv", kernel), *norm(norm_name, f"{ours}/norm")]


BATCH_COUNTER = r"num_batches_tracked$"
