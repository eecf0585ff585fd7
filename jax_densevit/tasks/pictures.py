"""What a person looks at: picture sheets, colour overlays, label maps, confusion matrices."""

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jax_densevit.data.source import DataInfo

PAPER, INK, FAINT = (255, 255, 255), (32, 33, 36), (110, 114, 120)
IGNORED = (222, 222, 226)
WRONG = (220, 30, 50)
FRAME = (200, 202, 206)
_CELL, _GAP, _MARGIN = 256, 12, 20
_TINY = 128  # a picture this small is enlarged by whole factors, pixels staying visible


def colors(info: DataInfo) -> np.ndarray:
    """uint8 `[K, 3]`: the palette of the data, or well separated hues where it has none, a background being black."""
    if len(info.palette) >= len(info.classes):
        return np.array(info.palette[: len(info.classes)], np.uint8)
    hues = [
        colorsys.hsv_to_rgb((i * 0.618034) % 1, 0.62 + 0.3 * (i % 2), 0.95 - 0.25 * (i // 2 % 2)) for i in range(256)
    ]
    palette = np.round(np.array(hues[: len(info.classes)]) * 255).astype(np.uint8)
    if _has_background(info):
        palette = np.concatenate([np.zeros((1, 3), np.uint8), palette[:-1]])
    return palette


def paint(labels: np.ndarray, info: DataInfo) -> np.ndarray:
    """A label map in the colours of its classes, uint8 `[H, W, 3]`; ids that are no class are light gray."""
    table = np.concatenate([colors(info), [IGNORED]]).astype(np.uint8)
    labels = np.asarray(labels, np.int64)
    known = (labels >= 0) & (labels < len(info.classes)) & (labels != info.ignore)
    return table[np.where(known, labels, len(table) - 1)]


def sheet(examples: Sequence[dict[str, Any]], info: DataInfo) -> Image.Image:
    """A picture sheet, one row per example: image, prediction, labels, errors; with a legend of the classes.

    Args:
      examples: each with "image" uint8 `[H, W, 3]`, "predicted_labels" `[H, W]`, and "labels" and "name" if known;
        "predicted_colors" uint8 `[H, W, 3]`, where a model paints, has a column of its own.
      info: class names, palette and ignore value.
    """
    painted = ["output"] if all("predicted_colors" in example for example in examples) else []
    columns = ["image", *painted, "prediction"]
    if all("labels" in example for example in examples):
        columns += ["labels", "errors"]
    rows = []
    for example in examples:
        cells = [fit(example["image"])]
        cells += [fit(example["predicted_colors"], nearest=True)] if painted else []
        cells.append(fit(paint(example["predicted_labels"], info), nearest=True))
        if "labels" in columns:
            cells += [fit(paint(example["labels"], info), nearest=True), fit(_errors(example, info), nearest=True)]
        rows.append((cells, _caption(example, info)))
    shown = _present(examples, info)
    entries = [(info.classes[i], colors(info)[i]) for i in shown] + [("not labelled", IGNORED)]
    legend = _legend(entries, _page_width(columns), _font(14))
    return page(columns, rows, legend)


def comparison(
    examples: Sequence[dict[str, Any]], predictions: dict[str, Sequence[np.ndarray]], info: DataInfo
) -> Image.Image:
    """A sheet of several models, one row per example: image, the answer of every model, labels; a legend below.

    Args:
      examples: each with "image" uint8 `[H, W, 3]`, "labels" `[H, W]`, and "name" if known.
      predictions: label maps `[H, W]` by the name of the model, one per example.
      info: class names, palette and ignore value.
    """
    columns, rows = ["image", *predictions, "labels"], []
    for i, example in enumerate(examples):
        maps = [answers[i] for answers in predictions.values()]
        cells = [fit(example["image"]), *(fit(paint(map_, info), nearest=True) for map_ in (*maps, example["labels"]))]
        labels, parts = np.asarray(example["labels"], np.int64), [str(example["name"])] if "name" in example else []
        scored = labels != info.ignore
        if scored.any():
            shares = zip(predictions, maps, strict=True)
            parts += [f"{name} {_percent((np.asarray(map_) == labels)[scored].mean())} right" for name, map_ in shares]
        rows.append((cells, "   ·   ".join(parts)))
    shown = _present(
        [{**example, "predicted_labels": p[i]} for i, example in enumerate(examples) for p in predictions.values()],
        info,
    )
    entries = [(info.classes[i], colors(info)[i]) for i in shown] + [("not labelled", IGNORED)]
    return page(columns, rows, _legend(entries, _page_width(columns), _font(14)))


def page(columns: Sequence[str], rows: Sequence[tuple[Sequence[Image.Image], str]], footer: Any = None) -> Image.Image:
    """Pictures in titled columns on white paper.

    Args:
      columns: the titles.
      rows: per row one picture per column, from :func:`fit`, and the caption below them.
      footer: a picture as wide as the page, such as a legend.
    """
    font, bold = _font(14), _font(16)
    title, below = 34, 0 if footer is None else footer.height
    height = title + sum(max(cell.height for cell in cells) + 30 for cells, _ in rows) + below + _MARGIN
    page = Image.new("RGB", (_page_width(columns), height), PAPER)
    draw = ImageDraw.Draw(page)
    for i, name in enumerate(columns):
        draw.text((_MARGIN + i * (_CELL + _GAP) + _CELL // 2, title // 2 + 4), name, INK, bold, anchor="mm")
    top = title
    for cells, caption in rows:
        row = max(cell.height for cell in cells)
        for i, cell in enumerate(cells):
            left = _MARGIN + i * (_CELL + _GAP) + (_CELL - cell.width) // 2
            page.paste(cell, (left, top))
            # A frame, or white classes would run into the page.
            draw.rectangle((left - 1, top - 1, left + cell.width, top + cell.height), outline=FRAME)
        draw.text((_MARGIN, top + row + 5), caption, FAINT, font)
        top += row + 30
    if footer is not None:
        page.paste(footer, (0, top))
    return page


def overlay(image: np.ndarray, labels: np.ndarray, info: DataInfo) -> Image.Image:
    """The image tinted with the classes' colours (not the background), borders drawn, a legend with shares below."""
    labels = np.asarray(labels, np.int64)
    image, labels = enlarge_tiny(image), enlarge_tiny(labels)
    strength = np.where((labels == 0) & _has_background(info), 0, 0.5)[..., None]
    mixed = (1 - strength) * image + strength * paint(labels, info)
    edge = np.zeros(labels.shape, bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    mixed[edge] = 255
    picture = Image.fromarray(np.round(mixed).astype(np.uint8))
    width = max(picture.width, 320)
    font = _font(int(np.clip(width / 50, 13, 48)))
    shares = np.bincount(np.clip(labels, 0, len(info.classes)).ravel(), minlength=len(info.classes) + 1) / labels.size
    order = [i for i in np.argsort(-shares[:-1], kind="stable") if shares[i] > 0]
    entries = [(f"{info.classes[i]}  {_percent(shares[i])}", colors(info)[i]) for i in order]
    legend = _legend(entries, width, font)
    page = Image.new("RGB", (width, picture.height + legend.height), PAPER)
    page.paste(picture, ((width - picture.width) // 2, 0))
    page.paste(legend, (0, picture.height))
    return page


def enlarge_tiny(pixels: np.ndarray) -> np.ndarray:
    """`[H, W, ...]`, each pixel repeated where the picture is too small to be looked at."""
    factor = 2 * _TINY // max(pixels.shape[:2]) if max(pixels.shape[:2]) <= _TINY else 1
    return pixels.repeat(factor, 0).repeat(factor, 1)


def label_map(labels: np.ndarray, info: DataInfo) -> Image.Image:
    """A palette PNG whose indices are the class ids (16-bit gray above 256 classes, which no palette holds)."""
    if len(info.classes) > 256:
        return Image.fromarray(np.asarray(labels).astype(np.uint16))
    picture = Image.fromarray(np.asarray(labels).astype(np.uint8))
    table = np.zeros((256, 3), np.uint8)
    table[: len(info.classes)] = colors(info)
    picture.putpalette(table.tobytes())
    return picture


def report(labels: np.ndarray, confidence: np.ndarray | None, info: DataInfo) -> dict[str, Any]:
    """What a JSON says of a label map `[H, W]`, and of the probability of the chosen classes if it is known."""
    confidence = None if confidence is None else np.asarray(confidence, np.float64)

    def mean(where: Any = ...) -> float | None:
        return None if confidence is None else float(confidence[where].mean())

    counts = np.bincount(labels.ravel(), minlength=len(info.classes))
    return {
        "height": int(labels.shape[0]),
        "width": int(labels.shape[1]),
        "mean_confidence": mean(),
        "classes": [
            {
                "id": i,
                "class": name,
                "pixels": int(counts[i]),
                "share": counts[i] / labels.size,
                "mean_confidence": mean(labels == i),
            }
            for i, name in enumerate(info.classes)
            if counts[i]
        ],
    }


def confusion_picture(matrix: Sequence[Sequence[int]], classes: Sequence[str], title: str = "") -> Image.Image:
    """A confusion matrix in per cent of each class's labelled pixels; `matrix` `[K, K + 1]`, rows = labels.

    The last column (predictions that are no class) is drawn only where it holds something.
    """
    matrix = np.asarray(matrix, np.float64)
    columns = list(classes)
    if matrix[:, -1].any():
        columns.append("no class")
    matrix = matrix[:, : len(columns)]
    total = matrix.sum(1, keepdims=True)
    share = np.divide(100 * matrix, total, out=np.full(matrix.shape, np.nan), where=total > 0)
    k = len(classes)
    side = float(np.clip(2.5 + 0.45 * k, 4.5, 22))
    figure = new_figure(side + 1, side)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axes.set_facecolor("0.93")  # shows through where a class has no labelled pixels
    size = 9 if k <= 40 else 5
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=size)
    axes.set_yticks(range(k), classes, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("labelled")
    axes.set_title(title or "Confusion, % of labelled pixels", fontsize=11)
    if k <= 25:
        for i, row in enumerate(share):
            for j, value in enumerate(row):
                if np.isfinite(value) and value >= 0.05:
                    color = "white" if value > 55 else "0.15"
                    axes.text(
                        j,
                        i,
                        f"{value:.0f}" if value >= 9.95 else f"{value:.1f}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color=color,
                    )
    figure.colorbar(image, shrink=0.75, label="%")
    return drawn(figure)


def new_figure(width: float, height: float) -> Any:
    """A figure of matplotlib's, in inches, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and seldom needed
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def drawn(figure: Any) -> Image.Image:
    """What a figure shows."""
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[:, :, :3].copy())


def _errors(example: dict[str, Any], info: DataInfo) -> np.ndarray:
    """The image, pale and gray, with wrong pixels in red and unlabelled ones light gray."""
    gray = example["image"].astype(np.float32).mean(-1, keepdims=True)
    picture = np.repeat(120 + gray * 0.5, 3, axis=-1)
    labels = np.asarray(example["labels"], np.int64)
    wrong = (labels != np.asarray(example["predicted_labels"])) & (labels != info.ignore)
    picture[wrong] = 0.15 * picture[wrong] + 0.85 * np.array(WRONG)
    picture[labels == info.ignore] = IGNORED
    return np.clip(picture, 0, 255).astype(np.uint8)


def _caption(example: dict[str, Any], info: DataInfo) -> str:
    height, width = example["image"].shape[:2]
    parts = [str(example["name"])] if "name" in example else []
    parts.append(f"{width} x {height}")
    if "labels" in example:
        labels = np.asarray(example["labels"], np.int64)
        scored = labels != info.ignore
        if scored.any():
            right = (labels == np.asarray(example["predicted_labels"]))[scored].mean()
            parts.append(f"{_percent(right)} of the labelled pixels right")
        else:
            parts.append("nothing labelled")
    return "   ·   ".join(parts)


def _present(examples: Sequence[dict[str, Any]], info: DataInfo) -> list[int]:
    """All classes if they are few, else those that occur in the examples."""
    if len(info.classes) <= 30:
        return list(range(len(info.classes)))
    maps = [np.unique(example[key]) for example in examples for key in ("labels", "predicted_labels") if key in example]
    return [int(i) for i in np.unique(np.concatenate(maps)) if 0 <= i < len(info.classes) and i != info.ignore]


def _legend(entries: Sequence[tuple[str, Any]], width: int, font) -> Image.Image:
    """Colour chips with names, in rows as wide as the page."""
    line = int(font.size * 1.75)
    chip = int(font.size * 1.1)
    places, x, y = [], _MARGIN, line // 2
    for name, color in entries:
        needed = chip + 8 + int(font.getlength(name)) + 22
        if x + needed > width and x > _MARGIN:
            x, y = _MARGIN, y + line
        places.append((x, y, name, tuple(int(c) for c in color)))
        x += needed
    page = Image.new("RGB", (width, y + line + line // 2), PAPER)
    draw = ImageDraw.Draw(page)
    for x, y, name, color in places:
        draw.rounded_rectangle((x, y, x + chip, y + chip), 3, color, FAINT, 1)
        draw.text((x + chip + 8, y + chip // 2), name, INK, font, anchor="lm")
    return page


def _page_width(columns: Sequence[str]) -> int:
    return 2 * _MARGIN + len(columns) * _CELL + (len(columns) - 1) * _GAP


def fit(picture: np.ndarray, nearest: bool = False) -> Image.Image:
    """Into a cell, aspect kept. Tiny pictures grow so that their pixels stay visible; label maps never mix colours."""
    picture = Image.fromarray(picture)
    factor = min(_CELL / picture.width, _CELL * 1.5 / picture.height)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    how = Image.Resampling.NEAREST if nearest or max(picture.size) <= _TINY else Image.Resampling.LANCZOS
    return picture.resize(size, how)


def _font(size: int):
    return ImageFont.load_default(size)


def _has_background(info: DataInfo) -> bool:
    return info.classes[0].lower() in ("background", "other", "void")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 or share == 0 else "< 0.1 %"
