"""Writes files as `torch.save` does, zip form and legacy form, without PyTorch, byte for byte enough to be read by it.

Pickle protocol 2, written instruction by instruction: tensors are calls of `torch._utils._rebuild_tensor_v2` on
persistent ids. (PyTorch's own `torch.load` was checked once to read the files of both forms.)
"""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
BFLOAT16 = ml_dtypes.bfloat16


class Tensor:
    """A tensor described outright: `values` is its storage, the rest in elements."""

    def __init__(self, values, offset, shape, strides):
        self.values, self.offset, self.shape, self.strides = np.asarray(values).ravel(), offset, shape, strides


def describe(array: np.ndarray) -> Tensor:
    """An array with the strides that it has in memory."""
    order = np.argsort([-stride for stride in array.strides], kind="stable")
    storage = np.ascontiguousarray(array.transpose(order))
    strides = np.empty(array.ndim, int)
    strides[order] = [stride // array.itemsize for stride in storage.strides]
    return Tensor(storage, 0, array.shape, tuple(strides.tolist()))


class Pickler:
    """Nested dicts, lists, tuples, numbers, strings, arrays and `Tensor`s as pickle instructions; collects storages."""

    def __init__(self, legacy: bool):
        self.legacy, self.storages = legacy, []

    def dump(self, value: Any) -> bytes:
        return b"\x80\x02" + self.code(value) + b"."

    def text(self, value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def code(self, value: Any) -> bytes:
        if isinstance(value, dict):
            pairs = b"".join(self.code(key) + self.code(item) for key, item in value.items())
            return b"ccollections\nOrderedDict\n)R(" + pairs + b"u"
        if isinstance(value, list):
            return b"](" + b"".join(map(self.code, value)) + b"e"
        if isinstance(value, tuple):
            return b"(" + b"".join(map(self.code, value)) + b"t"
        if isinstance(value, np.ndarray):
            return self.tensor(describe(value))
        if isinstance(value, Tensor):
            return self.tensor(value)
        return pickle.dumps(value, protocol=2)[2:-1]

    def tensor(self, tensor: Tensor) -> bytes:
        self.storages.append(tensor.values)
        name = STORAGES[tensor.values.dtype.name]
        key = str(len(self.storages) - 1)
        parts = [self.text("storage"), f"ctorch\n{name}\n".encode(), self.text(key), self.text("cpu")]
        parts.append(self.code(len(tensor.values)))
        if self.legacy:
            parts.append(b"N")
        storage = b"(" + b"".join(parts) + b"tQ"
        arguments = [self.code(tensor.offset), self.code(tuple(tensor.shape)), self.code(tuple(tensor.strides))]
        hooks = b"ccollections\nOrderedDict\n)R"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"".join(arguments) + b"\x89" + hooks + b"tR"


def write_zip(path: Path, tree: Any, *, data_pickle: bytes | None = None, members: dict | None = None) -> Path:
    """The form since PyTorch 1.6; `data_pickle` and `members` (name -> bytes) replace or add what it holds."""
    pickler = Pickler(legacy=False)
    archive = {"archive/data.pkl": pickler.dump(tree), "archive/byteorder": b"little"}
    archive |= {f"archive/data/{i}": values.tobytes() for i, values in enumerate(pickler.storages)}
    archive["archive/version"] = b"3\n"
    if data_pickle is not None:
        archive["archive/data.pkl"] = data_pickle
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, content in {**archive, **(members or {})}.items():
            file.writestr(name, content)
    return path


def write_legacy(path: Path, tree: Any) -> Path:
    """The form before PyTorch 1.6."""
    pickler = Pickler(legacy=True)
    body = pickler.dump(tree)
    sizes = {"short": 2, "int": 4, "long": 4}
    parts = [
        pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2),
        pickle.dumps(1001, protocol=2),
        pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": sizes}, protocol=2),
        body,
        pickle.dumps([str(i) for i in range(len(pickler.storages))], protocol=2),
    ]
    for values in pickler.storages:
        parts += [struct.pack("<q", len(values)), values.tobytes()]
    path.write_bytes(b"".join(parts))
    return path
