"""Weight files of every framework as plain arrays, without that framework and without running anything in them."""

import dataclasses
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_densevit.errors import UserError
from jax_densevit.pretrained import npz_files, safetensors_files, tf_bundle, torch_files
from jax_densevit.pretrained.unpickle import Name
from jax_densevit.pretrained.zip_members import Members

_MAX_DEPTH = 32
_MAX_ENTRIES = 1_000_000
# What damaged or hostile bytes make the readers raise.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    NotImplementedError,  # a zip member compressed by a method that zipfile does not know
    RecursionError,
    RuntimeError,  # an encrypted zip member
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What is in a weight file.

    Attributes:
      tensors: name -> array. Nested dicts and lists are flattened, their keys joined by dots.
      scalars: name -> number, string or None: epochs, hyperparameters, class names.
    """

    tensors: dict[str, np.ndarray]
    scalars: dict[str, Any]


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a weight file by name: `contents(path).tensors`."""
    return contents(path).tensors


def contents(path: str | os.PathLike) -> Contents:
    """Reads a weight file; what it is is seen from its bytes, not from its ending.

    - NumPy `.npz`, no object arrays. bfloat16 stored as two raw bytes becomes bfloat16.
    - `.safetensors`.
    - PyTorch `.pth`, `.pt`, `.bin`, in the zip form and the older one: tensors, dicts, lists, numbers and strings. A
      file that wants any other object is refused, since building it could run code. Checksums of the zip form are
      checked. The older form has none: where the file's name ends with the start of its SHA-256, as published names
      do (`-b3be5167.pth`), that is compared.
    - TensorFlow 2 checkpoints: `<prefix>.index` or `<prefix>`. Their checksums are checked. Strings are left out.
    - Orbax: a folder of a tree of arrays, a step of several, or a workdir of this library, of which the newest step is
      read. Where there is a manifest, as in every checkpoint of ours, it is checked. (`config.init` and the commands
      take a workdir itself, nothing needs to be read.)

    Arrays of PyTorch and TensorFlow files are read-only views into the memory-mapped file, with the strides that they
    were saved with: reading costs no memory beyond the file's own pages, which the system can drop. Do not change the
    file while they are in use.

    Raises:
      UserError: no such file, an unknown format, a damaged or truncated file, or one that holds more than weights.
    """
    path = Path(path)
    try:
        tree = _tree(path)
        return _flatten(path, tree)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error
    except _DAMAGE as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} is damaged or not a weight file ({reason}); get the file again.") from error


def _tree(path: Path) -> Mapping[str, Any]:
    if path.is_dir():
        from jax_densevit.pretrained import orbax_files  # imports for a second, and is seldom wanted

        return orbax_files.load(path.absolute())
    if path.suffix == ".index" or (not path.exists() and Path(f"{path}.index").exists()):
        return tf_bundle.load(path if path.suffix == ".index" else Path(f"{path}.index"))
    with open(path, "rb") as file:
        start = file.read(16)
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        members = Members(path)
        if members.torch_root() is not None:
            return torch_files.load_zip(members)
        return npz_files.load(members)
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        return safetensors_files.load(path)
    if start[:1] == b"\x80":
        return torch_files.load_legacy(path)
    raise UserError(
        f"{path} is in no known format; known are .npz, .safetensors, PyTorch's .pth, .pt and .bin, TensorFlow 2's "
        ".index (with its .data files beside it), and Orbax's folders."
    )


def _flatten(path: Path, tree: Any) -> Contents:
    tensors: dict[str, np.ndarray] = {}
    scalars: dict[str, Any] = {}
    # Neither recursion nor methods of the containers: both are in the hand of whoever wrote the file.
    waiting = [((), tree)]
    count = 0
    while waiting:
        keys, value = waiting.pop()
        count += 1
        if count > _MAX_ENTRIES or len(keys) > _MAX_DEPTH:
            raise UserError(f"{path} nests or repeats its entries as no checkpoint does; it is refused.")
        if isinstance(value, dict):
            waiting += [((*keys, str(key)), item) for key, item in reversed(dict.items(value))]
            continue
        if isinstance(value, Name):  # a type, such as torch.float32
            value = f"{value.module}.{value.name}"
        if isinstance(value, list | tuple):
            waiting += [((*keys, str(i)), item) for i, item in reversed(list(enumerate(value)))]
            continue
        name = ".".join(keys)
        if name in tensors or name in scalars:
            raise UserError(f"{path} has two entries {name!r}; it is refused.")
        if isinstance(value, np.ndarray):
            tensors[name] = value
        else:
            scalars[name] = value
    if not tensors:
        raise UserError(f"{path} holds no tensors.")
    return Contents(tensors, scalars)
