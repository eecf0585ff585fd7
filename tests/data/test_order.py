"""The order of examples: every epoch exactly, any host count, any place at once, and never another order."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_densevit.data import order
from jax_densevit.errors import UserError

SEEDS = st.integers(-(2**63), 2**64)


def splitmix64_of_zero_state(count):
    """The published sequence of SplitMix64 from state 0, in Python integers."""
    mask, state, out = 2**64 - 1, 0, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


def test_the_mixing_function_is_splitmix64():
    states = (np.arange(5, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    with np.errstate(over="ignore"):
        ours = order._splitmix64(states)
    assert ours.tolist() == splitmix64_of_zero_state(5)
    assert ours[0] == 0xE220A8397B1DCDAF  # the first number that every implementation of SplitMix64 gives from state 0


def test_the_order_can_never_change_unnoticed():
    """Runs under way would see other examples after an update: these numbers are for ever."""
    assert order.epoch_order(0, 0, 10).tolist() == [8, 9, 1, 5, 3, 0, 4, 6, 7, 2]
    assert int(order.counter_hash(1, 2, 3)) == 9812528628958509896
    assert order.augmentation_seeds(7, 3, np.arange(2)).tolist() == [[3206307100, 1391235409], [178072138, 2349220121]]


@given(st.lists(st.integers(-(2**70), 2**70), max_size=5))
def test_the_hash_of_integers_is_the_hash_of_arrays(counters):
    assert order.scalar_hash(*counters) == int(order.counter_hash(*counters))


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, epoch=st.integers(0, 10**6), n=st.integers(1, 300))
def test_every_epoch_holds_every_example_once(seed, epoch, n):
    index, epochs = order.examples_at(epoch * n + np.arange(n), seed, n)
    assert sorted(index) == list(range(n))
    assert (epochs == epoch).all()


@settings(max_examples=50, deadline=None)
@given(
    seed=SEEDS,
    n=st.integers(1, 50),
    step=st.integers(0, 100),
    hosts=st.integers(1, 8),
    per_host=st.integers(1, 5),
)
def test_hosts_in_turn_are_the_global_batch(seed, n, step, hosts, per_host):
    batch = hosts * per_host
    positions = step * batch + np.arange(batch)
    whole, _ = order.examples_at(positions, seed, n)
    parts = [order.examples_at(positions[order.host_rows(batch, h, hosts)], seed, n)[0] for h in range(hosts)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_epochs_and_seeds_give_different_orders():
    orders = {tuple(order.epoch_order(seed, epoch, 100)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_places_are_used_evenly():
    """Over many epochs each example is equally often first: a chi-square of 9 degrees of freedom stays below 40."""
    first = np.bincount([order.epoch_order(1, epoch, 10)[0] for epoch in range(2000)], minlength=10)
    assert ((first - 200) ** 2 / 200).sum() < 40


def test_a_far_step_is_instant():
    started = time.perf_counter()
    index, epoch = order.examples_at(10**7 * 16 + np.arange(16), 0, 20_210)
    assert time.perf_counter() - started < 1
    assert (epoch == (10**7 * 16 + np.arange(16)) // 20_210).all() and (index < 20_210).all()


def test_augmentation_seeds_depend_on_seed_epoch_and_example_alone():
    seeds = order.augmentation_seeds(5, np.arange(40)[:, None], np.arange(50))
    assert seeds.shape == (40, 50, 2) and seeds.dtype == np.uint32
    assert len({tuple(pair) for pair in seeds.reshape(-1, 2).tolist()}) == 2000
    assert tuple(seeds[3, 7].tolist()) == order.augmentation_seed(5, 3, 7)
    assert (order.augmentation_seeds(6, 3, 7) != seeds[3, 7]).any()


def test_the_order_is_read_only():
    with pytest.raises(ValueError, match="read-only"):
        order.epoch_order(0, 0, 5)[0] = 1


@pytest.mark.parametrize(("batch", "hosts"), [(0, 1), (10, 4), (2, 3), (-4, 2)])
def test_a_batch_that_hosts_cannot_share_is_refused(batch, hosts):
    with pytest.raises(UserError, match=f"batch_size is {batch}.*multiple of {hosts}"):
        order.host_rows(batch, 0, hosts)


def test_an_empty_set_and_negative_positions_are_refused():
    with pytest.raises(UserError, match="no examples"):
        order.examples_at(np.arange(3), 0, 0)
    with pytest.raises(ValueError, match="start at 0"):
        order.examples_at(np.array([-1]), 0, 3)
