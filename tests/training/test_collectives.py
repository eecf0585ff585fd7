"""What devices send each other, and how long a step would take: counted by hand on small programs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_densevit.training.collectives import Collective, find_collectives
from jax_densevit.training.forecast import CHIPS, UTILISATION, forecast, network_seconds
from jax_densevit.training.mesh import make_mesh


def compiled(function, mesh, spec, out, *shapes):
    places = [NamedSharding(mesh, one) for one in spec]
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape, place in zip(shapes, places, strict=True)
    ]
    program = jax.jit(function, out_shardings=NamedSharding(mesh, out)).lower(*arguments).compile()
    return find_collectives(program.as_text(), mesh.devices.size)


def test_a_sum_in_a_loop_counts_as_often_as_the_loop_turns():
    mesh = make_mesh()

    def function(x):
        return jax.lax.scan(lambda y, _: (jnp.tanh((y * x).sum(0)), None), jnp.ones(32), None, length=5)[0]

    (one,) = compiled(function, mesh, (P("data"),), P(), (64, 32))
    assert (one.kind, one.bytes, one.times, len(one.group)) == ("all-reduce", 4 * 32, 5, 8)
    total = compiled(lambda x: x.sum(0), mesh, (P("data"),), P(), (64, 32))
    assert [(x.kind, x.bytes, x.times, len(x.group)) for x in total] == [("all-reduce", 4 * 32, 1, 8)]


def test_groups_of_a_mesh():
    mesh = make_mesh(data=2, fsdp=4)
    (one,) = compiled(lambda x: x * 2, mesh, (P("fsdp"),), P(), (64, 32))
    assert (one.kind, one.bytes, one.group) == ("all-gather", 4 * 64 * 32, (0, 1, 2, 3))
    (one,) = compiled(lambda x: x.sum(0), mesh, (P("data"),), P(), (64, 32))
    assert (one.kind, one.group) == ("all-reduce", (0, 4))


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("[2,2]<=[4]", (0, 1)),
        ("[2,2]<=[2,2]T(1,0)", (0, 2)),
        ("mesh['a'=2,'b'=2] {'b'}", (0, 1)),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", (0, 2)),
        ("{}", (0, 1, 2, 3)),
    ],
)
def test_every_form_of_groups(groups, first):
    text = f"""ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %r = f32[8]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, use_global_device_ids=true, to_apply=%add
}}
"""
    assert find_collectives(text, 4) == (Collective("all-reduce", 32, first, 1),)


def test_a_sum_that_is_cut_at_once_is_a_reduce_scatter_and_loops_multiply():
    text = """%body (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %t = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %sum = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  %own = f32[2]{0} dynamic-slice(%sum, %i), dynamic_slice_sizes={2}
  ROOT %out = (s32[], f32[8]{0}) tuple(%i, %x)
}

ENTRY %main (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  ROOT %w = (s32[], f32[8]{0}) while(%p), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"7"}}
}
"""
    (one,) = find_collectives(text, 4)
    assert one == Collective("reduce-scatter", 32, (0, 1, 2, 3), 7)
    assert one.sent == 7 * 32 * 3 / 4


def test_times_by_hand():
    chip = next(chip for chip in CHIPS if chip.name == "H100")
    inside, across = Collective("all-reduce", 10**9, tuple(range(8)), 1), Collective("all-reduce", 10**9, (0, 8), 1)
    assert network_seconds(inside, chip) == pytest.approx(2 * 1e9 * 7 / 8 / 450e9)
    assert network_seconds(across, chip) == pytest.approx(2 * 1e9 / 2 / 50e9)
    one = forecast(chip, 1e12, 1e9, [inside])
    assert one.compute == pytest.approx(1e12 / (UTILISATION * 989.4e12)) and one.memory == pytest.approx(1e9 / 3350e9)
    assert one.overlapped == max(one.busy, one.network) and one.in_turn == one.busy + one.network
    assert 0 < one.efficiency[0] <= one.efficiency[1] <= 1
