import contextlib
import io

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jax_densevit.metrics.overlaps import mask_overlaps
from jax_densevit.metrics.precision import THRESHOLDS, CityscapesPrecision, CocoPrecision

NAMES = ("a", "b", "c")
COCO_STATS = (
    "AP AP50 AP75 AP_small AP_medium AP_large AR_1 AR_10 AR_100 AR_small AR_medium AR_large".split()
)  # as COCOeval lists them


def run(metric, *batches):
    measure, state = jax.jit(metric.measure), metric.empty()
    for batch in batches:
        state = metric.merge(state, jax.device_get(measure(*batch)))
    return metric.compute(state)


def scenes(seed, images=6, slots=5, predictions=12, size=24, levels=20, crowds=0.2, largest=16):
    """Rectangles that overlap, predictions near them (some doubled, some of another class), void at random."""
    rng = np.random.default_rng(seed)

    def box(y, x, h, w):
        out = np.zeros((size, size), bool)
        out[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)] = True
        return out

    truth, found = np.zeros((images, slots, size, size), bool), np.zeros((images, predictions, size, size), bool)
    classes, labels = rng.integers(0, 3, (images, slots)), rng.integers(-1, 3, (images, predictions))
    for image in range(images):
        count = rng.integers(0, slots + 1)
        boxes = np.concatenate([rng.integers(0, size - 4, (slots, 2)), rng.integers(2, largest, (slots, 2))], 1)
        for i in range(count):
            truth[image, i] = box(*boxes[i])
        for i in range(rng.integers(0, predictions + 1)):
            near = rng.integers(0, slots)
            found[image, i] = box(*(boxes[near] + rng.integers(-2, 3, 4)))
            if rng.random() < 0.8:
                labels[image, i] = classes[image, near]
    score = (rng.integers(1, levels, (images, predictions)) / levels).astype(np.float32)
    crowd, void = rng.random((images, slots)) < crowds, rng.random((images, size, size)) < 0.1
    return found, labels, score, truth, classes, crowd, void


def pycocotools(found, labels, score, truth, classes, crowd, void=None):
    def encoded(mask):
        return rle.encode(np.asfortranarray(mask.astype(np.uint8)))

    objects, results = [], []
    for image in range(len(truth)):
        for i in np.flatnonzero(truth[image].any((1, 2))):
            one = {"image_id": image, "category_id": int(classes[image, i]), "segmentation": encoded(truth[image, i])}
            area = int(truth[image, i].sum())
            objects.append({**one, "id": len(objects) + 1, "area": area, "iscrowd": int(crowd[image, i])})
        for i in np.flatnonzero(found[image].any((1, 2)) & (labels[image] >= 0)):
            one = {"image_id": image, "category_id": int(labels[image, i]), "segmentation": encoded(found[image, i])}
            results.append({**one, "score": float(score[image, i])})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i, "height": truth.shape[2], "width": truth.shape[3]} for i in range(len(truth))],
            "annotations": objects,
            "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES)],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def halves(arrays):
    return [tuple(a[part] for a in arrays) for part in (slice(0, 3), slice(3, 6))]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), levels=st.sampled_from([3, 1000]))
def test_coco_is_pycocotools(seed, levels):
    """Twelve numbers to 1e-12, with crowds, doubles, ties and images without objects or predictions."""
    arrays = scenes(seed, levels=levels)[:6]
    if not arrays[0].any():
        return
    result = run(CocoPrecision(NAMES), *halves(arrays))
    expected = [None if value == -1 else value for value in pycocotools(*arrays)]
    for name, value in zip(COCO_STATS, expected, strict=True):
        assert (result[name] is None) == (value is None), name
        np.testing.assert_allclose(result[name] or 0, value or 0, rtol=1e-12, err_msg=name)


