"""Instances and panoptic segmentation by queries: each object a mask, a class and a score.

Training matches queries to objects (`set_loss.py`). Decoding reads objects from queries (`instance_decoding.py`), whole
pictures at a time. Scores are panoptic quality of one object per pixel; average precision of all objects, by COCO's or
Cityscapes' rules; the adjusted Rand index of the counted objects' pixels; and the accuracy of classes and Dice of masks
after matching, as the study of scattered digits reports them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jax_densevit.data.augment import normalise
from jax_densevit.data.source import DataInfo
from jax_densevit.errors import UserError
from jax_densevit.metrics.clustering import AdjustedRandIndex
from jax_densevit.metrics.matched import MatchedObjects
from jax_densevit.metrics.metric import Metric
from jax_densevit.metrics.overlaps import map_overlaps, mask_overlaps
from jax_densevit.metrics.panoptic import PanopticQuality
from jax_densevit.metrics.precision import CityscapesPrecision, CocoPrecision
from jax_densevit.models.output import QueryOutput
from jax_densevit.tasks import instance_pictures
from jax_densevit.tasks.answers import Answers, number, size_or_none
from jax_densevit.tasks.instance_decoding import Decoding, chosen, claim_pixels
from jax_densevit.tasks.matching import match
from jax_densevit.tasks.objects import ObjectClasses, Objects, count_objects, find_objects, masks_of
from jax_densevit.tasks.registry import register_task
from jax_densevit.tasks.segmentation import one_of
from jax_densevit.tasks.set_loss import SetLoss
from jax_densevit.tasks.task import Batch, LossTerm
from jax_densevit.tasks.views import enlarge, place, prepare

RULES = ("coco", "cityscapes")


@register_task("instances")
@dataclasses.dataclass(frozen=True)
class InstancesTask(SetLoss, Decoding, Answers):
    """Objects of the classes of `info`, for models with queries.

    Attributes:
      info: facts about the data.
      things: names of the classes whose objects are counted; empty = those that the data says, or all but a background.
      panoptic: predict the other classes, too, each as one object of stuff; else their pixels are nobody's.
      rules: of average precision, "coco" or "cityscapes".
      min_area: with Cityscapes' rules, pixels of the smallest object that is wanted: 100 at 1024 x 2048.
      fixed_size: (height, width) to which every picture is resized before decoding, aspect not kept: for models that
        take images of one size only. (0, 0) leaves it at its own size.
      Others: see `SetLoss` and `Decoding`.
    """

    percent: ClassVar[bool] = True
    kind: ClassVar[str] = "instances"
    suffixes: ClassVar[tuple[str, ...]] = (".png", "_overlay.png", ".json")

    info: DataInfo
    things: tuple[str, ...] = ()
    panoptic: bool = False
    rules: str = "coco"
    min_area: float = 100.0
    fixed_size: tuple[int, int] = (0, 0)

    def __post_init__(self):
        SetLoss.__post_init__(self)
        Decoding.__post_init__(self)
        one_of("rules", self.rules, RULES)
        object.__setattr__(self, "things", tuple(self.things))
        size_or_none(self, "fixed_size")
        self.objects  # noqa: B018  a name in `things` that is no class is refused now

    @functools.cached_property
    def objects(self) -> ObjectClasses:
        """Which labels are objects."""
        return ObjectClasses.of(self.info, self.things, self.panoptic)

    @property
    def num_outputs(self) -> int:
        """K, the classes of objects; the model adds "no object"."""
        return len(self.objects.names)

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        """The normalised images, float32 `[B, H, W, 3]`."""
        return (normalise(batch["image"], self.info.mean, self.info.std),)

    def loss(self, output: QueryOutput, batch: Batch) -> dict[str, LossTerm]:
        """Terms by name, see :meth:`SetLoss.set_loss`."""
        self._checked(output)
        return self.set_loss(output, find_objects(batch, self.objects, self.slots), batch.get("seed"))

    def decode(self, forward: Callable[..., QueryOutput], batch: Batch, *, full: bool = False) -> Batch:
        """Objects at the size of the pictures.

        Args:
          forward: jitted model, images `[B, h, w, 3]` to `QueryOutput`.
          batch: "image" uint8 `[B, H, W, 3]`; "size" where the pictures fill only the top left corner of it.
          full: has no effect: scores are always there.

        Returns:
          What :func:`~jax_densevit.tasks.instance_decoding.claim_pixels` says. Where the batch has "instances", also
          "truth", the true `Objects` in as many slots as the fullest picture needs: a number `measure` cannot choose.
        """
        room = tuple(batch["image"].shape[1:3])
        size = tuple(batch.get("size", room))
        fed = self.fixed_size if all(self.fixed_size) else size
        output = forward(prepare(self, batch["image"], size, fed, fed, (False, False)))
        self._checked(output)
        choice, logits = chosen(output, self._decoding)
        if fed == size:
            at = place(logits.shape[1:3], output.covers, room, (False, False), cut=size)
        else:
            logits = enlarge(logits, output.covers, fed)
            at = place(fed, size, room, (False, False))
        found = claim_pixels(choice, logits, *at, self._decoding, self.objects.things)
        return found | {"truth": self._truth(batch)} if "instances" in batch else found

    def metrics(self) -> dict[str, Metric]:
        """PQ, AP, matched classes and masks, ARI."""
        counted = self._counted
        names = [self.objects.names[i] for i in counted]
        precision = CocoPrecision(names) if self.rules == "coco" else CityscapesPrecision(names, self.min_area)
        return {
            "panoptic": PanopticQuality(self.objects.names, self.objects.things),
            "precision": precision,
            "matched": MatchedObjects(self.objects.names),
            "clustering": AdjustedRandIndex(0, 0),
        }

    def measure(self, predictions: Batch, batch: Batch) -> dict[str, Any]:
        """Counts of one batch by metric; examples whose mask is False count nothing."""
        metrics, mask = self.metrics(), batch.get("mask")
        truth: Objects = predictions["truth"]
        slots, void, classes, crowd = truth.slots, truth.void, truth.classes, truth.crowd
        count, k = classes.shape[1], self.num_outputs
        if truth.amodal is None:
            overlaps = map_overlaps(predictions["masks"], slots, count, void, mask)
        else:
            overlaps = mask_overlaps(
                jnp.moveaxis(predictions["masks"], -1, 1), masks_of(truth, slots.shape[1:]), void, mask
            )
        # Known pixels of no object are a segment of a class that is none: void would excuse what is predicted there.
        known = jnp.where((slots == 0) & ~void, count + 1, slots)
        empty = jnp.zeros((len(classes), 1), bool)
        segments = known, jnp.pad(classes, ((0, 0), (0, 1)), constant_values=k), jnp.concatenate([crowd, empty], 1)
        # Average precision and ARI know counted objects only.
        number = np.full(k + 1, -1, np.int32)
        number[list(self._counted)] = np.arange(len(self._counted))
        number = jnp.asarray(number)  # -1, the class of what is not there, is the last entry
        thing = (number[classes] >= 0) & ~crowd
        things = jnp.where(jnp.take_along_axis(jnp.pad(thing, ((0, 0), (1, 0))), _flat(slots), 1), _flat(slots), 0)
        # As in training: Dice of masks and the class's probability, here of masks cut at one half.
        own = (classes >= 0) & ~crowd
        dice = 1 - (2 * overlaps["both"] + 1) / (
            overlaps["predicted_area"][:, :, None] + overlaps["truth_area"][:, None] + 1
        )
        chances = jnp.take_along_axis(predictions["probabilities"], jnp.maximum(classes, 0)[:, None], 2)
        costs = self.dice_weight * dice - self.class_weight * chances
        # Crowds and empty slots stand behind real objects, so that the matching skips them.
        order = jnp.argsort(~own, axis=1, stable=True)
        assigned = match(jnp.take_along_axis(costs, order[:, None], 2), own.sum(1)).query
        assigned = jnp.take_along_axis(assigned, jnp.argsort(order, axis=1), 1)
        ids = {"truth_slots": count, "predicted_slots": predictions["classes"].shape[1]}
        return {
            "panoptic": metrics["panoptic"].measure(*segments, predictions["segments"], predictions["classes"], mask),
            "precision": {
                **overlaps,
                "predicted_class": number[predictions["classes"]],
                "score": predictions["scores"],
                "truth_class": number[classes],
                "truth_crowd": crowd,
            },
            "matched": metrics["matched"].measure(
                overlaps, predictions["probabilities"].argmax(-1), jnp.where(own, classes, -1), assigned, mask
            ),
            "clustering": AdjustedRandIndex(**ids).measure(things.reshape(slots.shape), predictions["segments"], mask),
        }

    def summary(self, results: dict[str, dict[str, Any]]) -> dict[str, float]:
        """Scores in [0, 1], NaN where there was no object; models are compared by the first, PQ."""
        panoptic, matched = results["panoptic"], results["matched"]
        numbers = {name: panoptic[name] for name in ("PQ", "SQ", "RQ")}
        if self.panoptic:
            numbers |= {f"PQ_{group}": panoptic[group]["PQ"] for group in ("things", "stuff")}
        numbers |= {name: results["precision"][name] for name in ("AP", "AP50")}
        numbers |= {name: matched[name] for name in ("accuracy", "dice_loss")}
        numbers["ARI"] = results["clustering"]["ARI"]
        return {name: number(value) for name, value in numbers.items()}

    def protocol(self) -> dict[str, Any]:
        """How predictions are made, JSON-ready: whatever changes a score."""
        names = [field.name for field in dataclasses.fields(Decoding)]
        names += ["things", "panoptic", "rules", "min_area", "fixed_size"]
        return {"task": self.kind, "ignore": self.info.ignore, **{name: getattr(self, name) for name in names}}

    def charts(self, results: dict[str, dict[str, Any]]) -> dict[str, Image.Image]:
        """Average precision over the IoU that a match needs."""
        return {"precision": instance_pictures.precision_curve(results["precision"])}

    def sheet(self, examples: list[dict[str, np.ndarray]]) -> Image.Image:
        """One row per example: image, prediction, truth."""
        return instance_pictures.sheet(examples, self.objects)

    def files(self, image: np.ndarray, prediction: dict[str, np.ndarray], facts: dict[str, Any]) -> tuple[Any, ...]:
        """A 16-bit map of object numbers, the outlines with class and score, and COCO's JSON of one image.

        The JSON has the objects of the map as "segments_info", as COCO's panoptic format, and under "annotations" every
        mask before pixels were shared out, as its results format has them: RLE, class, score. Classes are numbered as
        in the labels of the training data.
        """
        return instance_pictures.files(image, prediction, self.objects, facts)

    @functools.cached_property
    def _counted(self) -> tuple[int, ...]:
        return tuple(i for i, thing in enumerate(self.objects.things) if thing)

    @functools.cached_property
    def _decoding(self) -> Decoding:
        """The options of decoding alone: what is jitted with them is not compiled again for another loss."""
        return Decoding(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Decoding)})

    def _truth(self, batch: Batch) -> Objects:
        maps = {name: batch[name] for name in ("labels", "instances", "amodal") if name in batch}
        most = int(_most_objects(maps, self.objects))
        # A power of two, so that few numbers of slots are compiled.
        return _find(maps, self.objects, max(8, 1 << (most - 1).bit_length()) if most else 8)

    def _checked(self, output: QueryOutput) -> None:
        found = getattr(output, "class_logits", None)
        if found is None:
            raise UserError("The task 'instances' needs a model with queries; see `python -m jax_densevit.models`.")
        if found.shape[-1] != self.num_outputs + 1:
            raise UserError(
                f"The model tells {found.shape[-1] - 1} classes of objects apart, the data has {self.num_outputs}: "
                "leave model.num_classes out of the config."
            )


@functools.partial(jax.jit, static_argnames="kinds")
def _most_objects(maps: Batch, kinds: ObjectClasses) -> jax.Array:
    return count_objects(maps, kinds, crowds=True).max()


@functools.partial(jax.jit, static_argnames=("kinds", "slots"))
def _find(maps: Batch, kinds: ObjectClasses, slots: int) -> Objects:
    return find_objects(maps, kinds, slots, crowds=True)


def _flat(maps: jax.Array) -> jax.Array:
    return maps.reshape(len(maps), -1)
