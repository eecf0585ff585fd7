"""The upsamplers: published sizes and costs, channels that share everything but their embedding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_coltran import SIZE, parameters, upsampler

from jax_densevit.errors import UserError
from jax_densevit.models.counts import count_parameters
from jax_densevit.models.registry import create_model, example_inputs, find_model

STAGES = ("color", "spatial")


def inputs(stage, batch=2, seed=3):
    rng = np.random.default_rng(seed)
    top = {"color": 8, "spatial": 256}[stage]
    values = rng.integers(0, top, (batch, 3, *SIZE), dtype=np.int32)
    return values, rng.integers(0, 255, (batch, *SIZE), dtype=np.int32), np.tile(np.arange(3), (batch, 1))


@pytest.mark.parametrize("stage,expected", [("color", 13_476_608), ("spatial", 10_910_464)])
def test_published_parameter_counts(stage, expected):
    model = create_model(f"coltran_{stage}_upsampler")
    assert count_parameters(model, model.image_size) == expected


@pytest.mark.parametrize("stage,tera", [("color", 0.34), ("spatial", 4.6)])
def test_published_costs(stage, tera):
    """TFLOP of three channels. The original projects two concatenated embeddings pixel by pixel; here tables do."""
    name = f"coltran_{stage}_upsampler"
    model = create_model(name)
    height, width = model.image_size
    saved = 3 * height * width * 2 * 512 * 512
    total = 2 * (find_model(name).macs(model, model.image_size) + saved) / 1e12
    assert float(f"{total:.2g}") == tera


@pytest.mark.parametrize("stage", STAGES)
def test_macs_are_those_the_compiler_counts(stage):
    model = upsampler(stage, image_size=(24, 16), hidden_size=128, mlp_size=192)
    args = example_inputs(model, (24, 16))
    lowered = jax.jit(model.apply).lower(jax.eval_shape(model.init, jax.random.key(0), *args), *args)
    macs = find_model(f"coltran_{stage}_upsampler").macs(model, (24, 16))
    assert 1 < lowered.cost_analysis()["flops"] / 2 / macs < 1.05


@pytest.fixture(scope="module", params=STAGES)
def stage(request):
    """(apply, values, gray, channels, logits) of one picture in each stage; `apply` takes any batch of one shape."""
    model = upsampler(request.param)
    params = {"params": parameters(model)}
    apply = jax.jit(lambda *x: model.apply(params, *x).logits)
    given = inputs(request.param)
    return apply, *given, np.asarray(apply(*given))


def test_permuted_channels_give_permuted_outputs(stage):
    apply, values, gray, channels, logits = stage
    assert logits.shape == (2, 3, *SIZE, 256) and logits.dtype == np.float32
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(apply(values[:, order], gray, channels[:, order]), logits[:, order], atol=1e-5)


def test_one_channel_as_in_training_is_what_three_give(stage):
    apply, values, gray, channels, logits = stage
    rows, drawn = np.arange(2), np.array([2, 1])
    one = apply(values[rows, drawn][:, None], gray, drawn[:, None])
    np.testing.assert_allclose(one[:, 0], logits[rows, drawn], atol=1e-5)


def test_a_channel_knows_itself_and_the_gray_picture(stage):
    apply, values, gray, channels, logits = stage
    other = values.copy()
    other[:, 1, 0, 0] ^= 1
    found = apply(other, gray, channels)
    np.testing.assert_array_equal(found[:, ::2], logits[:, ::2])
    assert (np.abs(found[:, 1] - logits[:, 1]).max(-1) > 1e-5).all()  # every pixel of its own channel
    other = gray.copy()
    other[:, 1, 1] ^= 1
    assert (np.abs(apply(values, other, channels) - logits).max(-1) > 1e-5).all()
    # The same values under another channel's name are something else.
    assert np.abs(apply(values, gray, channels[:, [1, 2, 0]]) - logits).max() > 1e-3


def test_gradient_reaches_every_parameter_and_remat_changes_none():
    gradients = []
    for policy in ("none", "full"):
        model = upsampler(remat=policy, num_layers=1)
        params = parameters(model)

        def loss(params, model=model):
            return jnp.square(model.apply({"params": params}, *inputs("color"), train=True).logits).mean()

        gradients.append(jax.jit(jax.grad(loss))(params))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients[0]):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    for kept, recomputed in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(recomputed, kept, atol=1e-5)


def test_half_precision_computes_in_it_and_answers_in_float32():
    model = upsampler()
    params = {"params": parameters(model)}
    exact = jax.jit(model.apply)(params, *inputs("color")).logits
    half = jax.jit(upsampler(dtype="bfloat16").apply)(params, *inputs("color")).logits
    assert half.dtype == jnp.float32 and 0 < np.abs(half - exact).max() < 0.1 * np.abs(exact).max()


def test_refuses_pictures_of_another_size():
    model = upsampler()
    with pytest.raises(UserError, match="made for pictures of 3 x 4.*got 6 x 4"):
        jax.eval_shape(model.init, jax.random.key(0), *example_inputs(model, (6, 4)))