def test_coco_bins_of_area_and_more_than_a_hundred_predictions():
    arrays = scenes(5, images=6, slots=8, predictions=130, size=160, largest=150, levels=500)[:6]
    found, labels, _, truth, _, crowd = arrays
    truth[0, 0], crowd[0, 0] = False, False
    truth[0, 0, 20:140, 20:140] = True
    for i in range(130):  # all of one class in one image, ever further off
        found[0, i], labels[0, i] = np.roll(truth[0, 0], i // 3, axis=i % 2), 1
    stats = pycocotools(*arrays)
    assert (stats >= 0).all()
    result = run(CocoPrecision(NAMES), arrays)
    np.testing.assert_allclose([result[name] for name in COCO_STATS], stats, rtol=1e-12)


def slow_cityscapes(found, labels, score, truth, classes, crowd, void, min_area):
    """By the rules, one threshold, class, image and object after another; [class, threshold]."""
    out = np.full((3, 10), np.nan)
    for label in range(3):
        for column, threshold in enumerate(THRESHOLDS):
            entries, missed, objects = [], 0, 0
            for image in range(len(truth)):
                gts = [i for i in np.flatnonzero(classes[image] == label) if truth[image, i].any()]
                preds = [i for i in np.flatnonzero(labels[image] == label) if found[image, i].any()]

                def over(p, g, image=image, threshold=threshold):
                    both = (found[image, p] & truth[image, g]).sum()
                    return both / (found[image, p].sum() + truth[image, g].sum() - both) > threshold

                small = {g: truth[image, g].sum() < min_area for g in gts}
                for g in gts:
                    if small[g] or crowd[image, g]:
                        continue
                    objects += 1
                    scores = sorted((score[image, p] for p in preds if over(p, g)), reverse=True)
                    entries += [(value, place == 0) for place, value in enumerate(scores)]
                    missed += not scores
                for p in preds:
                    if any(over(p, g) for g in gts):
                        continue
                    lost = (found[image, p] & void[image]).sum()
                    for g in gts:
                        lost += (found[image, p] & truth[image, g]).sum() * (int(crowd[image, g]) + int(small[g]))
                    if lost / found[image, p].sum() <= threshold:
                        entries.append((score[image, p], False))
            if objects:
                points = [
                    (
                        sum(right for s, right in entries if s >= cut) / sum(s >= cut for s, _ in entries),
                        sum(right for s, right in entries if s >= cut) / objects,
                    )
                    for cut in sorted({s for s, _ in entries})
                ]
                recall = [r for _, r in points] + [0]
                recall = [recall[0], *recall, 0]
                precision = [p for p, _ in points] + [1]
                out[label, column] = sum(p * (recall[i] - recall[i + 2]) / 2 for i, p in enumerate(precision))
                assert objects == sum(right for _, right in entries) + missed
    return out


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), levels=st.sampled_from([3, 1000]), min_area=st.sampled_from([0, 30]))
def test_cityscapes_is_its_rules(seed, levels, min_area):
    arrays = scenes(seed, levels=levels)
    result = run(CityscapesPrecision(NAMES, min_area), *halves(arrays))
    expected = slow_cityscapes(*arrays, min_area)
    for row, values in zip(result["per_class"], expected, strict=True):
        assert (row["AP"] is None) == np.isnan(values).all()
        if row["AP"] is not None:
            np.testing.assert_allclose([row["AP"], row["AP50"]], [values.mean(), values[0]], rtol=1e-12)
    if np.isfinite(expected).any():
        np.testing.assert_allclose(result["AP"], np.nanmean(expected), rtol=1e-12)


BOTH = pytest.mark.parametrize("metric", [CocoPrecision(NAMES), CityscapesPrecision(NAMES, 0)])


def one_object(predictions, score, crowd=False):
    """A 10 x 10 object of class 0 in one image, and predictions given as heights of the same width."""
    truth = np.zeros((1, 1, 20, 20), bool)
    truth[0, 0, :10, :10] = True
    found = np.zeros((1, len(predictions), 20, 20), bool)
    for i, height in enumerate(predictions):
        found[0, i, :height, :10] = True
    labels, score = np.zeros((1, len(predictions)), int), np.array([score], np.float32).reshape(1, -1)
    return found, labels, score, truth, np.zeros((1, 1), int), np.array([[crowd]])


