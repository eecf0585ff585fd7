"""From queries to objects: scores, duplicates, masks at the size of the picture, and one object per pixel.

The rules are Mask2Former's (Cheng et al. 2022, which took them from MaskFormer and DETR), with object numbers from 1:
DETR counts from 0, and its first object is void to whoever scores it (facebookresearch/detr#442).

* The score of an object is its class's probability times the mean probability of its mask's pixels.
* All objects, whatever their score and overlapping each other, are what average precision looks at.
* One object per pixel: of the queries whose class is likely enough, the one with the highest product of class and mask
  probability takes the pixel, if it lies in its mask. Objects that get too little of their mask are dropped, and their
  pixels stay void. (Mask2Former counts for them the pixels they win outside their masks, too: where most of a picture
  is background, which is nobody's, nothing would be dropped.) Objects of the same class of stuff are one.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.errors import UserError
from jax_densevit.models.output import QueryOutput
from jax_densevit.tasks.rooms import Samples
from jax_densevit.tasks.rows import map_over_pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How objects are read from queries.

    Attributes:
      threshold: the least probability of the class of an object that gets pixels (Mask2Former 0.8, DETR 0.85).
      keep: the least part of its mask that it must get, else it is dropped (Mask2Former 0.8).
      top: objects per picture, those of the highest scores; 0 = as many as there are queries.
      pairs: choose among all pairs of query and class, so that a query may answer several times, as is usual for COCO's
        average precision; else each query answers once, for its likeliest class.
      suppress: of two objects whose masks have a higher IoU than this, the one of lower score is dropped; 1 = never.
    """

    threshold: float = 0.5
    keep: float = 0.8
    top: int = 0
    pairs: bool = False
    suppress: float = 1.0

    def __post_init__(self):
        for name in ("threshold", "keep", "suppress"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"task.{name} is {getattr(self, name)}; it must lie between 0 and 1.")
        if self.top < 0:
            raise UserError(f"task.top is {self.top}; it must be a number of objects, or 0 for all queries.")


class Choice(NamedTuple):
    """N objects per picture, by falling score.

    Attributes:
      query: int32 `[B, N]`.
      classes: int32 `[B, N]`, 0..K-1; -1 where a duplicate was dropped.
      scores: float32 `[B, N]`; 0 where a duplicate was dropped.
      likely: float32 `[B, N]`: the class's probability, 0 where the object shall get no pixels.
      probabilities: float32 `[B, N, K + 1]`, the last of "no object".
    """

    query: jax.Array
    classes: jax.Array
    scores: jax.Array
    likely: jax.Array
    probabilities: jax.Array


def choose(output: QueryOutput, rules: Decoding) -> Choice:
    """The objects of a batch by falling score, duplicates dropped; runs inside `jit`."""
    probabilities = jax.nn.softmax(output.class_logits.astype(jnp.float32), -1)
    batch, queries, k = probabilities.shape[0], probabilities.shape[1], probabilities.shape[2] - 1
    p = jax.nn.sigmoid(output.mask_logits.astype(jnp.float32)).reshape(batch, queries, -1)
    inside = p > 0.5
    quality = jnp.where(inside, p, 0).sum(-1) / jnp.maximum(inside.sum(-1), 1)
    known = probabilities[..., :k] if rules.pairs else probabilities[..., :k].max(-1, keepdims=True)
    scores = (known * quality[..., None]).reshape(batch, -1)
    scores, index = jax.lax.top_k(scores, min(rules.top or queries, scores.shape[1]))
    query = index // known.shape[-1]
    classes = index % k if rules.pairs else _take(probabilities[..., :k].argmax(-1), query)
    probabilities = _take(probabilities, query)
    likely = jnp.take_along_axis(probabilities, classes[..., None], -1)[..., 0]
    is_object = (likely >= rules.threshold) & (likely > probabilities[..., k]) & (scores > 0)
    if rules.suppress < 1:
        kept = _first_of_its_kind(_take(inside, query), rules.suppress)
        classes, scores = jnp.where(kept, classes, -1), jnp.where(kept, scores, 0)
        is_object &= kept
    return Choice(query, classes.astype(jnp.int32), scores, jnp.where(is_object, likely, 0), probabilities)


