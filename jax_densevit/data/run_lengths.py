"""Masks as COCO has them in JSON: the lengths of runs down the columns, outside and inside by turns, the first outside.

They are numbers, or packed into printable characters.
"""

from collections.abc import Sequence

import numpy as np


def run_lengths(mask: np.ndarray) -> dict[str, object]:
    """`{"size": [H, W], "counts": str}` of a bool mask `[H, W]`, as `pycocotools.mask.encode` gives it."""
    pixels = np.asarray(mask, bool).ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    ends = np.concatenate([changes, [pixels.size]]) if pixels.size else np.zeros(1, np.int64)
    runs = np.diff(ends, prepend=0).tolist()
    if pixels.size and pixels[0]:
        runs.insert(0, 0)  # the first run is of pixels outside
    return {"size": [int(side) for side in np.shape(mask)], "counts": _packed(runs)}


def _packed(runs: list[int]) -> str:
    """Five bits a character, the lowest first, a sixth while more follow; from the fourth run on the difference to the
    run of the same kind before."""
    text = []
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + 32 * more))
    return "".join(text)


def mask_of_runs(counts: str | Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """The inverse of :func:`run_lengths`: bool `[H, W]` of `counts`, packed or numbers.

    Raises:
      ValueError: they are no runs of a mask of this size.
    """
    runs = np.asarray(_unpacked(counts) if isinstance(counts, str) else counts, np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError(f"run lengths do not add up to {size[0]} x {size[1]} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size, order="F")


def _unpacked(text: str) -> list[int]:
    """The inverse of :func:`_packed`."""
    runs: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("run lengths are no string of COCO's")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs
