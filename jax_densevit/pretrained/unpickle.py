"""A pickle machine that can build tensors' descriptions, dicts, lists, tuples, numbers and strings, and nothing else.

Python's own unpickler calls what a file names. This one reads the same instructions and has no instruction that calls:
of the few names that it knows (PyTorch's for rebuilding a tensor, its storage types, `OrderedDict`) it keeps a record,
any other name is refused as soon as it is met.
"""

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jax_densevit.errors import UserError

_MAX_BYTES = 2**26  # of one pickle without its tensors: hundreds of bytes each, so far more than any model has

STORAGES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
    "ComplexFloatStorage": np.dtype("<c8"),
    "ComplexDoubleStorage": np.dtype("<c16"),
    "UntypedStorage": np.dtype("u1"),
}
DTYPES = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    **{f"{sign}int{bits}": np.dtype(f"<{sign or 'i'}{bits // 8}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bool": np.dtype("?"),
}


class Name(NamedTuple):
    """A name of another module that a pickle asks for; only those of `_KNOWN` get this far."""

    module: str
    name: str


class Storage(NamedTuple):
    """What a persistent id says: the values `key`, of this type and number, are outside of the pickle."""

    dtype: np.dtype
    key: str
    count: int
    offset: int = 0  # of a view into the storage, in elements


class Tensor(NamedTuple):
    """A tensor that a pickle describes: counts in elements of `dtype`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


def _rebuild_tensor(storage, offset, shape, strides, *_):
    return Tensor(_storage(storage), _count(offset), _counts(shape), _counts(strides), storage.dtype)


def _rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, *_):
    wanted = DTYPES[dtype.name]
    return Tensor(_storage(storage), _count(offset), _counts(shape), _counts(strides), wanted)


def _rebuild_parameter(tensor, *_):
    if not isinstance(tensor, Tensor):
        raise ValueError("a parameter is made of something that is no tensor")
    return tensor


def _storage(value):
    if not isinstance(value, Storage):
        raise ValueError("a tensor is made of something that is no storage")
    return value


def _count(value):
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{str(value)[:40]} is no size")
    return value


def _counts(values):
    if not isinstance(values, tuple):
        raise ValueError("a shape is no tuple")
    return tuple(_count(value) for value in values)


# What a REDUCE instruction stands for, by the name that it would call.
_REDUCE: dict[Name, Callable] = {
    Name("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    Name("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    Name("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    Name("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    Name("collections", "OrderedDict"): lambda pairs=(): {key: value for key, value in pairs},
    Name("torch", "Size"): lambda sizes=(): _counts(tuple(sizes)),
    Name("torch", "device"): lambda *parts: ":".join(str(part) for part in parts),
}
_KNOWN = (
    set(_REDUCE)
    | {Name("torch", name) for name in (*STORAGES, *DTYPES)}
    | {Name("torch.storage", "UntypedStorage"), Name("torch.storage", "_UntypedStorage")}
)


def storage_type(name: Any) -> np.dtype:
    """The NumPy type of a storage's class as a persistent id names it."""
    if not isinstance(name, Name) or name.name.lstrip("_") not in STORAGES:
        raise ValueError("a persistent id has no storage type")
    return STORAGES[name.name.lstrip("_")]


_MARK = object()
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def unpickle(file: BinaryIO, persistent: Callable[[tuple], Any], source: Any) -> Any:
    """What a pickle describes, up to and with its STOP instruction.

    Args:
      file: at the start of the pickle; afterwards behind it.
      persistent: from a persistent id (a tuple) to a `Storage`.
      source: the file's path, for messages.

    Raises:
      UserError: the pickle wants an object that is no tensor, dict, list, number or string.
      ValueError, IndexError, KeyError, TypeError: it is damaged.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def pop(count):
        if count > len(stack):
            raise ValueError("a pickle takes more than it has put")
        taken = stack[len(stack) - count :]
        if any(value is _MARK for value in taken):
            raise ValueError("a pickle takes a mark for a value")
        del stack[len(stack) - count :]
        return taken

    def pop_to_mark():
        place = next((i for i in range(len(stack) - 1, -1, -1) if stack[i] is _MARK), None)
        if place is None:
            raise ValueError("a pickle goes back to a mark that it has not set")
        taken = stack[place + 1 :]
        del stack[place:]
        return taken

    def resolve(module, name):
        if not isinstance(module, str) or Name(module, name) not in _KNOWN:
            raise UserError(
                f"{source} asks for {str(module)[:80]}.{str(name)[:80]}, no tensor: building it could run code, "
                "so the file is refused and nothing of it was run; if you trust its author, save its state_dict alone "
                "with PyTorch."
            )
        return Name(module, name)

    start = file.tell()
    for opcode, argument, position in pickletools.genops(file):
        name = opcode.name
        if position - start > _MAX_BYTES:
            raise UserError(f"{source} has a pickle of more than {_MAX_BYTES:,} bytes without its tensors; refused.")
        if name in _VALUES:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            stack.append(tuple(pop(_TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(pop_to_mark()))
        elif name == "LIST":
            stack.append(pop_to_mark())
        elif name == "DICT":
            stack.append(_pairs({}, pop_to_mark()))
        elif name == "GLOBAL":
            stack.append(resolve(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(resolve(*pop(2)))
        elif name in ("BINPERSID", "PERSID"):
            (value,) = pop(1) if name == "BINPERSID" else (argument,)
            stack.append(persistent(value))
        elif name == "REDUCE":
            called, arguments = pop(2)
            if not isinstance(called, Name) or called not in _REDUCE or not isinstance(arguments, tuple):
                raise ValueError("a pickle calls what cannot be called")
            stack.append(_REDUCE[called](*arguments))
        elif name == "SETITEM":
            _pairs(stack[-3], pop(2))
        elif name == "SETITEMS":
            items = pop_to_mark()
            _pairs(stack[-1], items)
        elif name == "APPEND":
            (item,) = pop(1)
            _list(stack[-1]).append(item)
        elif name == "APPENDS":
            items = pop_to_mark()
            _list(stack[-1]).extend(items)
        elif name == "BUILD":
            pop(1)  # attributes of a dict (`_metadata` of a state dict), of which there are none here
            if not isinstance(stack[-1], dict):
                raise ValueError("a pickle sets attributes of what has none")
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            pop_to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "STOP":
            (value,) = pop(1)
            return value
        elif name not in ("PROTO", "FRAME"):
            raise UserError(f"{source} has a pickle instruction {name}, which no tensor needs; it is refused.")
    raise EOFError("a pickle ends early")


def _pairs(target: Any, items: list) -> dict:
    if type(target) is not dict or len(items) % 2:
        raise ValueError("a pickle sets items of what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | bool | None | bytes):
            raise ValueError("a key of a dict is neither a string nor a number")
        target[key] = value
    return target


def _list(target: Any) -> list:
    if type(target) is not list:
        raise ValueError("a pickle appends to what is no list")
    return target
