"""The step with the real models: eight devices are one, by naming the mesh alone.

All models run on the mesh with three axes, some on the others too; `python tests/soak_layouts.py` runs all on all.
"""

import layouts
import pytest
from tiny_training import assert_trees_close

from jax_densevit.training.mesh import make_mesh

EVERY_LAYOUT = ("setr", "axial", "color upsampler")


@pytest.mark.parametrize("name", layouts.TINY)
def test_eight_devices_equal_one(name):
    subject = layouts.subject(name)
    numbers, state, held = layouts.trained(*subject, layouts.alone())
    (size,) = held.values()
    assert all(one["finite"] and one["grad_norm"] > 0 for one in numbers) and numbers[0]["loss"] != numbers[1]["loss"]
    for layout in layouts.LAYOUTS if name in EVERY_LAYOUT else ["fsdp and tensor"]:
        found, after, held = layouts.trained(*subject, make_mesh(**layouts.LAYOUTS[layout]), minimum_bytes=0)
        for one, many in zip(numbers, found, strict=True):
            assert_trees_close(list(one.values()), [many[key] for key in one], 1e-5)
        assert_trees_close(state, after, 1e-5)
        parts = {"data": 1, "fsdp": 8, "fsdp and tensor": 2}[layout]
        assert len(held) == 8 and size / 8 < min(held.values()) and max(held.values()) < 1.25 * size / parts
