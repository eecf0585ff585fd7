"""What devices send each other in one execution of a compiled program, read from its text.

The compiler prints the program of one device. A loop (scanned layers, microbatches) stands there once: what is in its
body counts as often as it turns. Where a sum over devices (all-reduce) is cut at once to each device's own part, the
compilers for TPU and GPU make a reduce-scatter of it and the CPU's does not: it is counted as what it becomes.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

_SAME = ("bitcast", "copy", "transpose", "reshape", "convert")  # the same numbers in another form
_BITS = {"pred": 8, "c64": 64, "c128": 128}  # the others say it in their name: f32, bf16, s8, u4, f8e4m3fn
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = ((?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\S+)) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`.
      bytes: of the whole array, once: what every device has after an all-gather or all-reduce, and before a
        reduce-scatter, all-to-all or permutation.
      group: numbers of the devices that take part together (of the first such group).
      times: how often one execution of the program does it.
    """

    kind: str
    bytes: int
    group: tuple[int, ...]
    times: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends per execution of the program, by ring algorithms."""
        n = len(self.group)
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.times * self.bytes * share.get(self.kind, (n - 1) / n)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    kind: str
    rest: str  # operands and attributes

    @property
    def called(self) -> list[str]:
        branches = [name.strip().lstrip("%") for found in _BRANCHES.findall(self.rest) for name in found.split(",")]
        return _CALLED.findall(self.rest) + branches


def find_collectives(text: str, devices: int) -> tuple[Collective, ...]:
    """The collectives of a compiled program.

    Args:
      text: `compiled.as_text()`, HLO after the compiler has divided the program.
      devices: how many devices it runs on.

    Groups of a single device, which send nothing, are left out.
    """
    computations, entry = _computations(text)
    found = []
    for name, times in _turns(computations, entry).items():
        for one in computations[name]:
            kind = one.kind.removesuffix("-start")
            if kind not in KINDS:
                continue
            group = _group(one.rest, devices)
            if len(group) > 1:
                for own, size in _parts(one, computations[name], computations):
                    found.append(Collective(own, size * (len(group) if own == "reduce-scatter" and own == kind else 1),
                                            group, times))  # fmt: skip
    return tuple(found)


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Instructions by computation, and the name of the one that is the program."""
    computations: dict[str, list[_Instruction]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        if current is None:
            head = _HEAD.match(line)
            if head:
                current = computations.setdefault(head[1], [])
                entry = head[1] if line.startswith("ENTRY") else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            current.append(_Instruction(*found.groups()))
    return computations, entry


def _turns(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, int]:
    """How often each computation runs in one execution of the program."""
    counts: dict[str, int] = dict.fromkeys(computations, 0)

    def run(name: str, times: int) -> None:
        counts[name] += times
        for one in computations[name]:
            turns = _TURNS.search(one.rest) if one.kind == "while" else None
            for called in one.called:
                if called in computations:
                    run(called, times * (int(turns[1]) if turns else 1))

    run(entry, 1)
    return {name: times for name, times in counts.items() if times}


def _parts(one: _Instruction, siblings: list[_Instruction], computations) -> Iterator[tuple[str, int]]:
    """(kind, bytes) of every array that a collective moves: compilers put several into one."""
    kind = one.kind.removesuffix("-start")
    sizes = [_bytes(*shape) for shape in _SHAPE.findall(one.shape)]
    if one.kind == "all-gather-start":  # answers with what went in and what came out
        sizes = sizes[len(sizes) // 2 :]
    elif one.kind == "collective-permute-start":
        sizes = sizes[1:2]
    if "_promoted" in one.rest:  # sums of 16-bit numbers, which the CPU's compiler makes 32-bit ones
        sizes = [size // 2 for size in sizes]
    for number, size in enumerate(sizes):
        own = kind
        if kind == "all-reduce" and size > 4:
            names = [one.name]
            if one.shape.startswith("("):
                names = [
                    user.name
                    for user in siblings
                    if user.kind == "get-tuple-element"
                    and _uses(user.rest, one.name)
                    and re.search(rf"index={number}\b", user.rest)
                ]
            if names and all(_only_cut(name, siblings, computations) for name in names):
                own = "reduce-scatter"
        yield own, size


def _only_cut(name: str, siblings: list[_Instruction], computations) -> bool:
    """Whether the only use of a value is to take each device's own part of it, possibly after a change of its form."""
    users = [one for one in siblings if _uses(one.rest, name)]
    for user in users:
        if user.kind == "dynamic-slice":
            continue
        if user.kind == "fusion":
            inside = computations.get(next(iter(user.called), ""), [])
            place = _operands(user.rest).index(name)
            inner = next((x.name for x in inside if x.kind == "parameter" and x.rest.startswith(f"{place})")), None)
            if inner is None:
                return False
            # Forms change inside; the last instruction is what the fusion answers with.
            while inner != inside[-1].name:
                uses = [one for one in inside if _uses(one.rest, inner)]
                if uses and all(one.kind == "dynamic-slice" for one in uses):
                    break
                if len(uses) != 1 or uses[0].kind not in _SAME:
                    return False
                inner = uses[0].name
            else:
                if not _only_cut(user.name, siblings, computations):
                    return False
        elif user.kind not in _SAME or not _only_cut(user.name, siblings, computations):
            return False
    return bool(users)


def _operands(rest: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", rest.partition(")")[0])


def _uses(rest: str, name: str) -> bool:
    return name in rest and name in _operands(rest)


def _bytes(kind: str, sizes: str) -> int:
    bits = _BITS.get(kind) or int(re.search(r"\d+", kind)[0])
    return max(1, bits // 8) * math.prod(int(size) for size in sizes.split(",") if size)


def _group(rest: str, devices: int) -> tuple[int, ...]:
    """The first group of devices: listed, cut from a counted array, or an axis of a mesh; empty means all."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return tuple(sorted({int(pairs[1]), int(pairs[2])}))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(int(number) for number in listed[1].split(","))
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        return tuple(_counted(counted[3], counted[4]).reshape(int(counted[1]), int(counted[2]))[0].tolist())
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", rest
    )
    if mesh is None:
        return tuple(range(devices))
    axes = dict(re.findall(r"'([\w.]+)'=(\d+)", mesh[1]))
    sizes = [int(size) for size in axes.values()]
    ids = _counted(mesh[2], mesh[3]) if mesh[2] else np.arange(math.prod(sizes))
    taken = re.findall(r"'([\w.]+)'", mesh[4])
    return tuple(ids.reshape(sizes)[tuple(slice(None) if axis in taken else 0 for axis in axes)].ravel().tolist())


def _counted(sizes: str, order: str | None) -> np.ndarray:
    shape = [int(size) for size in sizes.split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose([int(axis) for axis in order.split(",")]) if order else ids).ravel()
