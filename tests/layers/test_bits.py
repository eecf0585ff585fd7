"""Symbols and integer gray: round trips, edges of bins, and the rounding of float32 that a compiler could change."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from jax_densevit.layers import bits


@settings(max_examples=20, deadline=None)
@given(arrays(np.int32, array_shapes(max_dims=2, max_side=4), elements=st.integers(0, 511)))
def test_symbols_round_trip(symbols):
    channels = np.asarray(bits.from_symbols(symbols))
    assert channels.shape == (*symbols.shape, 3) and channels.min() >= 0 and channels.max() <= 7
    np.testing.assert_array_equal(bits.to_symbols(channels), symbols)
    np.testing.assert_array_equal(channels @ [64, 8, 1], symbols)


def test_other_numbers_of_bits():
    symbols = np.arange(4**3)
    np.testing.assert_array_equal(bits.to_symbols(bits.from_symbols(symbols, 2), 2), symbols)


def test_bins_and_their_lower_edges():
    values = np.arange(256, dtype=np.uint8)
    coarse = np.asarray(bits.convert_bits(values, 8, 3))
    np.testing.assert_array_equal(coarse, np.arange(256) // 32)
    assert coarse.dtype == np.int32
    np.testing.assert_array_equal(bits.convert_bits(coarse, 3, 8), np.arange(256) // 32 * 32)
    np.testing.assert_array_equal(bits.convert_bits(values, 8, 8), values)


def test_gray_of_integers_rounds_as_float32_without_fused_products():
    """In exact arithmetic the gray of the first three colors is a whole number; float32 falls just below it."""
    colors = np.random.default_rng(0).integers(0, 256, (5000, 3))
    colors = np.concatenate([[[20, 152, 7], [250, 13, 146], [140, 236, 23]], colors]).astype(np.uint8)
    weights = np.array([0.2989, 0.587, 0.114], np.float32)
    parts = colors.astype(np.float32) * weights
    expected = np.floor((parts[:, 0] + parts[:, 1]) + parts[:, 2])
    np.testing.assert_array_equal(expected[:3], [95, 98, 182])
    for rgb in (colors, colors.astype(np.int32)):
        found = jax.jit(bits.gray_from_int32)(rgb)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, expected)


def test_neutral_colors():
    """Weights that sum to 0.9999 make neutral pixels one darker, and white never occurs."""
    neutral = np.stack([np.arange(256)] * 3, -1)
    gray = bits.gray_from_int32(neutral)
    np.testing.assert_array_equal(gray, np.maximum(np.arange(256) - 1, 0))
