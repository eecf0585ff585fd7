import dataclasses

import jax
import numpy as np
import pytest

from jax_densevit.errors import UserError
from jax_densevit.training.mesh import arrange, batch_sharding, check_batch_size, make_mesh, put_batch, replicated


@pytest.mark.parametrize(
    "asked, shape",
    [
        ({}, (8, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": -1}, (1, 8, 1)),
        ({"data": 2, "tensor": -1}, (2, 1, 4)),
    ],
)
def test_one_size_takes_the_devices_that_remain(asked, shape):
    mesh = make_mesh(**asked)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"data": 3}, "data=3.*does not fit 8 device"),
        ({"data": -1, "fsdp": 3}, "does not fit 8 device"),
        ({"data": -1, "fsdp": 16}, "does not fit 8 device"),
        ({"data": -1, "fsdp": -1}, "only one of the sizes may be -1"),
        ({"data": 0}, "mesh.data is 0"),
        ({"data": 8, "tensor": -2}, "mesh.tensor is -2"),
        ({"data": 2.0}, "mesh.data is 2.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(asked, message):
    with pytest.raises(UserError, match=message):
        make_mesh(**asked)


def test_a_mesh_of_some_devices():
    assert make_mesh(data=3, devices=jax.devices()[2:5]).devices.flatten().tolist() == jax.devices()[2:5]


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX's layout of meshes asks of a TPU chip: four of a slice are a square, two of them a host's."""

    id: int
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    core_on_chip: int = 0

    @property
    def coords(self):
        return (self.id % 2, self.id // 2 % 2, 0)

    @property
    def process_index(self):
        return self.id // 2


def chips(*slices):
    """Chips by the number of each one's slice, in an order that mixes them."""
    made = [Chip(i, number) for i, number in enumerate(slices)]
    return made[::2] + made[1::2]


def slices_of(sizes, *slices):
    """Which slice every place of a mesh lies in."""
    return np.vectorize(lambda chip: chip.slice_index)(arrange(sizes, chips(*slices)))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (2, 1, 4), (4, 2, 1), (8, 1, 1)])
def test_replicas_go_over_slices_and_all_else_stays_inside(sizes):
    found = slices_of(sizes, 0, 0, 0, 0, 1, 1, 1, 1)
    half = sizes[0] // 2
    assert found.shape == sizes and set(found[:half].flat) == {0} and set(found[half:].flat) == {1}
    devices = arrange(sizes, chips(0, 0, 0, 0, 1, 1, 1, 1))
    assert len(set(devices.flat)) == 8


def test_fsdp_crosses_slices_where_replicas_are_too_few():
    found = slices_of((2, 4, 2), *np.repeat(range(4), 4))
    assert found.shape == (2, 4, 2)
    for replica in range(2):
        for part in range(2):
            assert len(set(found[replica, 2 * part : 2 * part + 2].flat)) == 1
    assert set(found.flat) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("sizes", "slices", "message"),
    [
        ((1, 1, 8), np.repeat([0, 1], 4), r"tensor=8 cannot be laid over 2 slices; their number must divide data"),
        ((2, 2, 3), np.repeat([0, 1, 2], 4), "cannot be laid over 3 slices"),
        ((2, 2, 1), (0, 0, 0, 1), r"slices have \[1, 3\] devices"),
    ],
)
def test_slices_that_do_not_fit_are_refused(sizes, slices, message):
    with pytest.raises(UserError, match=message):
        arrange(sizes, chips(*slices))


def test_put_batch_divides_rows_over_data_and_fsdp_and_keeps_them():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    batch = {
        "image": np.arange(8 * 2 * 2 * 3, dtype=np.uint8).reshape(8, 2, 2, 3),
        "index": np.arange(8, dtype=np.int32),
    }
    placed = put_batch(batch, mesh)
    for name, rows in batch.items():
        assert placed[name].dtype == rows.dtype
        assert placed[name].sharding.is_equivalent_to(batch_sharding(mesh), rows.ndim)
        np.testing.assert_array_equal(np.asarray(placed[name]), rows)
        for shard in placed[name].addressable_shards:
            assert shard.data.shape == (2, *rows.shape[1:])
            # Devices along "tensor" work on the same rows.
            position = np.argwhere(mesh.devices == shard.device)[0]
            first = 2 * (2 * position[0] + position[1])
            np.testing.assert_array_equal(np.asarray(shard.data), rows[first : first + 2])


def test_put_batch_refuses_rows_that_cannot_be_divided():
    with pytest.raises(UserError, match="batch of 6 .*multiple of 8"):
        put_batch({"image": np.zeros((6, 2, 2, 3), np.uint8)}, make_mesh())


def test_check_batch_size():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    check_batch_size(8, mesh)
    check_batch_size(8, mesh, accumulate=2)
    for size, accumulate, message in [(6, 1, "multiple of 4"), (12, 2, "multiple of 8"), (0, 1, "multiple of 4"),
                                      (8, 0, "at least 1")]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            check_batch_size(size, mesh, accumulate)


def test_replicated_is_a_whole_copy_everywhere():
    assert replicated(make_mesh()).is_fully_replicated
