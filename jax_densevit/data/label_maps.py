"""From the values in a mask file to labels: 0..K-1 for the classes, 255 for what is neither learned nor scored."""

import os
from collections.abc import Iterable, Mapping

import numpy as np

from jax_densevit.data.diagnosis import Value, count_values, describe, explain_unknown
from jax_densevit.data.source import IGNORE
from jax_densevit.errors import UserError

UNKNOWN = 254  # marks file values that no rule covers; so K is at most 254

# labelId -> trainId of Cityscapes; every other id is not evaluated (cityscapesScripts' labels.py).
CITYSCAPES_TRAIN_IDS = dict(
    zip((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33), range(19), strict=True)
)


class LabelMap:
    """The rule that turns the values of a mask file into labels; calling it applies the rule.

    Args:
      classes: class names in label order (their number is K, at most 254).
      id_map: {value in the file: label}; a label of 255 ignores. Keys may be strings of digits (configs, JSON).
      other: with `id_map`, the label of every value it does not list (255 to ignore them); None refuses such values.
      ignore: value or values in the file that are ignored, among them RGB triples for masks in color. None means 255.
      reduce_zero_label: 0 in the file is ignored and the value k is class k-1 (ADE20K).
      threshold: values >= threshold are class 1, lower ones class 0: 1 for "anything but 0", 128 for soft masks.
      palette: one RGB triple per class; masks in color are read with it.

    Raises:
      UserError: rules that contradict each other.
    """

    def __init__(
        self,
        classes: Iterable[str],
        *,
        id_map: Mapping | None = None,
        other: int | None = None,
        ignore: int | Iterable | None = None,
        reduce_zero_label: bool = False,
        threshold: int = 0,
        palette: Iterable[Iterable[int]] = (),
    ):
        self.classes = tuple(classes)
        count = len(self.classes)
        rules = [
            name
            for name, on in (("id_map", id_map), ("reduce_zero_label", reduce_zero_label), ("threshold", threshold))
            if on
        ]
        if not 1 <= count <= UNKNOWN:
            raise UserError(f"There are {count} classes; give the names of 1 to {UNKNOWN} classes in `classes`.")
        if len(rules) > 1:
            raise UserError(f"{' and '.join(rules)} contradict each other; set one of them.")
        if other is not None and not id_map:
            raise UserError("other=... says what becomes of values that id_map does not list; give id_map too.")
        if threshold and count != 2:
            raise UserError(f"threshold={threshold} makes two classes, but {count} are named; name two in `classes`.")
        ids, colors = _split_ignore(ignore)
        table = np.full(65_536, UNKNOWN, np.uint8)
        if threshold:
            table[:threshold], table[threshold:] = 0, 1
        elif id_map:
            if other is not None:
                table[:] = _label(other, count, "other")
            for value, label in id_map.items():
                table[_value(value, "id_map")] = _label(label, count, f"id_map[{value}]")
        elif reduce_zero_label:
            table[0] = IGNORE
            table[1 : count + 1] = np.arange(count)
        else:
            table[:count] = np.arange(count)
        # 255 is "ignore" in nearly every data set. Where nobody said so it is a guess, which `suspicious` distrusts.
        self.guessed_ignore = ignore is None and table[255] == UNKNOWN
        for value in (255,) if self.guessed_ignore else ids:
            if not threshold and table[value] not in (UNKNOWN, IGNORE) and table[value] != other:
                name = self.classes[table[value]]
                raise UserError(
                    f"ignore={value} is also the value of class {table[value]} ({name!r}); take that name out of "
                    f"`classes` if it is no class, or map it away with id_map={{..., {value}: 255}}."
                )
            table[value] = IGNORE
        self.table = table
        self._bytes = table[:256].tobytes()
        # The first so many values are labels already.
        self._same = int(np.argmin(table[: count + 1] == np.arange(count + 1))) if count < UNKNOWN else 0
        self.threshold = threshold
        self.palette = tuple(tuple(int(part) for part in color) for color in palette)
        if self.palette and len(self.palette) != count:
            raise UserError(
                f"palette has {len(self.palette)} colors for {count} classes; give one RGB triple per class."
            )
        if any(len(color) != 3 or not all(0 <= part <= 255 for part in color) for color in (*self.palette, *colors)):
            raise UserError("palette and ignored colors must be triples of 0..255, such as (128, 0, 0).")
        if len(set(self.palette)) != len(self.palette) and colors:
            raise UserError("palette names one color twice, so masks in color cannot be read with it.")
        self._colors = {color: label for label, color in enumerate(self.palette)} | dict.fromkeys(colors, IGNORE)
        self._color_table: np.ndarray | None = None

    def __call__(self, raw: np.ndarray, path: str | os.PathLike) -> np.ndarray:
        """Labels uint8 [H, W] of a mask as :func:`~jax_densevit.data.images.read_labels` returns it.

        Raises:
          UserError: naming `path`, the values that no rule covers, and the option that probably does.
        """
        raw = self.values(raw)
        if raw.ndim == 3:
            labels = self._from_colors(raw, path)
        elif raw.max(initial=0) < self._same:
            return raw.astype(np.uint8, copy=False)
        elif raw.dtype == np.uint8:
            # Eight times as fast as indexing: NumPy would widen every pixel to a 64-bit index first.
            flat = bytearray(np.ascontiguousarray(raw)).translate(self._bytes)
            labels = np.frombuffer(flat, np.uint8).reshape(raw.shape)
        else:
            labels = np.take(self.table, raw, mode="clip")  # in range by its type; "clip" only spares the check
        if (labels == UNKNOWN).any():
            counts = count_values(raw)
            unknown = self.unknown(counts)
            raise UserError(
                f"{path}: {describe(unknown, sum(counts.values()))} belong to no class; "
                f"{explain_unknown(counts, unknown, len(self.classes))}"
            )
        return labels

    def values(self, raw: np.ndarray) -> np.ndarray:
        """What the pixels of a mask mean before mapping: ids [H, W] or colors [H, W, 3].

        Ids saved as RGB with equal channels are ids again, unless there is a palette: then gray is a color too.
        """
        return raw if self.palette else gray_of(raw)

    def label_of(self, value: Value) -> int:
        """The label of one file value or color: 0..K-1, 255 ignored, 254 unknown."""
        return self._colors.get(value, UNKNOWN) if isinstance(value, tuple) else int(self.table[value])

    def unknown(self, counts: Mapping[Value, int]) -> dict[Value, int]:
        """The part of `counts` (pixels per file value) that no rule covers."""
        return {value: n for value, n in counts.items() if self.label_of(value) == UNKNOWN}

    def suspicious(self, counts: Mapping[Value, int]) -> str:
        """A warning where all values are allowed but hardly meant (0 and 255, with 255 ignored by default), or ""."""
        learned = [value for value in counts if self.label_of(value) < UNKNOWN]
        if not self.guessed_ignore or 255 not in counts or len(learned) > 1:
            return ""
        only = f"the ids {learned[0]} and 255" if learned else "the id 255"
        return (
            f"the masks have only {only}, and 255 means 'ignore': if 255 is an object, set threshold=1; "
            "if it really is to be ignored, say so with ignore=255."
        )

    def _from_colors(self, raw: np.ndarray, path) -> np.ndarray:
        if not self.palette:
            raise UserError(
                f"{path} is a mask in color; give its colors in class order as palette=((r, g, b), ...), or save the "
                "class ids as 8-bit gray PNG."
            )
        if self._color_table is None:
            table = np.full(1 << 24, UNKNOWN, np.uint8)
            for (red, green, blue), label in self._colors.items():
                table[red << 16 | green << 8 | blue] = label
            self._color_table = table
        wide = raw.astype(np.uint32)
        return self._color_table[wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]]


