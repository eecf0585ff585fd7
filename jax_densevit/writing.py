"""Files that are either whole or not there."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax_densevit.errors import UserError


@contextlib.contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to, and renames it to `path` once the block has ended well.

    Raises:
      UserError: the file cannot be written (no permission, disk full).
    """
    path = Path(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}).") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_picture(path: str | os.PathLike, picture: Any) -> None:
    """Saves an image of Pillow's in the format that the name says."""
    with whole_file(path) as part:
        picture.save(part)


def write_json(path: str | os.PathLike, values: dict[str, Any]) -> Path:
    """Writes strict JSON (NaN is refused: undefined values are None), one line per entry of the first two levels."""

    def lines(value: Any, depth: int) -> str:
        if depth and isinstance(value, dict | list) and value:
            inner = "  " * (3 - depth)
            if isinstance(value, dict):
                rows = [f"{json.dumps(str(key))}: {lines(item, depth - 1)}" for key, item in value.items()]
                return "{\n" + ",\n".join(inner + row for row in rows) + f"\n{inner[2:]}}}"
            return "[\n" + ",\n".join(inner + lines(item, depth - 1) for item in value) + f"\n{inner[2:]}]"
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    with whole_file(path) as part:
        # A file's name need not be UTF-8; JSON has an escape for what Python makes of such bytes.
        part.write_text(lines(values, 2) + "\n", encoding="utf-8", errors="backslashreplace")
    return Path(path)
