"""Folders of arrays that Orbax wrote, and our own checkpoints among them."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jax_densevit.errors import UserError
from jax_densevit.manifest import NAME, find_damage
from jax_densevit.pretrained.memory import check_listing, check_room

_TREE = "_METADATA"  # what every folder of a tree of arrays has


def load(path: Path) -> Any:
    """The nested dict of arrays in a folder: a workdir of ours (its newest step), a step of it, or any tree of Orbax's.

    A step's trees (`params`, `statistics`, `ema`, `optimizer`) are under their names. Where there is a manifest, as in
    every step of ours, all files are compared with it first.
    """
    folder = path
    if (path / "checkpoints").is_dir():
        steps = [int(step.name) for step in (path / "checkpoints").iterdir() if step.name.isdecimal()]
        if not steps:
            raise UserError(f"{path} holds no checkpoint: name the workdir of a training run.")
        folder = path / "checkpoints" / str(max(steps))
    step = folder if (folder / NAME).is_file() else folder.parent
    if (step / NAME).is_file() and (damage := find_damage(step)):
        raise UserError(f"The checkpoint {step} is damaged: {damage}; name another step or restore the file.")
    if (folder / _TREE).is_file():
        return restore_item(folder)
    items = sorted(item for item in folder.iterdir() if (item / _TREE).is_file())
    if not items:
        raise UserError(
            f"{path} is a directory without a checkpoint of Orbax: name the weight file in it (of a TensorFlow "
            "checkpoint the .index file)."
        )
    return {item.name: restore_item(item) for item in items}


def item_metadata(folder: Path) -> Any:
    """A nested dict like the stored one, with leaves that have `shape` and `dtype`."""
    check_listing(folder / _TREE)
    return ocp.StandardCheckpointHandler().metadata(epath.Path(folder)).tree


def restore_item(folder: Path, shardings: Any = None) -> Any:
    """The tree of arrays in a tree's folder, laid out as `shardings` say; NumPy arrays where they are None."""
    stored = item_metadata(folder)
    if shardings is None:
        leaves = jax.tree.leaves(stored)
        check_room(folder, len(leaves), sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in leaves))
        how = jax.tree.map(lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray), stored)
    else:
        how = jax.tree.map(
            lambda leaf, place: ocp.ArrayRestoreArgs(sharding=place, global_shape=leaf.shape, dtype=leaf.dtype),
            stored,
            shardings,
        )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader, jax.transfer_guard("allow"):
        return reader.restore(epath.Path(folder), args=ocp.args.PyTreeRestore(item=stored, restore_args=how))
