"""The kernel distance against its definition in loops, and what must not change it."""

import jax
import numpy as np
import pytest

from jax_densevit.metrics.kernel_distance import KernelDistance


def merged(metric, pictures, reference, size=7, order=None):
    """A state out of batches of `size`, the last filled up and masked, merged in any order."""
    measure = jax.jit(metric.measure)
    batches = []
    for side, rows in (("pictures", pictures), ("reference", reference)):
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            filled = np.pad(part, ((0, size - len(part)), (0, 0)), constant_values=9)
            mask, place = np.arange(size) < len(part), np.arange(start, start + size)
            batches.append(jax.device_get(measure(**{side: filled}, mask=mask, place=place)))
    state = metric.empty()
    for i in range(len(batches)) if order is None else order(len(batches)):
        state = metric.merge(state, batches[i])
    return state


def features(seed, rows, shift=0.0):
    return np.maximum(np.random.default_rng(seed).normal(shift, 1, (rows, 6)), 0).astype(np.float32)


def in_loops(x, y):
    def kernel(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    within = [np.mean([kernel(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]) for s in (x, y)]
    return sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_exact_where_both_fit_into_a_subset():
    x, y = features(0, 20), features(1, 13, 0.5)
    found = KernelDistance().compute(merged(KernelDistance(), x, y))
    assert found["kernel_distance"] == pytest.approx(in_loops(x, y), rel=1e-9)
    assert found["kernel_distance_std"] is None and (found["subsets"], found["subset_size"]) == (1, 13)


def test_subsets_estimate_the_same():
    """Unbiased: the mean over subsets is that of all vectors, whatever the subsets' size, within its own error."""
    x, y = features(2, 400), features(3, 300, 0.2)
    exact = KernelDistance(subset_size=400).compute(merged(KernelDistance(), x, y, 100))["kernel_distance"]
    for size in (10, 40):
        metric = KernelDistance(subsets=400, subset_size=size)
        found = metric.compute(merged(metric, x, y, 100))
        error = found["kernel_distance_std"] / 400**0.5
        assert abs(found["kernel_distance"] - exact) < 4 * error and error < 0.3 * exact
    same = KernelDistance(subsets=400, subset_size=40)
    found = same.compute(merged(same, features(4, 400), features(5, 400), 100))
    assert abs(found["kernel_distance"]) < 0.2 * exact  # two samples of one distribution


def test_any_batches_in_any_order_to_the_last_digit():
    x, y = features(6, 60), features(7, 50, 0.3)
    metric = KernelDistance(subsets=5, subset_size=12, keep=30)
    want = metric.compute(merged(metric, x, y))
    for size, order in ((60, None), (4, lambda n: range(n)[::-1]), (9, np.random.default_rng(0).permutation)):
        assert metric.compute(merged(metric, x, y, size, order)) == want
    state = merged(metric, x, y)
    assert KernelDistance(subsets=5, subset_size=12, keep=30, seed=1).compute(state) != want
    assert len(state["pictures"]["rows"]) == len(state["reference"]["rows"]) == 30
    kept = state["pictures"]["place"]
    np.testing.assert_array_equal(state["pictures"]["rows"], x[kept])
    assert len(set(kept)) == 30 and 15 < kept.mean() < 45  # spread over the set


def test_nothing_to_compare():
    metric = KernelDistance()
    assert metric.compute(metric.empty())["kernel_distance"] is None
    assert metric.compute(merged(metric, features(0, 1), features(1, 5)))["kernel_distance"] is None
