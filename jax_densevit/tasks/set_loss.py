"""What queries that answer in no order have to learn: each object is matched to one query, the others say "none".

Matching and loss weigh the same terms, as in DETR, MaskFormer and Mask2Former; the class costs its probability in the
matching and its logarithm in the loss. Masks are compared at the resolution of the head, or at sampled points of it. A
model with outputs between its layers learns from all of them. Pixels of which nothing is known say nothing: there the
masks are taken for what they should be.
"""

import dataclasses
import zlib

import jax
import jax.numpy as jnp

from jax_densevit.errors import UserError, check_name
from jax_densevit.models.output import QueryOutput
from jax_densevit.tasks import mask_losses, pair_costs
from jax_densevit.tasks.matching import METHODS, Assignment, match
from jax_densevit.tasks.objects import Objects, boxes_of, masks_of, shares, void_of
from jax_densevit.tasks.points import random_points, sample, uncertain_points
from jax_densevit.tasks.task import LossTerm

_NOTHING = -30.0  # a logit that neither costs nor teaches where the target is 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetLoss:
    """How outputs are compared with objects.

    Attributes:
      class_weight: of the class's cross-entropy (DETR 1, Mask2Former 2, the study of digit scenes 0.1).
      dice_weight, bce_weight, focal_weight: of the masks (Mask2Former: Dice 5, BCE 5; MaskFormer: Dice 1, focal 20; the
        study: Dice 1).
      l1_weight, giou_weight: of the boxes, for models that have some (DETR 5 and 2).
      no_object: the weight of "no object" among the classes (DETR 0.1; the study 0.5).
      dice_squared: squares in the denominator of Dice, as in V-Net.
      auxiliary_weight: of the outputs between the layers, each.
      match_once: outputs between the layers take the matching of the last; else each has its own, as in DETR.
      matching: a name of `matching.METHODS`.
      points: compare masks at so many sampled points instead of everywhere (Mask2Former: 12,544); 0 = everywhere.
      slots: objects of a picture that are learned from at most, the largest; the training log counts the others.
    """

    class_weight: float = 1.0
    dice_weight: float = 1.0
    bce_weight: float = 0.0
    focal_weight: float = 0.0
    l1_weight: float = 0.0
    giou_weight: float = 0.0
    no_object: float = 0.1
    dice_squared: bool = False
    auxiliary_weight: float = 1.0
    match_once: bool = False
    matching: str = "augmenting_path"
    points: int = 0
    slots: int = 32

    def __post_init__(self):
        check_name("matching method", self.matching, METHODS)
        for name in ("slots", "no_object", "class_weight"):
            if getattr(self, name) <= 0:
                raise UserError(f"task.{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("dice_weight", "bce_weight", "focal_weight", "l1_weight", "giou_weight", "auxiliary_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"task.{name} is {getattr(self, name)}; a weight cannot be negative.")
        if not self.dice_weight + self.bce_weight + self.focal_weight:
            raise UserError("Masks teach nothing: set one of task.dice_weight, bce_weight and focal_weight above 0.")
        if self.points < 0:
            raise UserError(f"task.points is {self.points}; it must be a number of points, or 0.")

    def set_loss(self, output: QueryOutput, objects: Objects, seeds: jax.Array | None = None) -> dict[str, LossTerm]:
        """The terms "class", "dice", ..., the sums "auxiliary_class", ... over all outputs between the layers, and
        "unmatched", of coefficient 0: objects per picture that have no slot or no query.

        Args:
          output: of the model in training.
          objects: what is in the pictures.
          seeds: uint32 `[B, 2]` of the points, one per picture; None takes the same points for all.
        """
        targets = _Targets(self, output, objects, seeds)
        assignment, terms = self._compared(output, targets, None)
        for layer in output.auxiliary if self.auxiliary_weight else ():
            of_layer = self._compared(layer, targets, assignment if self.match_once else None)[1]
            for name, term in of_layer.items():
                name, coefficient = f"auxiliary_{name}", self.auxiliary_weight * term.coefficient
                # All layers have the same weight: so many objects, so many queries.
                total = term.sum + (terms[name].sum if name in terms else 0)
                terms[name] = LossTerm(total, term.weight, coefficient)
        matched = jnp.minimum(objects.valid, output.class_logits.shape[1])
        batch = jnp.float32(len(matched))
        return terms | {"unmatched": LossTerm((objects.found - matched).sum().astype(jnp.float32), batch, 0.0)}

    def _compared(self, layer: QueryOutput, targets: "_Targets", assignment: Assignment | None):
        """The assignment (its own, if none is given) and the terms of one output."""
        if assignment is None:
            assignment = match(targets.costs(layer), targets.valid, self.matching)
        terms = {
            "class": mask_losses.class_loss(
                layer.class_logits,
                targets.classes,
                assignment,
                no_object=self.no_object,
                coefficient=self.class_weight,
            )
        }
        masks = targets.pairs(layer, assignment)
        if self.dice_weight:
            options = {"squared": self.dice_squared, "coefficient": self.dice_weight}
            terms["dice"] = mask_losses.dice_loss(*masks, assignment, **options)
        if self.bce_weight:
            terms["bce"] = mask_losses.mask_bce_loss(*masks, assignment, coefficient=self.bce_weight)
        if self.focal_weight:
            terms["focal"] = mask_losses.focal_loss(*masks, assignment, coefficient=self.focal_weight)
        if self.l1_weight or self.giou_weight:
            boxes = mask_losses.matched(_boxes(layer), assignment), targets.boxes
            terms["l1"] = mask_losses.box_l1_loss(*boxes, assignment, coefficient=self.l1_weight)
            terms["giou"] = mask_losses.box_giou_loss(*boxes, assignment, coefficient=self.giou_weight)
        return assignment, terms


