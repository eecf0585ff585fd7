"""Files with more arrays than any model, or larger than the machine: refused before memory is taken."""

import os
from pathlib import Path

from jax_densevit.errors import UserError

MAX_ARRAYS = 100_000  # the largest models and their optimizers have some thousands


def check_room(path: str | os.PathLike, arrays: int, size: int) -> None:
    """Raises :class:`UserError` where `arrays` arrays of `size` bytes together are more than a model, or the machine,
    can be.
    """
    if arrays > MAX_ARRAYS:
        raise UserError(f"{path} holds {arrays:,} arrays, and no model has more than {MAX_ARRAYS:,}; it is refused.")
    if size > (memory := machine_bytes()):
        raise UserError(
            f"{path} holds {size / 2**30:,.1f} GiB of arrays and this machine has {memory / 2**30:,.1f} GiB of memory; "
            "use one with more."
        )


def check_listing(file: Path) -> None:
    """Raises :class:`UserError` for a list of arrays (names, shapes; about 1 KB each) longer than any model's."""
    if file.is_file() and file.stat().st_size > 2**26:
        raise UserError(f"{file} lists more arrays than any model has; it is refused.")


def machine_bytes() -> int:
    """The memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
