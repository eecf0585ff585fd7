import functools
import io

import jax
import pytest
from rich.console import Console
from tiny_training import TinyModel, Training, tiny_config

from jax_densevit.training.mesh import make_mesh
from jax_densevit.training.overview import overview, print_overview

WIDTH = 64
COUNT = (3 * WIDTH + WIDTH) + (WIDTH * WIDTH + WIDTH) + 2 * (WIDTH * 3 + 3)
BODY = 4 * WIDTH * WIDTH


@functools.cache
def facts(data=1, fsdp=1):
    mesh = make_mesh(data=data, fsdp=fsdp, devices=jax.devices()[: data * fsdp])
    training = Training(
        model=TinyModel(width=WIDTH), config=tiny_config(name="adamw"), ema=0.9, mesh=mesh, minimum_bytes=BODY
    )
    return overview(
        training.step, training.abstract, training.shardings, training.shapes, macs=5_000_000, minimum_bytes=BODY
    )


def test_parameters_and_state():
    found = facts(data=2, fsdp=4)
    assert found.parameter_count == COUNT
    assert found.mesh == {"data": 2, "fsdp": 4, "tensor": 1} and found.batch_size == 16
    rows = {row.path: row for row in found.parameters}
    body = rows["body/kernel"]
    assert (body.shape, body.dtype, body.axes) == ((WIDTH, WIDTH), "float32", "fsdp")
    assert (body.bytes, body.bytes_per_device) == (BODY, BODY // 4)
    assert rows["body/bias"].axes == "" and rows["body/bias"].bytes_per_device == 4 * WIDTH
    # Parameters, average and two moments, with three int32 counters.
    assert found.state_bytes == 4 * (4 * COUNT) + 3 * 4
    assert found.state_bytes_per_device == found.state_bytes - 4 * (BODY - BODY // 4)
    assert found.large_replicated == {}


def test_memory_is_what_the_compiler_plans():
    found = facts()
    batch = 16 * 4 * 4 * (3 + 1)
    assert found.memory.arguments == pytest.approx(found.state_bytes + batch, rel=0.02)
    assert found.memory.reused == pytest.approx(found.state_bytes, rel=0.02)  # donated
    assert found.memory.temporaries > 0
    assert found.memory.peak >= found.memory.arguments + found.memory.temporaries


def test_operations():
    found = facts()
    assert found.step_flops == 6 * 5_000_000 * 16
    # What this model really does: three times the products of the forward pass, without the gradient of the images.
    products = 16 * 4 * 4 * (3 * WIDTH + WIDTH * WIDTH + 2 * 3 * WIDTH)
    assert 0.9 * 2 * 3 * products < found.counted_flops < 2 * 2 * 3 * products
    assert facts(data=2, fsdp=4).counted_flops == pytest.approx(found.counted_flops, rel=0.5)


def test_nothing_is_allocated():
    """Shapes far beyond this machine's memory are fine."""
    training = Training(model=TinyModel(width=8))
    huge = {name: jax.ShapeDtypeStruct((2**26, *rows.shape[1:]), rows.dtype) for name, rows in training.shapes.items()}
    assert overview(training.step, training.abstract, training.shardings, huge).memory.peak > 2**36


def test_print():
    lines = io.StringIO()
    found = facts(data=2, fsdp=4)
    print_overview(found, "seed: 0\nmodel:\n  name: '[tiny]'", Console(file=lines, width=120))
    text = lines.getvalue()
    for part in [
        "name: '[tiny]'",
        "body/kernel",
        "64 x 64",
        f"{COUNT:,} parameters in 8 tensors",
        "data=2, fsdp=4, tensor=1 (8 x cpu)",
        "image uint8 [16, 4, 4, 3]",
        "0.01 GMACs forward per example",
        "Memory of a step on each device",
        "compiler counts",
    ]:
        assert part in text


def test_print_names_large_whole_copies_and_unknown_counts():
    training = Training(mesh=make_mesh(data=1, fsdp=8), minimum_bytes=2**22)
    found = overview(training.step, training.abstract, training.shardings, training.shapes, minimum_bytes=1000)
    lines = io.StringIO()
    print_overview(found, "", Console(file=lines, width=120))
    assert "Every device holds all of body/kernel" in lines.getvalue()
    assert "no analytic count" in lines.getvalue()
