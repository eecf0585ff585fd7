"""NumPy's `.npz`."""

from typing import Any

import ml_dtypes
import numpy as np

from jax_densevit.errors import UserError
from jax_densevit.pretrained.memory import check_room
from jax_densevit.pretrained.zip_members import Members


def load(members: Members) -> dict[str, np.ndarray]:
    """Name -> array, one after the other in memory; object arrays, which are pickles, are refused."""
    arrays = {}
    check_room(members.path, len(members.names), sum(map(members.size, members.names)))
    for name in members.names:
        if not name.endswith(".npy"):
            raise UserError(f"{members.path} is a zip archive of something else than arrays: it has a member {name!r}.")
        with members.open(name) as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(file)
            if dtype.hasobject:
                raise UserError(
                    f"{members.path} holds objects in {name!r}: reading them could run code, so it is refused; save "
                    "plain arrays."
                )
            array = _read(file, shape, fortran, dtype, members.size(name))
        arrays[name.removesuffix(".npy")] = _bfloat16(array)
    return arrays


def _read(file: Any, shape: tuple[int, ...], fortran: bool, dtype: np.dtype, size: int) -> np.ndarray:
    count = 1
    for side in shape:
        count *= int(side)
    if not 0 <= count * dtype.itemsize <= size:
        raise ValueError(f"a header promises {list(shape)} of {dtype}, more than there is")
    flat = np.empty(count, dtype)
    view, filled = memoryview(flat.view(np.uint8)), 0
    while filled < len(view):
        read = file.readinto(view[filled : filled + 2**24])
        if not read:
            raise EOFError("an array ends early")
        filled += read
    if file.read(1):  # also reaches the end, where the checksum is compared
        raise ValueError("an array is longer than its header says")
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)


def _bfloat16(array: np.ndarray) -> np.ndarray:
    """big_vision's checkpoints store bfloat16 as two raw bytes."""
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array
