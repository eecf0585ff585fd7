"""The set loss against every possible assignment, in NumPy and float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.data.source import DataInfo
from jax_densevit.models.output import QueryOutput
from jax_densevit.tasks import create_task

INFO = DataInfo("toy", ("background", "cat", "dog"), things=("cat", "dog"))
SIZE, QUERIES, CLASSES = (6, 8), 4, 2
WEIGHTS = {"class_weight": 2.0, "dice_weight": 1.5, "bce_weight": 0.7, "focal_weight": 3.0}
WEIGHTS |= {"l1_weight": 2.5, "giou_weight": 0.8}
NO_OBJECT = 0.3


def pictures(rng):
    """Three pictures with 3, 1 and no object, rectangles that do not touch."""
    labels, instances = np.zeros((3, *SIZE), np.uint8), np.zeros((3, *SIZE), np.uint16)
    for picture, count in enumerate((3, 1, 0)):
        for number in range(1, count + 1):
            rows, column = slice(rng.integers(0, 3), rng.integers(4, 7)), 3 * (number - 1)
            labels[picture, rows, column : column + 2] = rng.integers(1, 3)
            instances[picture, rows, column : column + 2] = number
    return {"labels": labels, "instances": instances}


def answers(rng):
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    boxes = jax.nn.sigmoid(normal(3, QUERIES, 4))
    return QueryOutput(normal(3, QUERIES, CLASSES + 1), 2 * normal(3, QUERIES, *SIZE), boxes, covers=SIZE)


def pair_terms(output, picture, query, label, mask):
    """Every term of one query and one object, unweighted: as losses, but the class by its probability, too."""
    x = np.asarray(output.mask_logits[picture, query], np.float64)
    p = 1 / (1 + np.exp(-x))
    right = np.where(mask, p, 1 - p)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    true = np.array([columns[0] / SIZE[1], rows[0] / SIZE[0], (columns[-1] + 1) / SIZE[1], (rows[-1] + 1) / SIZE[0]])
    cx, cy, w, h = np.asarray(output.boxes[picture, query], np.float64)
    ours = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    area = lambda low, high: np.prod(np.maximum(high - low, 0))  # noqa: E731
    common = area(np.maximum(ours[:2], true[:2]), np.minimum(ours[2:], true[2:]))
    hull = area(np.minimum(ours[:2], true[:2]), np.maximum(ours[2:], true[2:]))
    union = w * h + area(true[:2], true[2:]) - common
    centred = np.array([*(true[:2] + true[2:]) / 2, *true[2:] - true[:2]])
    return {
        "dice": 1 - (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1),
        "bce": -np.log(right).mean(),
        "focal": (np.where(mask, 0.25, 0.75) * (1 - right) ** 2 * -np.log(right)).mean(),
        "l1": np.abs(np.array([cx, cy, w, h]) - centred).sum(),
        "giou": 1 - (common / union - (hull - union) / hull),
    }


def brute_force(output, batch):
    """{term: (sum, weight)} of the assignment of least cost of each picture, which is looked for among all."""
    sums = dict.fromkeys(("class", "dice", "bce", "focal", "l1", "giou"), 0.0)
    matched, weight = 0, 0.0
    for picture in range(3):
        p = np.exp(np.asarray(output.class_logits[picture], np.float64))
        p /= p.sum(-1, keepdims=True)
        objects = []
        for number in range(1, int(batch["instances"][picture].max()) + 1):
            mask = batch["instances"][picture] == number
            objects.append((int(batch["labels"][picture][mask][0]) - 1, mask))
        pairs = {(q, t): pair_terms(output, picture, q, *one) for q in range(QUERIES) for t, one in enumerate(objects)}
        costs = {
            (q, t): sum(WEIGHTS[f"{name}_weight"] * value for name, value in terms.items())
            - WEIGHTS["class_weight"] * p[q, objects[t][0]]
            for (q, t), terms in pairs.items()
        }
        every = itertools.permutations(range(QUERIES), len(objects))
        best = min(every, key=lambda queries: sum(costs[q, t] for t, q in enumerate(queries)))
        for t, query in enumerate(best):
            for name, value in pairs[query, t].items():
                sums[name] += value
        matched += len(objects)
        for query in range(QUERIES):
            label = objects[best.index(query)][0] if query in best else CLASSES
            share = NO_OBJECT if label == CLASSES else 1.0
            sums["class"] -= share * np.log(p[query, label])
            weight += share
    return {name: (total, weight if name == "class" else matched) for name, total in sums.items()}


@pytest.mark.parametrize("method", ["augmenting_path", "scipy"])
def test_the_loss_is_that_of_the_best_of_all_assignments(method):
    options = {**WEIGHTS, "no_object": NO_OBJECT, "slots": 5, "matching": method, "auxiliary_weight": 0.5}
    task = create_task("instances", INFO, **options)
    loss = jax.jit(task.loss)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        batch, output, early = pictures(rng), answers(rng), answers(rng)
        terms = loss(output.replace(auxiliary=(early,)), {name: jnp.asarray(value) for name, value in batch.items()})
        expected, before = brute_force(output, batch), brute_force(early, batch)
        total = truth = 0.0
        for name, (value, weight) in expected.items():
            for term, wanted, factor in (
                (terms[name], value, 1.0),
                (terms[f"auxiliary_{name}"], before[name][0], 0.5),  # matched by itself
            ):
                np.testing.assert_allclose(term.sum, wanted, rtol=1e-5)
                np.testing.assert_allclose(term.weight, weight, rtol=1e-6)
                total += term.coefficient * term.sum / term.weight
                truth += factor * WEIGHTS[f"{name}_weight"] * wanted / weight
        np.testing.assert_allclose(total, truth, rtol=1e-5)
        assert terms["unmatched"].sum == 0 and set(terms) == {
            "unmatched", *expected, *(f"auxiliary_{name}" for name in expected)
        }  # fmt: skip
