"""Accuracy and Dice of matched objects by hand, and the overlaps of maps against those of masks."""

import jax
import numpy as np
import pytest

from jax_densevit.metrics.matched import MatchedObjects
from jax_densevit.metrics.overlaps import map_overlaps, mask_overlaps


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_overlaps_of_a_map_are_those_of_its_masks(rows, monkeypatch):
    monkeypatch.setattr("jax_densevit.metrics.overlaps._BLOCK_BYTES", 4 * 9 * 5 * rows)
    rng = np.random.default_rng(rows)
    predicted, truth = rng.random((3, 10, 9, 5)) < 0.4, rng.integers(0, 7, (3, 10, 9))
    void, mask = (truth == 0) & (rng.random(truth.shape) < 0.5), np.array([True, False, True])
    slots = np.moveaxis(truth[..., None] == np.arange(1, 5), -1, 1)  # ids 5 and 6 have no slot
    for options in ({}, {"void": void}, {"void": void, "mask": mask}):
        found = jax.jit(lambda p, t, o: map_overlaps(p, t, 4, **o))(predicted, truth, options)
        expected = mask_overlaps(np.moveaxis(predicted, -1, 1), slots, **options)
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_accuracy_and_dice_by_hand():
    metric = MatchedObjects(("cat", "dog"))
    overlaps = {
        "both": np.array([[[10, 0], [0, 5], [0, 0]], [[0, 0], [3, 0], [0, 0]]]),
        "predicted_area": np.array([[10, 9, 4], [2, 3, 0]]),
        "truth_area": np.array([[10, 20], [7, 0]]),
    }
    answers = np.array([[0, 0, 1], [2, 2, 1]])  # 2 is "no object"
    truth, query = np.array([[0, 1], [1, -1]]), np.array([[0, 1], [1, -1]])
    measured = jax.jit(metric.measure)(overlaps, answers, truth, query)
    found = metric.compute(metric.merge(metric.empty(), measured))
    losses = [1 - 21 / 21, 1 - 11 / 30, 1 - 7 / 11]
    assert found["objects"] == 3 and found["accuracy"] == pytest.approx(1 / 3)
    assert found["dice_loss"] == pytest.approx(sum(losses) / 3)
    assert [row["accuracy"] for row in found["per_class"]] == [1.0, 0.0]

    missed = metric.compute(metric.measure(overlaps, answers, truth, np.full((2, 2), -1), np.array([True, False])))
    assert missed["objects"] == 2 and missed["accuracy"] == 0
    assert missed["dice_loss"] == pytest.approx(np.mean([1 - 1 / 11, 1 - 1 / 21]))
    nothing = metric.compute(metric.empty())
    assert nothing["accuracy"] is None and nothing["dice_loss"] is None and nothing["objects"] == 0


def test_parts_merge_to_the_whole():
    metric, rng = MatchedObjects(("a",)), np.random.default_rng(0)
    states = []
    for _ in range(3):
        area = rng.integers(1, 9, (2, 4))
        overlaps = {"both": rng.integers(0, 5, (2, 3, 4)), "predicted_area": area[:, :3], "truth_area": area}
        states.append(
            metric.measure(overlaps, np.zeros((2, 3), int), np.zeros((2, 4), int), rng.integers(-1, 3, (2, 4)))
        )
    a, b, c = states
    one = metric.compute(metric.merge(metric.merge(a, b), c))
    assert one == metric.compute(metric.merge(c, metric.merge(b, a))) and one["objects"] == 24
