"""Bits per symbol: sums to the last digit whatever the batches, and what trivial models need."""

import json

import jax
import numpy as np
import pytest

from jax_densevit.metrics.bits import UNIT, Bits


def collected(metric, bits, symbols, splits, mask=None):
    state, mask = metric.empty(), np.ones(len(bits), bool) if mask is None else mask
    for rows in splits:
        state = metric.merge(state, jax.device_get(metric.measure(bits[rows], symbols[rows], mask[rows])))
    return metric.compute(state)


def test_the_mean_is_that_of_rounded_bits_whatever_the_batches_and_masked_examples_count_nothing():
    rng = np.random.default_rng(0)
    bits = rng.exponential(3, (7, 3, 5, 9)).astype(np.float32)
    symbols = rng.integers(0, 4, (7, 3, 5, 9))
    mask = np.array([1, 1, 0, 1, 0, 1, 1], bool)
    bits[2] = np.nan  # of an example that only fills up
    found = collected(Bits(4), bits, symbols, [slice(0, 7)], mask)
    expected = np.round(bits[mask].astype(np.float64) / UNIT).sum() * UNIT / bits[mask].size
    assert found["bits"] == expected == pytest.approx(bits[mask].mean(), abs=UNIT)
    assert found["pictures"] == 5 and found["symbols"] == 5 * 135
    for splits in ([slice(0, 2), slice(2, 7)], [slice(i, i + 1) for i in (3, 6, 0, 2, 1, 5, 4)]):
        assert collected(Bits(4), bits, symbols, splits, mask) == found
    counts = np.bincount(symbols[mask].ravel()) / symbols[mask].size
    assert found["marginal_bits"] == pytest.approx(-(counts * np.log2(counts)).sum()) and found["uniform_bits"] == 2
    json.dumps(found, allow_nan=False)


def test_trivial_models_know_the_context():
    # In context 0 the value is always 1, in context 2 one of two; context 1 does not occur.
    symbols = np.array([[1, 1, 4, 5]])
    found = collected(Bits(2, 3), np.zeros((1, 4), np.float32), symbols, [slice(0, 1)])
    assert found["marginal_bits"] == 0.5 and found["uniform_bits"] == 1 and found["bits"] == 0


def test_large_pictures_and_bits_are_exact():
    bits = np.full((2, 768, 256), 500, np.float32)
    found = collected(Bits(256), bits, np.zeros(bits.shape, int), [slice(0, 2)])
    assert found["bits"] == 500 and found["marginal_bits"] == 0


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 1e9])
def test_what_cannot_be_counted_is_no_number(wrong):
    bits = np.ones((2, 4, 4), np.float32)
    bits[1, 2, 3] = wrong
    found = collected(Bits(2), bits, np.zeros(bits.shape, int), [slice(0, 2)])
    assert found["bits"] is None and found["lost"] == 1


def test_nothing_has_no_bits():
    found = Bits(8).compute(Bits(8).empty())
    assert found["bits"] is None and found["marginal_bits"] is None and found["pictures"] == 0
