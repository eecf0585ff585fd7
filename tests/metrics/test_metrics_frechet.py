"""Fréchet distances against closed forms, SciPy and 60-digit arithmetic; the same in any batches and order."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from jax_densevit.errors import UserError
from jax_densevit.metrics.frechet import FrechetDistance, caution, count, from_gaussian, gaussian

METRIC = FrechetDistance()
MEASURE = jax.jit(METRIC.measure)


def state_of(pictures, reference, cuts=()):
    """A state of both sets, out of batches cut at these shares."""
    state = METRIC.empty()
    for side, rows in (("pictures", pictures), ("reference", reference)):
        for part in np.split(rows, [int(share * len(rows)) for share in sorted(cuts)]):
            state = METRIC.merge(state, {side: {"rows": part, "mask": np.ones(len(part), bool)}})
    return state


def distance(pictures, reference, cuts=()):
    return METRIC.compute(state_of(pictures, reference, cuts))["frechet_distance"]


def features(seed, rows, width, spread=1.0):
    """Correlated positive vectors, as a network behind a ReLU gives them."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, width)) @ np.random.default_rng(1).normal(size=(width, width)) * spread
    return np.maximum(mixed, -0.5).astype(np.float32)


def written_out(x, y):
    """By SciPy's square root of the product, in float64."""
    (mean_x, cov_x), (mean_y, cov_y) = gaussian_of(x), gaussian_of(y)
    root = sqrtm(cov_x @ cov_y).real
    return np.square(mean_x - mean_y).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * np.trace(root)


def test_against_the_definition():
    x, y = features(2, 90, 8), features(3, 70, 8, 1.5)
    assert distance(x, y) == pytest.approx(written_out(x, y), rel=1e-9)
    assert distance(x, x + 2) == pytest.approx(8 * 2**2, rel=1e-6)  # a shift: the square of its length
    assert distance(x, 3 * x) == pytest.approx(np.square(2 * x.mean(0)).sum() + 4 * np.cov(x.T).trace(), rel=1e-6)
    assert distance(x, x) < 1e-9


def test_singular_covariances_keep_their_digits():
    """Vectors in the first half of the axes against vectors in the second: the trace of the root is 0, exactly.
    And fewer vectors than features against the same with every vector twice, of which the answer is known.
    """
    x, y = features(4, 40, 6), features(5, 30, 6)
    apart = [np.hstack([x, 0 * x]), np.hstack([0 * y, y])]
    variances = sum(np.var(a.astype(float), axis=0, ddof=1).sum() for a in (x, y))
    want = np.square(x.mean(0, dtype=float)).sum() + np.square(y.mean(0, dtype=float)).sum() + variances
    assert distance(*apart) == pytest.approx(want, rel=1e-12)
    few = features(6, 5, 12)
    n, spread = len(few), np.var(few.astype(float), axis=0, ddof=1).sum()
    twice = np.concatenate([few, few])
    ratio = 2 * (n - 1) / (2 * n - 1)  # of the covariances, which are divided by n - 1
    want = spread * (1 - np.sqrt(ratio)) ** 2
    assert distance(few, twice) == pytest.approx(want, rel=1e-9)
    # Of statistics alone, without the vectors.
    gaussians = {side: from_gaussian(len(a), *gaussian_of(a)) for side, a in (("pictures", few), ("reference", twice))}
    assert METRIC.compute(gaussians)["frechet_distance"] == pytest.approx(want, rel=1e-9)


def gaussian_of(rows):
    rows = rows.astype(np.float64)
    return rows.mean(0), np.cov(rows.T)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), max_size=4), st.integers(0, 9), st.sampled_from([(9, 200), (150, 14), (60, 80)]))
def test_any_batches_in_any_order(cuts, seed, counts):
    """Means far from zero with little variance, which sums of squares would lose."""
    x, y = (1000 + features(seed + i, n, 12, 0.01) for i, n in enumerate(counts))
    want = distance(x, y)
    rng = np.random.default_rng(seed)
    parts = [state_of(a, y[:0]) for a in np.split(x, [int(share * len(x)) for share in sorted(cuts)]) if len(a)]
    parts += [state_of(x[:0], a) for a in np.split(y, [int(share * len(y)) for share in sorted(cuts)]) if len(a)]
    while len(parts) > 1:
        i, j = rng.choice(len(parts), 2, replace=False)
        merged = METRIC.merge(parts[i], parts[j])
        parts = [part for k, part in enumerate(parts) if k not in (i, j)] + [merged]
    found = METRIC.compute(parts[0])
    assert found["frechet_distance"] == pytest.approx(want, rel=1e-9, abs=1e-9)
    assert (found["pictures"], found["reference"], found["features"]) == (*counts, 12)


def test_masked_rows_of_a_jitted_batch():
    x, y = features(7, 8, 5), features(8, 8, 5)
    batch = jax.device_get(MEASURE(x, y, np.arange(8) < 6))
    assert METRIC.compute(METRIC.merge(METRIC.empty(), batch))["frechet_distance"] == distance(x[:6], y[:6])
    whole = jax.device_get(MEASURE(reference=y))
    assert count(METRIC.merge(METRIC.empty(), whole)["reference"]) == 8


def test_gaussian_and_back():
    state = state_of(features(1, 70, 6), features(2, 4, 6), [0.1, 0.6])
    for side in state.values():
        mean, covariance = gaussian(side)
        back = from_gaussian(count(side), mean, covariance)
        assert count(back) == count(side)
        np.testing.assert_allclose(gaussian(back)[1], covariance, rtol=1e-12)


def test_too_few_and_damaged():
    x = features(1, 5, 3)
    assert METRIC.compute(METRIC.empty())["frechet_distance"] is None
    assert distance(x[:1], x) is None
    for rows in (x[:3], x):  # as vectors, and added up
        bad = rows.copy()
        bad[0, 0] = np.nan
        with pytest.raises(UserError, match="not finite"):
            distance(bad, x)


def test_cautions():
    assert "mostly bias" in caution(2048, 50_000, 2048)
    assert "1 / n" in caution(50_000, 9_999, 2048)
    assert caution(10_000, 50_000, 2048) == ""


@pytest.mark.reference
@pytest.mark.parametrize("block", [5, 64, 10**6])
def test_sixty_digits(reference_data, block):
    """Ill-conditioned and singular cases against arithmetic in 60 digits: from batches, and from statistics alone."""
    stored = np.load(reference_data / "goldens/metrics/fid_golden.npz")
    for case in stored["names"]:
        x, y, truth = (stored[f"{case}/{name}"] for name in ("x", "y", "truth_mp60"))
        cuts = np.arange(block, max(len(x), len(y)), block)
        found = METRIC.empty()
        for side, rows in (("reference", y), ("pictures", x)):
            for part in np.split(rows, cuts[cuts < len(rows)]):
                found = METRIC.merge({side: {"rows": part, "mask": np.ones(len(part), bool)}}, found)
        tolerance = {"rel": 1e-9, "abs": 1e-9}
        assert METRIC.compute(found)["frechet_distance"] == pytest.approx(float(truth), **tolerance), case
        sides = {
            side: from_gaussian(len(rows), stored[f"{case}/mu{i}"], stored[f"{case}/sigma{i}"])
            for side, rows, i in (("pictures", x, 1), ("reference", y, 2))
        }
        assert METRIC.compute(sides)["frechet_distance"] == pytest.approx(float(truth), **tolerance), case