class _Targets:
    """What the outputs of one batch are compared with."""

    def __init__(self, weights: SetLoss, output: QueryOutput, objects: Objects, seeds: jax.Array | None):
        self.weights, self.classes, self.valid = weights, objects.classes, objects.valid
        self.masks = masks_of(objects, output.covers)
        self.void = void_of(objects, output.covers)[:, None]
        self.boxes = boxes_of(self.masks)
        seeds = jnp.zeros((len(self.valid), 2), jnp.uint32) if seeds is None else seeds
        matching, loss = jnp.swapaxes(jax.vmap(lambda seed: jax.random.split(_key(seed)))(seeds), 0, 1)
        self.keys = loss
        # The same points for all masks of a picture and all layers.
        self.points = weights.points and jax.vmap(lambda key: random_points(key, (1,), weights.points))(matching)

    def costs(self, layer: QueryOutput) -> jax.Array:
        """`[B, Q, T]`: the weighted sum of all costs."""
        w = self.weights
        masks = self._at(layer.mask_logits, self.points) if w.points else self._everywhere(layer.mask_logits)
        costs = w.class_weight * pair_costs.class_cost(layer.class_logits, self.classes)
        if w.dice_weight:
            costs += w.dice_weight * pair_costs.dice_cost(*masks, w.dice_squared)
        if w.bce_weight:
            costs += w.bce_weight * pair_costs.bce_cost(*masks)
        if w.focal_weight:
            costs += w.focal_weight * pair_costs.focal_cost(*masks)
        if w.l1_weight or w.giou_weight:
            costs += w.l1_weight * pair_costs.box_l1_cost(_boxes(layer), self.boxes)
            costs += w.giou_weight * pair_costs.box_giou_cost(_boxes(layer), self.boxes)
        return costs

    def pairs(self, layer: QueryOutput, assignment: Assignment) -> tuple[jax.Array, jax.Array]:
        """Mask logits and targets of each target's query, both `[B, T, N]`."""
        if layer.box_masks is not None:
            logits = mask_losses.matched(layer.box_masks, assignment)
            places = _cells(self.boxes, logits.shape[-2:])
            return self._known(_flat(logits), sample(self.masks, places), sample(self.void, places))
        logits = mask_losses.matched(layer.mask_logits, assignment)
        if not self.weights.points:
            return self._everywhere(logits)
        count = self.weights.points
        return self._at(logits, jax.vmap(lambda key, maps: uncertain_points(key, maps, count))(self.keys, logits))

    def _everywhere(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        grid = logits.shape[-2:]
        return self._known(_flat(logits), _flat(shares(self.masks, grid)), _flat(shares(self.void, grid)))

    def _at(self, logits: jax.Array, points: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self._known(sample(logits, points), sample(self.masks, points), sample(self.void, points))

    def _known(self, logits: jax.Array, targets: jax.Array, void: jax.Array) -> tuple[jax.Array, jax.Array]:
        unknown = void >= 0.5
        return jnp.where(unknown, _NOTHING, logits), jnp.where(unknown, 0, targets)


def _key(seed: jax.Array) -> jax.Array:
    """Of one picture; other numbers than augmentation draws from the same seed."""
    return jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), zlib.crc32(b"points"))


def _flat(maps: jax.Array) -> jax.Array:
    return maps.reshape(*maps.shape[:2], -1)


def _cells(boxes: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The centres of the cells of a grid laid over each box: `[..., 4] -> [..., h * w, 2]`, (x, y) row by row."""
    y, x = jnp.meshgrid(*((jnp.arange(n) + 0.5) / n - 0.5 for n in grid), indexing="ij")
    offsets = jnp.stack([x.ravel(), y.ravel()], -1)
    return boxes[..., None, :2] + offsets * boxes[..., None, 2:]


def _boxes(layer: QueryOutput) -> jax.Array:
    if layer.boxes is None:
        raise UserError("This model has no boxes: set task.l1_weight and task.giou_weight to 0.")
    return layer.boxes