@BOTH
def test_perfect_doubled_missed_and_void_answers(metric):
    assert run(metric, one_object([10], [0.9]))["AP"] == pytest.approx(1)
    assert run(metric, one_object([10, 10], [0.5, 0.9]))["AP50"] == pytest.approx(1)  # the double ranks below
    doubled = run(metric, one_object([2, 10], [0.9, 0.5]))["AP50"]
    assert 0 < doubled < 0.8
    assert run(metric, one_object([], []))["AP"] == 0
    assert run(metric, one_object([4], [0.9]))["AP"] == 0
    masked = run(metric, (*one_object([10], [0.9]), None, np.array([False])))
    assert masked["AP"] is masked["AP50"] is None and masked["objects"] == masked["predictions"] == 0
    assert metric.compute(metric.empty())["AP"] is None


def test_equality_with_the_threshold_matches_in_coco_only():
    half = one_object([5], [0.9])
    assert run(CocoPrecision(NAMES), half)["AP50"] == pytest.approx(1)
    assert run(CityscapesPrecision(NAMES, 0), half)["AP50"] == 0
    assert run(CocoPrecision(NAMES), one_object([9], [0.9]))["AP"] == pytest.approx(0.9)
    assert run(CityscapesPrecision(NAMES, 0), one_object([9], [0.9]))["AP"] == pytest.approx(0.8)


def test_crowds_absorb_and_groups_excuse():
    """Only a crowd: its predictions are neither right nor wrong, and there is nothing to find."""
    only = one_object([10, 4], [0.9, 0.8], crowd=True)
    for metric in (CocoPrecision(NAMES), CityscapesPrecision(NAMES, 0)):
        assert run(metric, only)["AP"] is None
    # Beside an object that is found, whatever ranks above it does no harm on a crowd.
    found, labels, score, truth, classes, _ = one_object([10, 10, 4], [0.5, 0.9, 0.8])
    truth = np.concatenate([truth, truth[:, :, ::-1]], 1)
    found[0, 1:] = found[0, 1:, ::-1]
    arrays = (found, labels, score, truth, np.zeros((1, 2), int), np.array([[False, True]]))
    for metric in (CocoPrecision(NAMES), CityscapesPrecision(NAMES, 0)):
        assert run(metric, arrays)["AP"] == pytest.approx(1)


def test_only_excused_predictions_score_zero_in_cityscapes():
    """The original stops with an IndexError here."""
    found, labels, score, truth, classes, crowd = one_object([6], [0.9])
    found[:] = found[:, :, ::-1]
    void = np.broadcast_to(np.arange(20)[:, None] >= 10, (1, 20, 20))
    result = run(CityscapesPrecision(NAMES, 0), (found, labels, score, truth, classes, crowd, void))
    assert result["AP"] == 0 and result["predictions"] == 1


@BOTH
def test_states_merge_alike_in_any_grouping(metric):
    arrays = scenes(7, levels=10**6)
    measured = [jax.device_get(metric.measure(*(a[i : i + 2] for a in arrays))) for i in (0, 2, 4)]
    left = metric.merge(metric.merge(metric.merge(metric.empty(), measured[0]), measured[1]), measured[2])
    right = metric.merge(measured[0], metric.merge(measured[1], measured[2]))
    assert metric.compute(left) == metric.compute(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_overlaps_are_counted_exactly():
    rng = np.random.default_rng(0)
    predicted, truth, void = rng.random((2, 4, 9, 7)) < 0.5, rng.random((2, 3, 9, 7)) < 0.5, rng.random((2, 9, 7)) < 0.2
    found = jax.jit(mask_overlaps)(predicted, truth, void, np.array([True, False]))
    both = (predicted[0][:, None] & truth[0]).sum((2, 3))
    np.testing.assert_array_equal(found["both"][0], both)
    np.testing.assert_array_equal(found["void_area"][0], (predicted[0] & void[0]).sum((1, 2)))
    np.testing.assert_array_equal(found["predicted_area"], [predicted[0].sum((1, 2)), np.zeros(4)])
    np.testing.assert_array_equal(found["truth_area"], [truth[0].sum((1, 2)), np.zeros(3)])
    with pytest.raises(ValueError, match="16777216"):
        jax.eval_shape(mask_overlaps, *(jax.ShapeDtypeStruct((1, 1, 4096, 4096), bool),) * 2)
