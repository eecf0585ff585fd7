"""What the values found in masks suggest: the sentence that names the option which would fix them."""

from collections.abc import Collection, Mapping

import numpy as np

Value = int | tuple[int, int, int]  # what a mask file holds per pixel: an id, or a color


def count_values(raw: np.ndarray) -> dict[Value, int]:
    """Pixels per value of a mask: ids for [H, W], RGB triples for [H, W, 3]; sorted by value."""
    if raw.ndim == 2:
        counts = np.bincount(raw.ravel(), minlength=1)
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    wide = raw.astype(np.uint32)
    codes, counts = np.unique(wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2], return_counts=True)
    return {
        (int(code) >> 16, int(code) >> 8 & 255, int(code) & 255): int(n) for code, n in zip(codes, counts, strict=True)
    }


def describe(counts: Mapping[Value, int], pixels: int = 0) -> str:
    """Reads `the ids 3, 7 (1.2 % of the pixels)`: at most six, the most frequent; no share when `pixels` is 0."""
    kind = "color" if counts and isinstance(next(iter(counts)), tuple) else "id"
    values = sorted(counts, key=counts.get, reverse=True)
    shown = ", ".join(str(value) for value in (sorted(values) if len(values) <= 6 else values[:6]))
    more = f" and {len(values) - 6} more" if len(values) > 6 else ""
    share = f" ({100 * sum(counts.values()) / pixels:.2g} % of the pixels)" if pixels else ""
    return f"the {kind}{'s' if len(values) > 1 else ''} {shown}{more}{share}"


def looks_soft(counts: Mapping[Value, int]) -> bool:
    """Whether gray values look anti-aliased or JPEG-compressed: black and white, and a thin spread of grays between.

    Class ids and object numbers look otherwise: they seldom reach so high, or what lies between is no thin spread.
    """
    if not counts or isinstance(next(iter(counts)), tuple):
        return False
    low, high = min(counts), max(counts)
    between = [n for value, n in counts.items() if low + 16 < value < high - 16]
    black = sum(n for value, n in counts.items() if value <= low + 16)
    white = sum(n for value, n in counts.items() if value >= high - 16)
    return 180 <= high - low <= 255 and len(between) >= 6 and sum(between) < 0.5 * min(black, white)


def explain_unknown(counts: Mapping[Value, int], unknown: Collection[Value], num_classes: int) -> str:
    """Says which option fits masks with these values (of one file or many), some unknown; ends with a full stop."""
    if any(isinstance(value, tuple) for value in unknown):
        return "the masks are colored: complete palette=, one RGB triple per class, and name colors to skip in ignore=."
    if looks_soft(counts):
        return (
            "the mask is soft (anti-aliased or JPEG): for two classes set threshold=128, otherwise save hard-edged PNG."
        )
    if len(counts) <= 2 and num_classes == 2:
        return f"this looks like a 0/{max(counts)} mask: set threshold=1, or id_map={{0: 0, {max(counts)}: 1}}."
    if list(unknown) == [num_classes] and min(counts) == 0:
        return (
            f"if 0 means 'no class' and {num_classes} classes follow, set reduce_zero_label=True; if there are "
            f"{num_classes + 1} classes, name them all; if {num_classes} is void, set ignore={num_classes}."
        )
    if min(unknown) >= 256:
        return "these look like instance or coded ids: use masks of class ids, or list the values in id_map."
    return "list them in id_map={value: label, ...} (255 ignores), set ignore=, or name more classes."
