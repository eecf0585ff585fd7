"""What a device holds of published models falls as one over the number of devices, and heads and channels divide."""

import jax
import numpy as np
import pytest
from layouts import PUBLISHED, bytes_by_device, held, shardings_of, state_of

from jax_densevit.models.registry import registered_models
from jax_densevit.training.mesh import make_mesh
from jax_densevit.training.paths import named_leaves
from jax_densevit.training.sharding import parameter_shardings, size_in_bytes

# Not trained here: the network of the FID, and what only `unet_lite` takes its encoder from.
UNTRAINED = ("inception_fid", "efficientnet_lite")


@pytest.mark.parametrize(("name", "variant", "options"), PUBLISHED)
def test_bytes_fall_as_one_over_the_devices(name, variant, options):
    state = state_of(name, variant, **options)
    total = sum(map(size_in_bytes, jax.tree.leaves(state)))
    for fsdp, tensor in ((1, 1), (2, 1), (4, 1), (8, 1), (4, 2), (2, 4)):
        count = fsdp * tensor
        mesh = make_mesh(data=1, fsdp=fsdp, tensor=tensor, devices=jax.devices()[:count])
        assert 1 <= held(state, shardings_of(state, mesh)) * count / total < 1.09, (fsdp, tensor)


@pytest.mark.parametrize(("name", "variant"), [("instance_seq2seg", "token"), ("coltran_color_upsampler", "ColTran")])
def test_what_is_counted_is_what_arrays_take(name, variant):
    state = state_of(name, variant)
    shardings = shardings_of(state, make_mesh(data=1, fsdp=8))
    arrays = jax.device_put(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state), shardings)
    taken = bytes_by_device(arrays)
    assert len(taken) == 8 and set(taken.values()) == {held(state, shardings)}
    assert sum(taken.values()) < 1.09 * sum(map(size_in_bytes, jax.tree.leaves(state)))


@pytest.mark.parametrize("name", [name for name in registered_models() if name not in UNTRAINED])
def test_every_model_divides_most_of_itself_over_tensor(name):
    """By the rules of its layers alone, two devices; FSDP then divides the same tensors further."""
    params, _ = state = state_of(name, {"spiral": "S/16"}.get(name))  # its default has three heads
    places = named_leaves(parameter_shardings(params, make_mesh(data=4, tensor=2)))
    sizes = {path: leaf.size for path, leaf in named_leaves(params).items()}
    divided = sum(size for path, size in sizes.items() if not places[path].is_fully_replicated)
    assert divided > 0.6 * sum(sizes.values())
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    total = sum(map(size_in_bytes, jax.tree.leaves(state)))
    share = divided / sum(sizes.values())
    assert held(state, shardings_of(state, mesh)) < 1.09 * total * (share / 8 + (1 - share) / 4)
