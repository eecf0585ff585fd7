"""What a person looks at: objects with outlines, sheets of them, their files, and curves of average precision."""

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from jax_densevit.data.run_lengths import run_lengths
from jax_densevit.tasks.objects import ObjectClasses
from jax_densevit.tasks.pictures import drawn, enlarge_tiny, fit, new_figure, page

_MOST_NAMED = 40  # in a picture of more objects names would hide them


def outlined(
    image: np.ndarray,
    segments: np.ndarray,
    names: dict[int, str],
    size: tuple[int, int],
    hues: dict[int, int] | None = None,
) -> Image.Image:
    """The image with every object tinted, outlined and named.

    Args:
      image: uint8 `[H, W, 3]`.
      segments: integers `[H, W]`, 0 = none.
      names: what to write at an object, by its number.
      size: (width, height) of the picture.
      hues: the number whose colour an object has, where that is not its own.
    """
    smooth = Image.Resampling.NEAREST if size[0] >= 2 * image.shape[1] else Image.Resampling.LANCZOS
    pixels = np.asarray(Image.fromarray(image).resize(size, smooth), np.float32)
    ids = np.asarray(Image.fromarray(segments.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    hues = {number: number for number in range(1, int(ids.max(initial=0)) + 1)} | (hues or {})
    colors = np.array([(0, 0, 0), *(_hue(hues[number]) for number in sorted(hues))], np.float32)
    tinted = np.where((ids > 0)[..., None], 0.65 * pixels + 0.35 * colors[ids], pixels)
    edge = np.zeros(ids.shape, bool)
    for width in range(1, 2 + max(size) // 600):
        for axis in (0, 1):
            for step in (width, -width):
                moved = np.roll(ids, step, axis)
                edge |= (ids > 0) & (moved != ids)
    tinted[edge] = colors[ids[edge]]
    picture = Image.fromarray(np.clip(tinted, 0, 255).astype(np.uint8))
    if len(names) <= _MOST_NAMED:
        draw = ImageDraw.Draw(picture)
        font = ImageFont.load_default(int(np.clip(size[0] / 40, 11, 30)))
        for number, name in names.items():
            rows, columns = np.nonzero(ids == number)
            if rows.size and name:
                left, top, right, bottom = draw.textbbox((0, 0), name, font)
                x = int(np.clip(columns.min(), 0, max(0, size[0] - right - 4)))
                y = int(np.clip(rows.min() - bottom - 2, 0, max(0, size[1] - bottom - 4)))
                color = tuple(int(c) for c in colors[number])
                draw.rectangle((x, y, x + right + 3, y + bottom + 1), color)
                draw.text((x + 2, y), name, (0, 0, 0) if sum(color) > 380 else (255, 255, 255), font)
    return picture


def sheet(examples: Sequence[dict[str, Any]], kinds: ObjectClasses) -> Image.Image:
    """A picture sheet, one row per example: image, prediction, truth; what is not known is gray in the truth."""
    columns, rows = ["image", "prediction", "truth"], []
    for example in examples:
        cell = fit(example["image"])
        predicted, truth = example["predicted_segments"], example["predicted_truth"]
        answers = names(predicted, example["predicted_classes"], kinds, example["predicted_scores"])
        right = names(truth.slots, truth.classes, kinds, crowd=truth.crowd)
        shown = example["image"].copy()
        shown[truth.void] = 222
        cells = [
            cell,
            outlined(example["image"], predicted, answers, cell.size, _hues(predicted, truth.slots)),
            outlined(shown, truth.slots, right, cell.size),
        ]
        height, width = example["image"].shape[:2]
        caption = f"{example.get('name', '')}   ·   {width} x {height}   ·   {len(answers)} found, {len(right)} there"
        rows.append((cells, caption))
    return page(columns, rows)


def names(
    segments: np.ndarray,
    classes: np.ndarray,
    kinds: ObjectClasses,
    scores: np.ndarray | None = None,
    crowd: np.ndarray | None = None,
) -> dict[int, str]:
    """What to write at each object that has pixels: its class, unless there is one only, and its score."""
    found = {}
    for number in np.unique(segments[segments > 0]).tolist():
        label = int(classes[number - 1])
        parts = [kinds.names[label]] if len(kinds.names) > 1 and 0 <= label < len(kinds.names) else []
        parts += [f"{scores[number - 1]:.2f}"] if scores is not None else []
        parts += ["crowd"] if crowd is not None and crowd[number - 1] else []
        found[number] = " ".join(parts)
    return found


def files(
    image: np.ndarray, prediction: dict[str, np.ndarray], kinds: ObjectClasses, facts: dict[str, Any]
) -> tuple[Image.Image, Image.Image, dict[str, Any]]:
    """The 16-bit map of object numbers, the outlines and the JSON of one image."""
    segments, classes = np.asarray(prediction["segments"]), np.asarray(prediction["classes"])
    scores, masks = np.asarray(prediction["scores"], np.float64), np.asarray(prediction["masks"])
    height, width = segments.shape
    rows = []
    for n in np.flatnonzero((classes >= 0) & masks.any((0, 1))).tolist():
        row = {
            "id": n + 1,
            "category_id": kinds.labels[classes[n]],
            "score": float(scores[n]),
            "area": int(masks[..., n].sum()),
            "segmentation": run_lengths(masks[..., n]),  # and no box: pycocotools would take its area for the mask's
        }
        rows.append({"image_id": facts.get("image", ""), **row})
    present = [number for number in np.unique(segments).tolist() if number]
    report = {
        **facts,
        "height": height,
        "width": width,
        "categories": [
            {"id": label, "name": name, "isthing": int(thing)}
            for label, name, thing in zip(kinds.labels, kinds.names, kinds.things, strict=True)
        ],
        "segments_info": [
            {
                "id": number,
                "category_id": kinds.labels[classes[number - 1]],
                "isthing": int(kinds.things[classes[number - 1]]),
                "score": float(scores[number - 1]),
                "area": int((segments == number).sum()),
                "bbox": _box(segments == number),
            }
            for number in present
        ],
        "annotations": rows,
    }
    shown = enlarge_tiny(image)
    overlay = outlined(image, segments, names(segments, classes, kinds, scores), (shown.shape[1], shown.shape[0]))
    return Image.fromarray(segments.astype(np.uint16)), overlay, report


def precision_curve(precision: dict[str, Any]) -> Image.Image:
    """Average precision over the IoU that a match needs: low on the right: rough masks, on the left: missed objects."""
    figure = new_figure(6, 4)
    axes = figure.add_subplot()
    at = [np.nan if value is None else value for value in precision["AP_at"]]
    axes.plot(precision["thresholds"], at, "k", linewidth=2, marker="o")
    axes.set(xlabel="IoU that a match needs", ylabel="average precision", ylim=(0, 1), title="Masks")
    axes.grid(alpha=0.3)
    return drawn(figure)


def _hue(number: int) -> tuple[int, ...]:
    """Neighbouring numbers have colours far apart."""
    hue, value = (number * 0.618034 + 0.02) % 1, 1.0 - 0.2 * (number // 5 % 2)
    return tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.85, value))


def _hues(segments: np.ndarray, truth: np.ndarray) -> dict[int, int]:
    """Of each segment the true object that it has an IoU above one half with, else a number that no object has."""
    found, free = {}, int(truth.max(initial=0))
    for number in range(1, int(segments.max(initial=0)) + 1):
        mine = segments == number
        common = np.bincount(truth[mine], minlength=1)
        common[0] = 0
        best = int(common.argmax())
        if best and 2 * common[best] > (mine | (truth == best)).sum():
            found[number] = best
        else:
            free += 1
            found[number] = free
    return found


def _box(mask: np.ndarray) -> list[int]:
    """COCO's [left, top, width, height] in pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1)]
