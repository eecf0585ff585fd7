"""PyTorch's `torch.save` files, the zip form (since 1.6) and the one before, without PyTorch."""

import hashlib
import io
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jax_densevit.errors import UserError
from jax_densevit.pretrained.unpickle import Name, Storage, Tensor, storage_type, unpickle
from jax_densevit.pretrained.zip_members import Members

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_SMALL = 2**20  # elements: expanded tensors (stride 0) may have more than their storage up to this
# torch.hub's convention for published files: the name ends with the start of the content's SHA-256. A date is none.
_HASH = re.compile(r"-(?=\d*[a-f])([0-9a-f]{8,64})\.[a-z]+")


def load_zip(members: Members) -> Any:
    """The object of a zip file, its tensors as views into the mapped file."""
    root = members.torch_root()
    order = f"{root}byteorder"
    if order in members.names and bytes(members.view(order)).strip() != b"little":
        raise UserError(f"{members.path} was written on a big-endian machine; save it again on another.")
    pickle = io.BytesIO(members.view(f"{root}data.pkl"))
    tree = unpickle(pickle, lambda value: _storage(value, members.path), members.path)
    views: dict[str, memoryview] = {}

    def values(key: str) -> memoryview:
        if key not in views:
            views[key] = members.view(f"{root}data/{key}")
        return views[key]

    return _build(tree, values)


def load_legacy(path: Path) -> Any:
    """The object of a file in the form before 1.6: five pickles, then the values of one storage after the other."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def refuse(_):
        raise ValueError("a tensor before the first storage")

    if unpickle(data, refuse, path) != _LEGACY_MAGIC:
        raise UserError(f"{path} is a pickle but none of torch.save; it is refused, since reading it could run code.")
    if unpickle(data, refuse, path) != _LEGACY_PROTOCOL:
        raise UserError(f"{path} has a version of torch.save's format that is not known.")
    system = unpickle(data, refuse, path)
    if not system.get("little_endian", True):
        raise UserError(f"{path} was written on a big-endian machine; save it again on another.")
    _check_hash(path, data)
    storages: dict[str, Storage] = {}

    def persistent(value: Any) -> Storage:
        storage = _storage(value, path)
        first = storages.setdefault(storage.key, storage)
        if (first.dtype, first.count) != (storage.dtype, storage.count):
            raise ValueError(f"storage {storage.key} has two types or sizes")
        return storage

    tree = unpickle(data, persistent, path)
    keys = unpickle(data, refuse, path)
    at, views = data.tell(), {}
    for key in keys:
        storage = storages[key]
        count = int(np.frombuffer(data, "<i8", 1, at)[0])
        if count != storage.count:
            raise ValueError(f"storage {key} has {count} values instead of {storage.count}")
        at += 8
        size = count * storage.dtype.itemsize
        if not 0 <= size <= len(data) - at:
            raise EOFError("the file ends early")
        views[key] = memoryview(data)[at : at + size]
        at += size
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes follow the last tensor")
    return _build(tree, views.__getitem__)


def _check_hash(path: Path, data: mmap.mmap) -> None:
    match = _HASH.search(path.name)
    if match and not hashlib.sha256(data).hexdigest().startswith(match[1]):
        raise UserError(
            f"{path} does not hold what its name promises: its SHA-256 does not begin with {match[1]}; get the file "
            "again, or rename it if it was changed on purpose."
        )


def _storage(value: Any, path: Path) -> Storage:
    """A persistent id: ("storage", type, key, device, number of elements[, view])."""
    if not isinstance(value, tuple) or len(value) < 5 or value[0] != "storage":
        kind = str(value[0])[:40] if isinstance(value, tuple) and value else "nothing"
        raise UserError(f"{path} holds more than tensors (a {kind!r}); save its state_dict alone with PyTorch.")
    _, kind, key, _, count, *view = value
    if not isinstance(kind, Name) or not isinstance(key, str) or type(count) is not int or count < 0:
        raise ValueError("a persistent id is not understood")
    if view and view[0] is not None:
        raise UserError(f"{path} holds views of storages, as PyTorch did before 0.4; save it again with a newer one.")
    return Storage(storage_type(kind), key, count)


def _build(tree: Any, values: Callable[[str], memoryview]) -> Any:
    """Replaces every `Tensor` of nested containers by an array; containers are changed in place, each once."""
    if isinstance(tree, Tensor):
        return _array(tree, values(tree.storage.key))
    seen, waiting = set(), [tree]
    while waiting:
        container = waiting.pop()
        if isinstance(container, Tensor) or id(container) in seen:
            continue
        seen.add(id(container))
        if isinstance(container, dict):
            pairs = list(container.items())
        elif isinstance(container, list):
            pairs = list(enumerate(container))
        elif isinstance(container, tuple):
            if any(isinstance(item, Tensor) for item in container):
                raise ValueError("tensors in a tuple")
            waiting += container
            continue
        else:
            continue
        for key, value in pairs:
            if isinstance(value, Tensor):
                container[key] = _array(value, values(value.storage.key))
            elif isinstance(value, tuple) and any(isinstance(item, Tensor) for item in value):
                container[key] = [_array(t, values(t.storage.key)) if isinstance(t, Tensor) else t for t in value]
                waiting.append(container[key])
            else:
                waiting.append(value)
    return tree


def _array(tensor: Tensor, data: memoryview) -> np.ndarray:
    """The tensor as a read-only view, after its bounds were checked."""
    if len(data) != tensor.storage.count * tensor.storage.dtype.itemsize:
        raise ValueError(f"storage {tensor.storage.key} has {len(data)} bytes for {tensor.storage.count} values")
    if len(tensor.shape) != len(tensor.strides):
        raise ValueError("a tensor has strides for another number of axes")
    flat = np.frombuffer(data, tensor.dtype)
    count = 1
    for side in tensor.shape:
        count *= side
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if count and last >= len(flat) or count > max(len(flat), _SMALL):
        raise ValueError(f"a tensor of shape {list(tensor.shape)[:8]} does not fit into {len(flat)} values")
    if not count:
        return np.empty(tensor.shape, tensor.dtype)
    strides = [stride * tensor.dtype.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides, writeable=False)
