"""Values drawn from the upsamplers, against their channels one by one."""

import functools

import jax
import numpy as np
import pytest
from tiny_coltran import SIZE, parameters, picture, upsampler

from jax_densevit.errors import UserError
from jax_densevit.models.coltran.sampling import picture_keys
from jax_densevit.models.coltran.upsampling import sample_channels

BATCH = 3


def coarse(top, size=SIZE):
    return np.random.default_rng(5).integers(0, top, (BATCH, *size, 3), dtype=np.int32)


def one_by_one(model, params, values, gray):
    """Logits of one channel of one picture after the other `[B, H, W, 3, 256]`."""
    apply = jax.jit(model.apply)
    channels = [
        [
            apply({"params": params}, values[None, None, ..., c], gray[None], np.array([[c]])).logits[0, 0]
            for c in range(3)
        ]
        for values, gray in zip(values, gray, strict=True)
    ]
    return np.asarray(channels).transpose(0, 2, 3, 1, 4)


@pytest.mark.parametrize("stage,small", [("color", SIZE), ("spatial", (3, 2)), ("spatial", (1, 4))])
def test_likeliest_values(stage, small):
    """The coarse picture's pixels are repeated in blocks; channels come back in their order."""
    model = upsampler(stage, num_layers=1)
    params = parameters(model)
    gray, _ = picture(BATCH)
    values = coarse(2**model.bits, small)
    repeated = values.repeat(SIZE[0] // small[0], 1).repeat(SIZE[1] // small[1], 2)
    logits = one_by_one(model, params, repeated, gray)
    found = jax.jit(functools.partial(sample_channels, model))(params, values, gray)
    assert found.shape == (BATCH, *SIZE, 3) and found.dtype == np.int32
    np.testing.assert_array_equal(found, logits.argmax(-1))


def test_draws_from_the_logits_by_picture():
    model = upsampler("color", num_layers=1)
    params = parameters(model)
    params["head"]["kernel"] *= 3
    gray, _ = picture(BATCH)
    values, keys = coarse(8), picture_keys(0, np.arange(BATCH))
    run = jax.jit(functools.partial(sample_channels, model))
    drawn = run(params, values, gray, keys, 1.0)
    logits = one_by_one(model, params, values, gray)
    np.testing.assert_array_equal(run(params, values, gray, keys, 0.0), logits.argmax(-1))
    for i in range(BATCH):
        np.testing.assert_array_equal(
            run(params, values[i : i + 1], gray[i : i + 1], keys[i : i + 1], 1.0)[0], drawn[i]
        )
    # 600 keys of one picture: how often each sub-pixel takes its likeliest value.
    p = np.asarray(jax.nn.softmax(logits[0]))
    many = jax.jit(jax.vmap(lambda key: sample_channels(model, params, values[:1], gray[:1], key[None])[0]))(
        picture_keys(1, np.arange(600))
    )
    share = (np.asarray(many) == p.argmax(-1)).mean(0)
    assert (np.abs(share - p.max(-1)) < 5 * (p.max(-1) * (1 - p.max(-1)) / 600) ** 0.5 + 1e-3).all()
    assert abs((share - p.max(-1)).mean()) < 0.01 and np.ptp(share) > 0.3


def test_refuses_sizes_that_do_not_divide():
    with pytest.raises(UserError, match="3 x 4 is no whole multiple of the coarse picture's 2 x 2"):
        sample_channels(upsampler(), {}, coarse(8, (2, 2)), picture(BATCH)[0])
