"""Objects of id maps in slots, on the device: what a query can be matched to, and what predictions are measured by.

A picture comes with a class and an object number per pixel, by the rules of `data.source`. Objects are sorted into
slots, largest first, so that those without a slot are the smallest; how many there are is counted before.
"""

import dataclasses
from collections.abc import Mapping

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.data.source import CROWD, IGNORE, DataInfo, is_crowd
from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.resize import resize_area
from jax_densevit.metrics.panoptic import contingency

BACKGROUNDS = ("background", "other", "void")  # first classes of these names are no objects
_NUMBERS = 2**16  # object numbers; above them one id per class for its stuff, and one for its crowd
_LABELS = 2**8
_EXACT = 128  # a mean of 2, 4, ... 128 pixels is exact in this many steps


@dataclasses.dataclass(frozen=True)
class ObjectClasses:
    """Which labels are objects.

    Attributes:
      names: of the K classes of objects, in the order of their labels.
      labels: the label of each.
      things: whether objects of the class are counted; a class of stuff is one object wherever it is.
      ignore: the label of pixels of which nothing is known.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]
    things: tuple[bool, ...]
    ignore: int = IGNORE

    @classmethod
    def of(cls, info: DataInfo, things: tuple[str, ...] = (), panoptic: bool = False) -> "ObjectClasses":
        """The classes of a data set: those named `things`, else what it says, else all but a background; with
        `panoptic` also the others.

        Raises:
          UserError: no class is left, or a name is no class.
        """
        for name in things:
            check_name(f"class of {info.name!r}", name, info.classes)
        background = info.classes[:1] if info.classes and info.classes[0].lower() in BACKGROUNDS else ()
        counted = things or info.things or tuple(name for name in info.classes if name not in background)
        kept = [
            (name, label, name in counted)
            for label, name in enumerate(info.classes)
            if name in counted or (panoptic and name not in background)
        ]
        if not kept:
            raise UserError(f"{info.name!r} has no class of objects, only {info.classes}: name them in task.things.")
        names, labels, marks = zip(*kept, strict=True)
        return cls(names, labels, marks, info.ignore)


@flax.struct.dataclass
class Objects:
    """The objects of a batch, in S slots per picture.

    Attributes:
      slots: int32 `[B, H, W]`: s + 1 where the object in slot s is seen, 0 where there is none.
      void: bool `[B, H, W]`: nothing is known of these pixels.
      classes: int32 `[B, S]`, -1 in empty slots.
      crowd: bool `[B, S]`: a group of objects nobody told apart.
      number: int32 `[B, S]`: of the object in the picture's map.
      valid: int32 `[B]`: slots 0..valid-1 are filled.
      found: int32 `[B]`: all objects, those without a slot too.
      amodal: uint16 `[B, H, W]`, bit n - 1 set where object n is, seen or hidden; None where only what is seen is
        known.
    """

    slots: jax.Array
    void: jax.Array
    classes: jax.Array
    crowd: jax.Array
    number: jax.Array
    valid: jax.Array
    found: jax.Array
    amodal: jax.Array | None = None


def find_objects(batch: Mapping[str, jax.Array], kinds: ObjectClasses, slots: int, *, crowds: bool = False) -> Objects:
    """Sorts the objects of a batch into slots; runs inside `jit`.

    Args:
      batch: "labels" uint8, "instances" uint16 `[B, H, W]`, and "amodal" where it is known; see `data.source`.
      kinds: which labels are objects.
      slots: S, of every picture.
      crowds: give crowds slots; else nothing is known of their pixels.
    """
    key, kind, crowd, void = _keys(batch, kinds, crowds)
    k, area = len(kinds.names), _areas(key, kinds)
    # As float32 the largest are found by a partial sort on every device; areas below 2**24 are exact.
    largest, ids = jax.lax.top_k(area.astype(jnp.float32), slots)
    filled = largest > 0
    numbers = jnp.where(filled, jnp.arange(1, slots + 1), 0)
    table = jax.vmap(lambda i, n: jnp.zeros(area.shape[1], jnp.int32).at[i].set(n))(ids, numbers)
    found = jnp.take_along_axis(table, key.reshape(len(key), -1), 1).reshape(key.shape)
    votes = contingency(found, kind + 1, slots + 1, k + 2)[:, 1:, 1:-1]
    return Objects(
        slots=found,
        void=void if crowds else void | crowd,
        classes=jnp.where(filled, votes.argmax(-1).astype(jnp.int32), -1),
        crowd=filled & (((ids >= CROWD) & (ids < _NUMBERS)) | (ids >= _NUMBERS + k)),
        number=jnp.where(filled & (ids < _NUMBERS), ids, 0),
        valid=filled.sum(1, dtype=jnp.int32),
        found=(area > 0).sum(1, dtype=jnp.int32),
        amodal=batch.get("amodal"),
    )


def count_objects(batch: Mapping[str, jax.Array], kinds: ObjectClasses, *, crowds: bool = False) -> jax.Array:
    """int32 `[B]`: how many there are; arguments as of :func:`find_objects`."""
    return (_areas(_keys(batch, kinds, crowds)[0], kinds) > 0).sum(1, dtype=jnp.int32)


def _keys(batch: Mapping[str, jax.Array], kinds: ObjectClasses, crowds: bool) -> tuple[jax.Array, ...]:
    """Of each pixel: one id per object (0 = none), its class (K = none), whether it is crowd, and void."""
    k = len(kinds.names)
    class_of = np.full(_LABELS, k, np.int32)
    class_of[list(kinds.labels)] = np.arange(k)
    thing = np.append(np.asarray(kinds.things, bool), False)
    label, number = batch["labels"].astype(jnp.int32), batch["instances"].astype(jnp.int32)
    void = label == kinds.ignore
    kind = jnp.where(void, k, jnp.asarray(class_of)[label])
    counted = jnp.asarray(thing)[kind]
    crowd = counted & is_crowd(number)
    key = jnp.where(counted, jnp.where(number > 0, number, _NUMBERS + k + kind), _NUMBERS + kind)
    key = jnp.where((kind == k) | (crowd & (not crowds)), 0, key)
    return key, kind, crowd, void


def _areas(key: jax.Array, kinds: ObjectClasses) -> jax.Array:
    """int32 `[B, ids]`: pixels of each id; 0 of none."""
    ids = _NUMBERS + 2 * len(kinds.names)
    flat = key.reshape(len(key), -1)
    return jax.vmap(lambda keys: jnp.zeros(ids, jnp.int32).at[keys].add(1))(flat).at[:, 0].set(0)


def masks_of(objects: Objects, covers: tuple[int, int]) -> jax.Array:
    """bool `[B, S, *covers]`: the pixels of every object, hidden ones too where they are known; none beyond."""
    if objects.amodal is not None:
        bits = _widen(objects.amodal, covers, 0).astype(jnp.int32)[:, None]
        number = objects.number[:, :, None, None]
        return (number > 0) & ((bits >> jnp.maximum(number - 1, 0)) & 1 > 0)
    slots = _widen(objects.slots, covers, 0)
    return slots[:, None] == jnp.arange(1, objects.classes.shape[1] + 1)[:, None, None]


def void_of(objects: Objects, covers: tuple[int, int]) -> jax.Array:
    """bool `[B, *covers]`: the pixels of which nothing is known; what a model adds beyond the picture is empty."""
    return _widen(objects.void, covers, False)


def shares(masks: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """The part of each cell that a mask fills: bool `[..., H, W]` -> float32 `[..., *grid]`."""
    if masks.shape[-2:] == tuple(grid):
        return masks.astype(jnp.float32)
    return resize_area(masks[..., None].astype(jnp.int32) * _EXACT, grid)[..., 0].astype(jnp.float32) / _EXACT


def boxes_of(masks: jax.Array) -> jax.Array:
    """float32 `[..., 4]`: the box around each mask `[..., H, W]`, (cx, cy, w, h) in [0, 1]; zeros of an empty mask."""

    def ends(some: jax.Array) -> tuple[jax.Array, jax.Array]:
        length = some.shape[-1]
        low = some.argmax(-1) / length
        return low, jnp.where(some.any(-1), 1 - some[..., ::-1].argmax(-1) / length, low)

    (top, bottom), (left, right) = ends(masks.any(-1)), ends(masks.any(-2))
    return jnp.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], -1)


def _widen(maps: jax.Array, covers: tuple[int, int], fill: int | bool) -> jax.Array:
    """`[B, H, W]` filled up at the bottom and the right to `covers`."""
    more = [(0, cover - side) for cover, side in zip(covers, maps.shape[1:], strict=True)]
    return jnp.pad(maps, ((0, 0), *more), constant_values=fill)
