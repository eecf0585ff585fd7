"""Area resizing against exact integer arithmetic: every pixel cut into equal parts, whole blocks of parts averaged."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_densevit.layers.resize import area_weights, center_square, resize_area

SIDES = st.tuples(st.integers(1, 9), st.integers(1, 9))


def exact(x, size):
    """Round half to even of the exact mean of each area."""
    height, width = x.shape[:2]
    parts = x.astype(np.int64).repeat(size[0], 0).repeat(size[1], 1)
    sums = parts.reshape(size[0], height, size[1], width, -1).sum((1, 3))
    return np.array([round(Fraction(int(total), height * width)) for total in sums.flat]).reshape(sums.shape)


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.integers(0, 2**16))
def test_host_is_exact(shape, size, seed):
    x = np.random.default_rng(seed).integers(0, 256, (*shape, 2)).astype(np.uint8)
    y = resize_area(x, size)
    assert isinstance(y, np.ndarray) and y.dtype == np.int32
    np.testing.assert_array_equal(y, exact(x, size))


@pytest.mark.parametrize("size", [(4, 2), (8, 12), (16, 6), (4, 24), (5, 8), (3, 7)])
def test_device_is_exact(size):
    x = np.random.default_rng(1).integers(0, 256, (2, 8, 12, 3)).astype(np.uint8)
    y = jax.jit(resize_area, static_argnums=1)(jnp.asarray(x), size)
    assert isinstance(y, jax.Array) and y.dtype == jnp.int32
    np.testing.assert_array_equal(y, [exact(one, size) for one in x])


def test_halves_go_to_the_even_number():
    x = np.array([[0, 1, 1, 2, 2, 3]]).repeat(2, 0)[..., None]
    for kind in (np.asarray, jnp.asarray):
        np.testing.assert_array_equal(np.ravel(resize_area(kind(x), (1, 3))), [0, 2, 2])


def test_weights_share_out_every_pixel():
    for given_, length in ((500, 256), (7, 3), (3, 7), (256, 64)):
        weights = area_weights(given_, length)
        assert (weights.sum(1) == given_).all() and (weights.sum(0) == length).all() and (weights >= 0).all()


def test_center_square():
    x = np.arange(4 * 7)[None].reshape(4, 7, 1)
    np.testing.assert_array_equal(center_square(x), x[:, 1:5])
    np.testing.assert_array_equal(center_square(x.swapaxes(0, 1)), x.swapaxes(0, 1)[1:5])


def test_large_photographs_stay_exact_on_the_host_and_are_refused_on_the_device():
    x = np.full((4096, 4096, 1), 255, np.uint8)
    x[:2048] = 254  # the mean is 254.5
    assert resize_area(x, (1, 1)).item() == 254 and resize_area(x, (2, 1)).tolist() == [[[254]], [[255]]]
    with pytest.raises(ValueError, match="8 million"):
        resize_area(jnp.zeros((1, 4096, 2049, 1), jnp.uint8), (4, 4))


def test_refuses_an_empty_size():
    with pytest.raises(ValueError, match="positive"):
        resize_area(np.zeros((2, 2, 1), np.uint8), (0, 1))
