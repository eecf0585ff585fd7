"""The contract of a task: what is learned, decoded, measured and drawn. The trainer knows only this file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import flax.struct
import jax
import numpy as np
from PIL import Image

from jax_densevit.metrics.metric import Metric

# "image" uint8 [B,H,W,3], "labels" uint8 [B,H,W] where the source has some; in training on crops "size" int32 [B,2],
# the height and width that are not padding; in evaluation "mask" bool [B], and "size" as `decode` says.
Batch = dict[str, Any]


@flax.struct.dataclass
class LossTerm:
    """A loss as a sum and a weight, never a mean, so that parts add up exactly.

    The trainer minimises the sum over terms of `coefficient * sum / weight`, where `sum` and `weight` are totals over
    the whole global batch: microbatches, padding and hosts change nothing. `weight` must not depend on parameters.
    """

    sum: jax.Array
    weight: jax.Array
    coefficient: float = flax.struct.field(pytree_node=False, default=1.0)


class Task(Protocol):
    """Pure functions over batches. All arrays may be sharded over the batch axis.

    Attributes:
      num_outputs: output channels that a dense model needs for this task (its `num_classes`).
      percent: whether the numbers of :meth:`summary` are shares in [0, 1], shown to people in per cent.

    A task whose model does not see the whole training crop, or does less work in training than the model's count says,
    has one method more: `training_macs(count) -> int`, the multiply-accumulates of one training example, where
    `count((height, width))` is the model's own count. MFU follows from it.
    """

    num_outputs: int
    percent: bool

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        """The model's positional arguments from a batch: normalised float32 images, most often. Runs inside `jit`."""
        ...

    def loss(self, output: Any, batch: Batch) -> dict[str, LossTerm]:
        """Named loss terms of one (micro)batch from the model's output in training mode. Runs inside `jit`."""
        ...

    def decode(self, forward: Callable[..., Any], batch: Batch, *, full: bool = False) -> Batch:
        """Predictions for a batch of equal-sized images, keyed by name, e.g. `{"labels": int32 [B, H, W]}`. Arrays, or
        trees of them; in maps, rows and columns follow the batch axis.

        `forward(*inputs)` is the jitted model in evaluation mode, parameters bound. `decode` itself is plain Python
        that calls jitted pieces, so a sliding window compiles once whatever the sizes of the images. `batch["size"]`,
        (height, width) as Python integers, is there when the pictures fill only the top left corner of their arrays.
        `full` asks for what `predict` writes beside the answer, such as its confidence.
        """
        ...

    def metrics(self) -> dict[str, Metric]:
        """The streaming metrics by name; :meth:`measure` feeds them."""
        ...

    def measure(self, predictions: Batch, batch: Batch) -> dict[str, Any]:
        """Per-batch counts by metric name. Runs inside `jit`; examples whose `batch["mask"]` is False count nothing."""
        ...

    def summary(self, results: dict[str, dict[str, Any]]) -> dict[str, float]:
        """The few numbers worth a line on the screen, e.g. `{"mIoU": 0.71}`; the first is 'the' score."""
        ...

    def baselines(self, results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
        """The numbers of :meth:`summary` for trivial answers to the same examples, by name; empty where none is known.

        They are shown beside the score, which says little without them.
        """
        ...

    def protocol(self) -> dict[str, Any]:
        """How predictions are made, JSON-ready: whatever changes a score. It is written beside every score."""
        ...

    def charts(self, results: dict[str, dict[str, Any]]) -> dict[str, Image.Image]:
        """Pictures of an evaluation's results by name, such as a confusion matrix."""
        ...

    def sheet(self, examples: list[dict[str, np.ndarray]]) -> Image.Image:
        """A picture sheet: one row per example (`image`, `labels`, and predictions under `predicted_<name>`)."""
        ...

    def file_names(self, stem: str) -> tuple[str, ...]:
        """The names of the files that :meth:`write` makes for an image, so that none is overwritten unasked."""
        ...

    def write(
        self,
        image: np.ndarray,
        prediction: dict[str, np.ndarray],
        folder: Path,
        stem: str,
        facts: dict[str, Any] | None = None,
    ) -> list[Path]:
        """Writes what `predict` promises for one image; returns the paths. `facts` go into its JSON."""
        ...
