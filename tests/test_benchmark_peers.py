"""The written-out peers hold our weights, and give our outputs and gradients.

Only with `--peers`, where `pip install ".[test,peers]"` was said: `pytest -n 0 -m peers --peers
tests/test_benchmark_peers.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.benchmark_peers import contenders
from jax_densevit.models import create_model
from jax_densevit.models.counts import count_parameters
from jax_densevit.pretrained import convert
from jax_densevit.timing import build_model, parse_job

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

UFORMER = {"base": 2, "heads": (1, 1, 2, 2, 4, 4, 2, 2, 1), "depths": (1, 2, 1, 1, 2, 1, 1, 2, 1), "window": 2}
AXIAL = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "mlp_size": 12}
DPT = {"hidden_size": 24, "num_layers": 4, "num_heads": 2, "mlp_size": 96, "image_size": (64, 64)}
DPT |= {"reassemble": (4, 6, 8, 10), "features": 8, "head_dropout": 0.0, "norm_epsilon": 1e-12}


def peer(name, model):
    """The peer of a model, its weights and statistics noise."""
    import torch

    from jax_densevit.peers import axial, dpt, uformer

    torch.manual_seed(0)
    module = {"uformer": uformer.Uformer, "axial": axial.Axial, "dpt": dpt.Dpt}[name](model)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(torch.empty_like(weight).uniform_(-0.1, 0.1))
    return module


def tensors_of(module):
    state = getattr(module, "whole", module).state_dict()
    return {name: value.detach().numpy().copy() for name, value in state.items()}


@pytest.mark.parametrize(
    ("name", "source", "options", "size"),
    [
        ("uformer", "uformer", {**UFORMER, "modulator": True, "drop_path": 0.0}, (32, 64)),
        ("axial", "axial", AXIAL, (8, 12)),
        ("dpt", "hf_dpt", DPT, (64, 64)),
    ],
)
def test_outputs_and_gradients_are_ours(name, source, options, size):
    """Gradients to the image: what a training step computes, and for the axial one the reversible backward pass."""
    import torch

    model = create_model(name, **options)
    module = peer(name, model)
    variables = convert(tensors_of(module), source, model)
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)

    def loss(x, train):
        out, _ = model.apply(variables, x, train=train, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)})
        heads = jax.tree.leaves((out.logits, out.auxiliary)) if train else [out.logits]
        return sum(jnp.sin(y).mean() for y in heads), heads

    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    for train in (False, True):
        (_, ours), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(x, train)
        theirs = module.train(train)(images)
        theirs = theirs if isinstance(theirs, list) else [theirs]
        assert len(ours) == len(theirs)
        for got, want in zip(theirs, ours, strict=True):
            assert np.abs(want).max() > 0.1
            np.testing.assert_allclose(got.detach().permute(0, 2, 3, 1), want, atol=1e-4 * np.abs(want).max())
        images.grad = None
        sum(torch.sin(y).mean() for y in theirs).backward()
        gradient = np.asarray(gradient)
        np.testing.assert_allclose(images.grad.permute(0, 2, 3, 1), gradient, atol=1e-4 * np.abs(gradient).max())


@pytest.mark.parametrize(
    "text",
    ["uformer:T@128", "uformer:S@256", "uformer:B@256", "uformer:B-modulator@256", "axial:128@32", "dpt:base@224"],
)
def test_parameters_are_as_many(text):
    import torch

    from jax_densevit import benchmark_peers

    job = parse_job(text)
    builder = {"uformer": "_uformers", "axial": "_axials", "dpt": "_dpts"}[job.name]
    with torch.device("meta"):
        ((_, module),) = getattr(benchmark_peers, builder)(job)
    assert sum(p.numel() for p in module.parameters()) == count_parameters(build_model(job, {}), job.size)


def test_a_step_of_a_peer_learns():
    found, note = contenders(parse_job("uformer:T@128"), 1, True, "float32")
    assert [contender.kind for contender in found] == ["forward", "train step"] and note == ""
    assert all(contender.same for contender in found)
    before = found[0].call().clone()
    found[1].call()
    assert not np.array_equal(before, found[0].call())


def test_what_has_no_peer_is_said():
    for text in ("uformer:T@96", "axial:128-positions@16", "dpt:hybrid@64", "dpt:base@64x96", "seq2seg"):
        found, note = contenders(parse_job(text), 1, False, "float32")
        assert found == [] and "timed alone" in note
