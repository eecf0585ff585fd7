import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.optimize import linear_sum_assignment

from jax_densevit.errors import UserError
from jax_densevit.tasks.matching import METHODS, match, target_of_query

METHOD = pytest.mark.parametrize("method", list(METHODS))
solve = jax.jit(match, static_argnames="method")


def total(costs, query):
    """Cost of one image, float64, and the number of pairs; refuses a query taken twice."""
    target = np.flatnonzero(query >= 0)
    assert len(set(query[target])) == len(target) and query.max(initial=-1) < len(costs)
    return costs.astype(np.float64)[query[target], target].sum(), len(target)


def best(costs):
    pairs = linear_sum_assignment(costs.astype(np.float64))
    return costs.astype(np.float64)[pairs].sum(), len(pairs[0])


@METHOD
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 1), (6, 4), (4, 6), (12, 12), (1, 5), (5, 1)]),
    kind=st.sampled_from(["uniform", "negative", "few values", "constant", "wide"]),
)
def test_totals_are_those_of_scipy(method, seed, shape, kind):
    """Also with more targets than queries, ties, and every number of real targets, padding being worth a fortune."""
    rng = np.random.default_rng(seed)
    costs = rng.random((4, *shape))
    costs = {
        "uniform": costs,
        "negative": costs * 20 - 15,
        "few values": np.floor(costs * 3),
        "constant": np.full_like(costs, 2.5),
        "wide": 10 ** (6 * costs - 3),
    }[kind].astype(np.float32)
    count = rng.integers(0, shape[1] + 1, 4)
    count[:2] = 0, shape[1]
    for image, n in enumerate(count):
        costs[image, :, n:] = rng.choice([-1e6, np.nan, 0])
    found = solve(costs, count, method=method)
    query = np.asarray(found.query)
    assert np.asarray(found.finite).all() and query.dtype == np.int32
    for image, n in enumerate(count):
        assert (query[image, n:] == -1).all()
        ours, truth = total(costs[image, :, :n], query[image, :n]), best(costs[image, :, :n])
        assert ours[1] == truth[1]
        np.testing.assert_allclose(ours[0], truth[0], rtol=2e-6, atol=2e-6)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_permuting_queries_or_targets_permutes_the_answer(seed):
    rng = np.random.default_rng(seed)
    costs = rng.random((1, 9, 6)).astype(np.float32)
    plain = np.asarray(solve(costs, np.array([6])).query)[0]
    queries, targets = rng.permutation(9), rng.permutation(6)
    moved = np.asarray(solve(costs[:, queries], np.array([6])).query)[0]
    np.testing.assert_array_equal(queries[moved], plain)
    moved = np.asarray(solve(costs[:, :, targets], np.array([6])).query)[0]
    np.testing.assert_array_equal(moved, plain[targets])


def test_a_batch_is_its_images_one_by_one_and_vmapped():
    rng = np.random.default_rng(3)
    costs, count = rng.random((5, 7, 4)).astype(np.float32), np.array([4, 0, 2, 1, 3])
    whole = np.asarray(solve(costs, count).query)
    single = [np.asarray(solve(costs[i : i + 1], count[i : i + 1]).query)[0] for i in range(5)]
    np.testing.assert_array_equal(whole, single)
    mapped = jax.jit(jax.vmap(lambda c, n: match(c[None], n[None]).query[0]))(costs, count)
    np.testing.assert_array_equal(whole, mapped)
    called = jax.jit(jax.vmap(lambda c, n: match(c[None], n[None], "scipy").query[0]))(costs, count)
    np.testing.assert_array_equal(whole, called)


