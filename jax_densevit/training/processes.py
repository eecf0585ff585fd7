"""What the processes of one training tell each other outside of the training step. Alone, all of it is free."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jax_densevit.errors import UserError


def from_process_0(value: int) -> int:
    """The whole number that process 0 passed; every process calls it."""
    if jax.process_count() == 1:
        return value
    with jax.transfer_guard("allow"):
        return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def anywhere(flag: bool) -> bool:
    """Whether any process passed True; every process calls it."""
    if jax.process_count() == 1:
        return flag
    with jax.transfer_guard("allow"):
        return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raises :class:`UserError` on every process if one has other facts (JSON-ready values by name) than the others."""
    if jax.process_count() == 1:
        return
    names = sorted(facts)
    own = np.array([zlib.crc32(json.dumps(facts[name], sort_keys=True).encode()) for name in names], np.uint32)
    everyone = np.asarray(multihost_utils.process_allgather(own))
    different = [name for name, column in zip(names, everyone.T, strict=True) if len(set(column.tolist())) > 1]
    if different:
        raise UserError(
            f"The processes do not agree about {', '.join(different)}: start all of them with the same config, data "
            "and versions."
        )