def gray_of(raw: np.ndarray) -> np.ndarray:
    """[H, W] of a picture saved as RGB although all three channels are equal; anything else unchanged."""
    if raw.ndim == 3 and np.array_equal(raw[..., 0], raw[..., 1]) and np.array_equal(raw[..., 0], raw[..., 2]):
        return raw[..., 0]
    return raw


def _split_ignore(ignore) -> tuple[list[int], list[tuple[int, int, int]]]:
    """The ignored ids and the ignored colors of an `ignore` option."""
    if ignore is None:
        return [], []
    if isinstance(ignore, int):
        return [_value(ignore, "ignore")], []
    items = list(ignore)
    if items and all(isinstance(item, int) for item in items) and len(items) != 3:
        return [_value(item, "ignore") for item in items], []
    if len(items) == 3 and all(isinstance(item, int) for item in items):
        raise UserError(f"ignore={tuple(items)} may mean three ids or a color; write ({tuple(items)},) for the color.")
    return (
        [_value(item, "ignore") for item in items if isinstance(item, int)],
        [tuple(item) for item in items if not isinstance(item, int)],
    )


def _value(value, where: str) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number <= 65_535:
        raise UserError(f"{where}: {value!r} is no value of a mask file; these are 0 to 65535.")
    return number


def _label(label, count: int, where: str) -> int:
    if not isinstance(label, int) or not (0 <= label < count or label == IGNORE):
        raise UserError(f"{where}={label!r} is no label; labels are 0 to {count - 1}, or 255 to ignore.")
    return label