def test_batches_over_several_devices():
    rng = np.random.default_rng(4)
    costs, count = rng.random((8, 6, 4)).astype(np.float32), rng.integers(0, 5, 8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    spread = solve(jax.device_put(costs, rows), jax.device_put(count, rows))
    np.testing.assert_array_equal(spread.query, solve(costs, count).query)


@METHOD
def test_costs_that_are_no_numbers_are_avoided(method):
    """Whatever is in the matrix, the answer comes, uses no such pair, and has as many pairs as can be."""
    rng = np.random.default_rng(0)
    costs = rng.random((8, 6, 4)).astype(np.float32)
    costs[1, 2, 3] = np.nan
    costs[2] = np.nan
    costs[3, :, 1] = np.inf
    costs[4, 0, 0] = -np.inf
    costs[5, 1:] = np.nan
    costs[6, :, 3] = np.nan  # padding there
    found = _within_a_minute(lambda: solve(costs, np.array([4, 4, 4, 4, 4, 4, 3, 0]), method=method))
    np.testing.assert_array_equal(found.finite, [1, 0, 0, 0, 0, 0, 1, 1])
    query = np.asarray(found.query)
    np.testing.assert_array_equal((query >= 0).sum(1), [4, 4, 0, 3, 4, 1, 3, 0])
    for image in range(8):
        assert np.isfinite(total(costs[image], query[image])[0])
    rest = np.where(np.isnan(costs[1]), 100, costs[1])
    np.testing.assert_allclose(total(costs[1], query[1])[0], best(rest)[0], rtol=1e-6)


def _within_a_minute(compute):
    """A loop on the device cannot be interrupted, so it is waited for from outside."""
    answers = []
    thread = threading.Thread(target=lambda: answers.append(jax.block_until_ready(compute())), daemon=True)
    thread.start()
    thread.join(60)
    assert answers, "the matching did not return"
    return answers[0]


@METHOD
def test_crowded_images_with_costs_that_are_no_numbers(method):
    costs = np.array([[[np.nan, 3, 2, 5], [np.inf, 1, 9, 9]]], np.float32)
    np.testing.assert_array_equal(solve(costs, np.array([4]), method=method).query, [[-1, 1, 0, -1]])
    np.testing.assert_array_equal(solve(costs, np.array([2]), method=method).query[0, 2:], [-1, -1])


@METHOD
@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 3), (2, 3, 0)])
def test_nothing_to_match(method, shape):
    found = solve(np.zeros(shape, np.float32), np.zeros(shape[0], np.int32), method=method)
    assert found.query.shape == (shape[0], shape[2]) and (np.asarray(found.query) == -1).all()
    assert np.asarray(found.finite).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int32])
def test_other_types_are_solved_in_float32(dtype):
    costs = jnp.asarray(np.random.default_rng(1).normal(0, 40, (3, 8, 5))).astype(dtype)
    count = np.array([5, 5, 3])
    exact = np.asarray(costs.astype(jnp.float32))
    query = np.asarray(solve(costs, count).query)
    for image, n in enumerate(count):
        ours, truth = total(exact[image, :, :n], query[image, :n]), best(exact[image, :, :n])
        np.testing.assert_allclose(ours, truth, rtol=1e-6)


def test_targets_of_queries_invert_the_queries_of_targets():
    query = jnp.array([[2, -1, 0], [-1, -1, -1], [3, 1, -1]])
    expected = [[2, -1, 0, -1], [-1, -1, -1, -1], [-1, 1, -1, 0]]
    np.testing.assert_array_equal(target_of_query(query, 4), expected)


def test_no_gradient_goes_through_the_choice():
    costs = jnp.asarray(np.random.default_rng(0).random((1, 4, 3)), jnp.float32)

    def chosen(costs):
        return jnp.take_along_axis(costs, match(costs, jnp.array([3])).query[:, None], 1).sum()

    gradient = np.asarray(jax.grad(chosen)(costs))
    assert set(np.unique(gradient)) == {0.0, 1.0} and gradient.sum() == 3


def test_unknown_methods_are_named():
    with pytest.raises(UserError, match="matching method"):
        match(jnp.zeros((1, 2, 2)), jnp.array([2]), "hungarian")


def test_padded_targets_take_no_steps():
    """The loop's iterations, counted: those of the real targets, not of the slots."""
    costs = np.random.default_rng(0).random((4, 20, 20)).astype(np.float32)
    few = _steps(costs[:, :, :5], 5)
    assert _steps(costs, 5) == few < _steps(costs, 20) / 4
    assert _steps(costs, 0) == 0


def _steps(costs, n):
    loop = jax.lax.while_loop
    counted = []

    def counting(condition, body, state):
        steps, state = loop(lambda c: condition(c[1]), lambda c: (c[0] + 1, body(c[1])), (jnp.int32(0), state))
        counted.append(int(steps))
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "while_loop", counting)
        match(costs, np.full(len(costs), n))
    return counted[0]


@pytest.mark.reference
@METHOD
def test_reference_assignments(reference_data, method):
    golden = np.load(reference_data / "goldens/instance/lsap.npz", allow_pickle=False)
    check = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    cases = [key.removesuffix("_cost") for key in golden.files if key.endswith("_cost") and key != "batch_cost"]
    assert len(cases) == 12
    for case in cases:
        costs = golden[f"{case}_cost"]
        query = np.asarray(solve(costs[None], np.array([costs.shape[1]]), method=method).query)[0]
        check(total(costs, query)[0], golden[f"{case}_total"], err_msg=case)
        if golden[f"{case}_unique"]:
            expected = np.full(costs.shape[1], -1)
            expected[golden[f"{case}_col"]] = golden[f"{case}_row"]
            np.testing.assert_array_equal(query, expected, err_msg=case)
    query = np.asarray(solve(golden["batch_cost"], golden["batch_nvalid"], method=method).query)
    np.testing.assert_array_equal(query, golden["batch_query_of_target"])
    check([total(c, q)[0] for c, q in zip(golden["batch_cost"], query, strict=True)], golden["batch_total"])
