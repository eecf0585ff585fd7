"""What a person looks at when pictures are colored: sheets of gray, colored and true pictures, and files."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from jax_densevit.metrics.image import colorfulness
from jax_densevit.tasks import pictures


def rows(examples: list[dict[str, np.ndarray]], **columns: str) -> list[dict[str, np.ndarray]]:
    """The rows of :func:`sheet` from a task's examples: `columns` says which entry of an example is shown as what."""
    return [
        {**{shown: example[entry] for shown, entry in columns.items()}, "name": example.get("name", "")}
        for example in examples
    ]


def sheet(rows: Sequence[dict[str, Any]]) -> Image.Image:
    """A picture sheet: gray, then every model in the order of the first row, then the truth; see :func:`line`."""
    models = [name for name in rows[0] if name not in ("gray", "truth", "name")]
    return pictures.page(["gray", *models, "truth"], [line(row) for row in rows])


def line(row: dict[str, Any]) -> tuple[list[Image.Image], str]:
    """One row of a picture sheet: its pictures, gray, models' and true one, and a caption that says their PSNR.

    Args:
      row: "gray" uint8 `[H, W]`; pictures uint8 `[H, W, 3]` under the names of their models, such as "model" or
        "U-Net"; "truth" uint8 `[H, W, 3]` and "name", if known.
    """
    models = {name: row[name] for name in row if name not in ("gray", "truth", "name")}
    shown = {"gray": np.repeat(row["gray"][..., None], 3, 2), **models}
    height, width = row["gray"].shape
    parts = [str(row["name"])] if row.get("name") else []
    parts.append(f"{width} x {height}")
    if "truth" in row:
        parts += [f"{name} {_decibels(row['truth'], picture)}" for name, picture in shown.items()]
        shown["truth"] = row["truth"]
    return [pictures.fit(np.asarray(picture)) for picture in shown.values()], "   ·   ".join(parts)


def files(
    image: np.ndarray, picture: np.ndarray, facts: dict[str, Any], how: str = ""
) -> tuple[Image.Image, dict[str, Any]]:
    """A colored picture uint8 `[H, W, 3]` and its JSON; `image` is what was given, `how` says how it was made gray."""
    picture = np.asarray(picture)
    gray = bool((image == image[..., :1]).all())
    given = {"input": "gray" if gray else f"color, made gray first{how}", "input_size": list(image.shape[:2])}
    size = {"height": picture.shape[0], "width": picture.shape[1]}
    return Image.fromarray(picture), {**facts, **given, **size, "colorfulness": colorfulness(picture)}


def _decibels(truth: np.ndarray, picture: np.ndarray) -> str:
    error = np.mean((truth.astype(np.float64) - picture) ** 2)
    return "identical" if error == 0 else f"{10 * np.log10(255**2 / error):.1f} dB"
