import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from jax_densevit.metrics.clustering import AdjustedRandIndex


def run(metric, *batches):
    state = metric.empty()
    for batch in batches:
        state = metric.merge(state, jax.device_get(jax.jit(metric.measure)(*batch)))
    return metric.compute(state)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_scikit_learn_gives_the_same(seed):
    rng = np.random.default_rng(seed)
    truth, predicted = rng.integers(0, 4, (6, 5, 7)), rng.integers(0, 3, (6, 5, 7))
    predicted[:3] = np.where(rng.random((3, 5, 7)) < 0.8, truth[:3] % 3, predicted[:3])
    truth[4], truth[5] = truth[4] > 1, 0
    metric = AdjustedRandIndex(3, 2)
    result = run(metric, (truth[:4], predicted[:4]), (truth[4:], predicted[4:]))
    expected = [adjusted_rand_score(t[t > 0], p[t > 0]) for t, p in zip(truth[:5], predicted[:5], strict=True)]
    np.testing.assert_allclose(result["ARI"], np.mean(expected[:4]), rtol=1e-12)
    np.testing.assert_allclose(result["ARI_of_all"], np.mean(expected), rtol=1e-12)
    assert result["images"] == 5
    masked = run(metric, (truth, predicted, np.arange(6) < 1))
    np.testing.assert_allclose(masked["ARI"], expected[0], rtol=1e-12)


def test_names_do_not_matter_and_nothing_is_undefined():
    truth = np.array([[[0, 1, 1, 2, 2, 3]]])
    renamed = np.array([[[5, 4, 4, 0, 0, 1]]])
    metric = AdjustedRandIndex(3, 5)
    assert run(metric, (truth, renamed))["ARI"] == 1
    single = run(metric, (np.minimum(truth, 1), np.minimum(truth, 1)))
    assert single["ARI"] is None and single["ARI_of_all"] == 1
    assert run(metric, (truth * 0, renamed)) == {"ARI": None, "ARI_of_all": None, "images": 0}


def test_large_pictures_are_counted_exactly():
    """Pairs of pixels of a 1000 x 1000 picture do not fit 32 bits."""
    truth = np.ones((1, 1000, 1000), np.int32)
    truth[:, 500:] = 2
    predicted = truth.copy()
    predicted[:, 499:501] = 3
    expected = adjusted_rand_score(truth.ravel(), predicted.ravel())
    np.testing.assert_allclose(run(AdjustedRandIndex(2, 3), (truth, predicted))["ARI"], expected, rtol=1e-12)
