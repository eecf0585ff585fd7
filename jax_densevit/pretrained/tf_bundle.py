"""TensorFlow 2 checkpoints without TensorFlow.

`<prefix>.index` is a LevelDB table from names to small protocol buffers (BundleEntryProto: type, shape, file, offset,
size, checksum); `<prefix>.data-<i>-of-<n>` hold the values. The layout is that of TensorFlow's tensor_bundle.proto and
of LevelDB's doc/table_format.md.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from jax_densevit.errors import UserError
from jax_densevit.pretrained.crc32c import crc32c, unmask

_MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
_FOOTER = 48
_MAX_INDEX = 2**28
# types.proto: DT_FLOAT and so on. Strings (7) and other things that are no tensors of numbers are left out.
_DTYPES = {
    1: "<f4",
    2: "<f8",
    3: "<i4",
    4: "u1",
    5: "<i2",
    6: "i1",
    8: "<c8",
    9: "<i8",
    10: "?",
    14: ml_dtypes.bfloat16,
    17: "<u2",
    18: "<c16",
    19: "<f2",
    22: "<u4",
    23: "<u8",
}


def load(index: Path) -> dict[str, np.ndarray]:
    """Name -> array, views into the mapped data files; names as the checkpoint has them.

    Object-based checkpoints end every variable's name with `/.ATTRIBUTES/VARIABLE_VALUE`.
    """
    table = index.read_bytes()
    if len(table) > _MAX_INDEX:
        raise UserError(f"{index} is larger than any index of a checkpoint; it is refused.")
    entries = dict(_entries(table, index))
    header = _fields(entries.pop(b""))
    if _one(header, 2, 0):
        raise UserError(f"{index} was written on a big-endian machine; save it again on another.")
    shards = _one(header, 1, 1)
    if not 1 <= shards <= len(entries) + 1:
        raise ValueError(f"{shards} data files")
    maps: dict[int, mmap.mmap] = {}
    arrays = {}
    for key, value in entries.items():
        entry = _fields(value)
        kind = _one(entry, 1, 0)
        name = key.decode()
        if 7 in entry:
            raise UserError(f"{index}: {name!r} is split into slices, as variables of parameter servers are; refused.")
        if kind not in _DTYPES:
            continue
        dtype = np.dtype(_DTYPES[kind])
        shape = tuple(_one(_fields(dim), 1, 0) for dim in _fields(_one(entry, 2, b"")).get(2, ()))
        shard, offset, size = (_one(entry, field, 0) for field in (3, 4, 5))
        count = 1
        for side in shape:
            count *= side
        if count * dtype.itemsize != size:
            raise ValueError(f"{name} has {size} bytes for the shape {list(shape)[:8]}")
        if shard not in maps:
            maps[shard] = _map(index, shard, shards)
        if offset + size > len(maps[shard]):
            raise EOFError(f"{name} lies beyond the end of its data file")
        data = memoryview(maps[shard])[offset : offset + size]
        if crc32c(data) != unmask(_one(entry, 6, 0)):
            raise ValueError(f"the checksum of {name} is wrong")
        arrays[name] = np.frombuffer(data, dtype).reshape(shape)
    return arrays


def _map(index: Path, shard: int, shards: int) -> mmap.mmap:
    if not 0 <= shard < shards:
        raise ValueError(f"data file {shard} of {shards}")
    path = index.with_suffix(f".data-{shard:05d}-of-{shards:05d}")
    if not path.exists():
        raise UserError(f"{path} is missing: it holds the values of {index.name}.")
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _entries(table: bytes, index: Path) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a LevelDB table, in order."""
    if len(table) < _FOOTER or table[-8:] != _MAGIC:
        raise ValueError("the index has no end")
    at = len(table) - _FOOTER
    _, at = _varint(table, at)  # of the meta index, which has nothing to say
    _, at = _varint(table, at)
    start, at = _varint(table, at)
    size, at = _varint(table, at)
    for _, handle in _block(table, start, size, index):
        start, at = _varint(handle, 0)
        size, at = _varint(handle, at)
        yield from _block(table, start, size, index)


def _block(table: bytes, start: int, size: int, index: Path) -> Iterator[tuple[bytes, bytes]]:
    end = start + size
    if end + 5 > len(table):
        raise EOFError("a block reaches beyond the end of the index")
    if crc32c(table[start : end + 1]) != unmask(int.from_bytes(table[end + 1 : end + 5], "little")):
        raise ValueError("the checksum of a block is wrong")
    if table[end]:
        raise UserError(f"{index} is compressed, which TensorFlow's checkpoints are not; it is refused.")
    restarts = int.from_bytes(table[end - 4 : end], "little")
    stop, at, key = end - 4 - 4 * restarts, start, b""
    while at < stop:
        shared, at = _varint(table, at)
        unshared, at = _varint(table, at)
        length, at = _varint(table, at)
        if shared > len(key) or at + unshared + length > stop:
            raise ValueError("an entry reaches beyond its block")
        key = key[:shared] + table[at : at + unshared]
        at += unshared + length
        yield key, table[at - length : at]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number without an end")


def _fields(data: bytes) -> dict[int, list]:
    """Field number -> values of a protocol buffer: varints and fixed numbers as int, the rest as bytes."""
    if not isinstance(data, bytes):
        raise ValueError("a message is a number")
    fields: dict[int, list] = {}
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = int.from_bytes(data[at : at + size], "little"), at + size
        elif kind == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError("a field of an unknown kind")
        if at > len(data):
            raise ValueError("a field reaches beyond its message")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _one(fields: dict[int, list], number: int, default):
    value = fields.get(number, [default])[-1]
    if type(value) is not type(default):
        raise ValueError("a field has the wrong kind")
    return value