def _first_of_its_kind(masks: jax.Array, most: float) -> jax.Array:
    """bool `[B, N]`: whether no earlier kept mask of bool `[B, N, P]` has a higher IoU than `most`."""
    x = masks.astype(jnp.float32)
    both = jnp.einsum("bip,bjp->bij", x, x, precision="highest")
    area = x.sum(-1)
    close = both > most * (area[:, :, None] + area[:, None] - both)

    def step(i, kept):
        earlier = kept & (jnp.arange(kept.shape[1]) < i)
        return kept.at[:, i].set(~(close[:, i] & earlier).any(1))

    return jax.lax.fori_loop(0, masks.shape[1], step, jnp.ones(masks.shape[:2], bool))


@functools.partial(jax.jit, static_argnames="rules")
def chosen(output: QueryOutput, rules: Decoding) -> tuple[Choice, jax.Array]:
    """The objects of :func:`choose`, and the logits of their masks, `[B, h, w, N]`."""
    choice = choose(output, rules)
    return choice, jnp.moveaxis(_take(output.mask_logits, choice.query), 1, -1)


@functools.partial(jax.jit, static_argnames=("rules", "things"))
def claim_pixels(
    choice: Choice, logits: jax.Array, down: Samples, across: Samples, rules: Decoding, things: tuple[bool, ...]
) -> dict[str, jax.Array]:
    """Masks at the size of the picture, and which object has which pixel.

    Args:
      choice: the objects.
      logits: `[B, h, w, N]` of their masks.
      down, across: samples of the rows and columns of `logits` at the pixels of the picture.
      rules: how to read them.
      things: of each of the K classes, whether its objects are counted.

    Returns:
      "masks" bool `[B, H, W, N]`, which may overlap; "segments" int32 `[B, H, W]`: n + 1 where object n has the pixel,
      0 where none has; "classes", "scores", "probabilities" as in :class:`Choice`.
    """
    there, likely = (choice.classes >= 0)[:, None, None], choice.likely[:, None, None]

    def pixels(block):
        inside = (block > 0) & there
        weight = jnp.where(likely > 0, jax.nn.sigmoid(block) * likely, -1)
        winner = weight.argmax(-1)
        hit = jnp.take_along_axis(inside & (likely > 0), winner[..., None], -1)[..., 0]
        return {"masks": inside, "segments": jnp.where(hit, winner + 1, 0).astype(jnp.int32)}

    found = map_over_pixels(pixels, logits.astype(jnp.float32), down, across)
    slots = choice.classes.shape[1]
    area = found["masks"].sum((1, 2), dtype=jnp.int32)
    won = jax.vmap(lambda ids: jnp.zeros(slots + 1, jnp.int32).at[ids.ravel()].add(1))(found["segments"])[:, 1:]
    kept = (won > 0) & (won >= rules.keep * area)
    # Stuff is one object: the number of the first that is kept of its class.
    stuff = jnp.asarray(np.append(~np.asarray(things, bool), False))[choice.classes]
    one = (choice.classes[:, :, None] == choice.classes[:, None]) & (stuff & kept)[:, None]
    number = jnp.where(stuff, one.argmax(-1), jnp.arange(slots))
    table = jnp.pad(jnp.where(kept, number + 1, 0), ((0, 0), (1, 0))).astype(jnp.int32)
    segments = jnp.take_along_axis(table, found["segments"].reshape(len(table), -1), 1)
    return {
        "masks": found["masks"],
        "segments": segments.reshape(found["segments"].shape),
        "classes": choice.classes,
        "scores": choice.scores,
        "probabilities": choice.probabilities,
    }


def _take(values: jax.Array, index: jax.Array) -> jax.Array:
    """`[B, Q, ...], [B, N] -> [B, N, ...]`."""
    return jnp.take_along_axis(values, index.reshape(*index.shape, *(1,) * (values.ndim - 2)), 1)
