"""Writes TensorFlow 2 checkpoints by the definitions of their formats (LevelDB tables, BundleEntryProto)."""

import os
import struct

import numpy as np

from jax_densevit.pretrained.crc32c import crc32c


def varint(value):
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def field(number, value):
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def masked(data):
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def block(pairs):
    """Every second key shares a prefix with the one before, as LevelDB's do between restarts."""
    body, before, restarts = b"", b"", []
    for i, (key, value) in enumerate(pairs):
        shared = len(os.path.commonprefix([key, before])) if i % 2 else 0
        if not shared:
            restarts.append(len(body))
        body += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    body += b"".join(struct.pack("<I", at) for at in restarts) + struct.pack("<I", len(restarts))
    return body


def write_bundle(prefix, arrays, compression=0, shapes=None):
    kinds = {"float32": 1, "float64": 2, "int64": 9, "bfloat16": 14, "float16": 19, "bool": 10, "uint8": 4}
    data, entries = b"", [(b"", field(1, 1) + field(3, field(1, 1)))]
    for name, array in sorted(arrays.items()):
        raw = np.ascontiguousarray(array).tobytes()
        shape = (shapes or {}).get(name, array.shape)
        dims = b"".join(field(2, field(1, side)) for side in shape)
        entry = field(1, kinds[array.dtype.name]) + field(2, dims) + field(4, len(data)) + field(5, len(raw))
        entries.append((name.encode(), entry + varint(6 << 3 | 5) + masked(raw)))
        data += raw
    entries.append((b"zz_string", field(1, 7) + field(4, len(data)) + field(5, 3)))
    table, index = b"", []
    for part in (entries[: len(entries) // 2], entries[len(entries) // 2 :]):
        content = block(part)
        index.append((part[-1][0], varint(len(table)) + varint(len(content))))
        table += content + bytes([compression]) + masked(content + bytes([compression]))
    handles = []
    for pairs in ([], index):
        content = block(pairs)
        handles.append(varint(len(table)) + varint(len(content)))
        table += content + b"\0" + masked(content + b"\0")
    footer = b"".join(handles).ljust(40, b"\0") + (0xDB4775248B80FB57).to_bytes(8, "little")
    prefix.with_suffix(".index").write_bytes(table + footer)
    prefix.with_suffix(".data-00000-of-00001").write_bytes(data + b"abc")
    return prefix
