"""Masks as COCO writes them in JSON: the lengths of runs down the columns, packed into printable characters."""

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
