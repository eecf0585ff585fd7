"""The mesh of devices and how a batch is laid over it.

Axes: "data" (replicas), "fsdp" (replicas that also divide the parameters among themselves), "tensor" (devices that work
on the same examples). A batch is divided over "data" and "fsdp" together.

Devices of several slices (TPU slices joined by the data center's network, or GPU nodes) are laid out so that as little
as possible crosses the slow network: replicas first.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_densevit.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices of all processes.

    Args:
      data, fsdp, tensor: sizes of the axes; one of them may be -1 and takes the devices that remain.
      devices: the devices to use; None takes all.

    Raises:
      UserError: sizes that do not multiply to the number of devices, or a "tensor" axis that crosses processes (each
        process feeds its own examples, so devices that share examples must share a process) or slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    for axis, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or (size < 1 and size != -1):
            raise UserError(f"mesh.{axis} is {size!r}; it must be a positive whole number, or -1 for what remains.")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise UserError(f"mesh: only one of the sizes may be -1, but the config says {asked}.")
    known = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices) or not all(sizes.values()):
        raise UserError(
            f"mesh: {asked} does not fit {len(devices)} device(s); the sizes must multiply to exactly that number "
            "(set one of them to -1)."
        )
    mesh = Mesh(arrange(tuple(sizes.values()), devices), AXES, axis_types=(AxisType.Auto,) * 3)
    for row in mesh.devices.reshape(-1, sizes["tensor"]):
        if len({device.process_index for device in row}) > 1:
            raise UserError(
                f"mesh: tensor={sizes['tensor']} reaches over several processes; it must divide the number of "
                "devices of one process."
            )
    return mesh


def arrange(sizes: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices in the order of a mesh of `sizes` (of `AXES`), neighbors in it being neighbors in the machine.

    Of several slices (`device.slice_index`) "data" goes over as many as it can, "fsdp" over what is left, and "tensor"
    stays within one: a replica's gradient is one sum a step, gathered parameters are sent layer by layer.

    Raises:
      UserError: slices of different sizes, or sizes for which "tensor" would have to leave a slice.
    """
    counts = Counter(getattr(device, "slice_index", None) for device in devices)
    options = {"devices": devices, "allow_split_physical_axes": True}
    if len(counts) < 2:
        return mesh_utils.create_device_mesh(sizes, **options)
    data, fsdp, tensor = sizes
    if len(set(counts.values())) > 1:
        raise UserError(f"mesh: the slices have {sorted(counts.values())} devices; a mesh needs equal ones.")
    replicas = math.gcd(data, len(counts))
    parts = len(counts) // replicas
    if fsdp % parts:
        raise UserError(
            f"mesh: data={data}, fsdp={fsdp}, tensor={tensor} cannot be laid over {len(counts)} slices; their number "
            "must divide data, or at least data x fsdp: the devices of tensor share a slice."
        )
    inside = (data // replicas, fsdp // parts, tensor)
    return mesh_utils.create_hybrid_device_mesh(inside, (replicas, parts, 1), **options)


def batch_shards(mesh: Mesh) -> int:
    """How many parts a batch is cut into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every array of a batch: the first axis over "data" and "fsdp", the others whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises :class:`UserError` where the global batch cannot be cut into equal parts per device and microbatch."""
    if accumulate < 1:
        raise UserError(f"accumulate is {accumulate}; it must be at least 1.")
    parts = batch_shards(mesh) * accumulate
    if batch_size < 1 or batch_size % parts:
        raise UserError(
            f"batch_size {batch_size} cannot be divided into {accumulate} microbatch(es) on {batch_shards(mesh)} "
            f"device(s); choose a multiple of {parts}."
        )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Moves this process's rows of a global batch to its devices, as parts of global arrays.

    Args:
      batch: NumPy arrays `[b, ...]`, this process's rows; every process holds equally many.

    Returns:
      Global arrays `[b * processes, ...]` with :func:`batch_sharding`.

    Raises:
      UserError: rows that cannot be divided equally over this process's devices.
    """
    sharding = batch_sharding(mesh)
    processes = len({device.process_index for device in mesh.devices.flat})

    def put(name: str, rows: Any) -> jax.Array:
        rows = np.asarray(rows)
        if len(rows) * processes % batch_shards(mesh):
            raise UserError(
                f"A batch of {len(rows) * processes} ({name!r}) cannot be divided over {batch_shards(mesh)} devices; "
                f"choose a batch size that is a multiple of {batch_shards(mesh)}."
            )
        return jax.make_array_from_process_local_data(sharding, rows, (len(rows) * processes, *rows.shape[1:]))

    return {name: put(name, rows) for name, rows in batch.items()}
