"""What the processes of one training tell each other outside of the training step. Alone, all of it is free."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jax_densevit.data.source import Source
from jax_densevit.errors import UserError

_LOOKED_AT = 8  # examples of every source that are read to compare their names


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
    """Raises :class:`UserError` on every process if one has other facts (JSON-ready values by name) than the others.

    The message names the first process that differs from process 0, and the fields that do.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(facts, sort_keys=True).encode()
    # A hash first: usually nothing differs, and then no process has to send more than that.
    hashes = multihost_utils.process_allgather(np.array([zlib.crc32(text), len(text)], np.uint32))
    if (hashes == hashes[0]).all():
        return
    padded = np.zeros(int(hashes[:, 1].max()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    everyone = multihost_utils.process_allgather(padded)
    first, *others = (json.loads(row[:length].tobytes()) for row, (_, length) in zip(everyone, hashes, strict=True))
    number, lines = next(
        (number, lines) for number, other in enumerate(others, 1) if (lines := differences(first, other, ""))
    )
    more = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
    raise UserError(
        f"The processes do not agree. Process 0 -> process {number}: "
        f"{'; '.join(line.removeprefix('.') for line in lines[:5])}{more}. Start all of them with the same config, "
        "data and versions."
    )


def check_same_data(sources: Mapping[str, Source]) -> None:
    """Raises :class:`UserError` on every process if one sees other examples than the others, by their number and some
    of their names: a copy of the data that lacks a file gives another order, and all batches mix without a word.
    """
    if jax.process_count() > 1:
        seen = {name: {"examples": len(source), "names": _names(source)} for name, source in sources.items()}
        check_agreement({f"data.{name}": facts for name, facts in seen.items()})


def _names(source: Source) -> dict[str, str]:
    names = {}
    for index in np.unique(np.linspace(0, len(source) - 1, _LOOKED_AT).round().astype(int)).tolist():
        try:
            names[str(index)] = str(source.read(index)["id"])
        except UserError:
            names[str(index)] = "unreadable"
    return names


def differences(before: Any, now: Any, path: str = "config") -> list[str]:
    """Lines "config.a.b: old -> new" for two JSON-like trees."""
    if isinstance(before, dict) and isinstance(now, dict):
        lines = []
        for key in sorted(before.keys() | now.keys()):
            lines += differences(before.get(key), now.get(key), f"{path}.{key}")
        return lines
    return [] if before == now else [f"{path}: {before} -> {now}"]
