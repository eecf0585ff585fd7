import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_densevit.metrics.panoptic import PanopticQuality

NAMES = ("thing", "other thing", "stuff")


def metric():
    return PanopticQuality(NAMES, (True, True, False))


def run(metric, *batches):
    state = metric.empty()
    for batch in batches:
        state = metric.merge(state, jax.device_get(jax.jit(metric.measure)(*batch)))
    return metric.compute(state)


def counts(result):
    return [(row["TP"], row["FP"], row["FN"]) for row in result["per_class"]]


def line(*runs):
    """A picture of one row, `(id, length)` after `(id, length)`, as a batch of one."""
    return np.repeat([i for i, _ in runs], [n for _, n in runs])[None, None].astype(np.int32)


def table(*values):
    return np.array([values], np.int32)


def flags(*values):
    return np.array([values], bool)


def slow(truth, truth_class, crowd, predicted, predicted_class, k):
    """By the rules, segment by segment: [[IoU, TP, FP, FN]] per class."""
    found = np.zeros((k, 4))
    for image in range(len(truth)):
        gt, pred = truth[image], predicted[image]
        taken_g, taken_p = set(), set()
        for g in range(1, truth_class.shape[1] + 1):
            for p in range(1, predicted_class.shape[1] + 1):
                both = ((gt == g) & (pred == p)).sum()
                if truth_class[image, g - 1] != predicted_class[image, p - 1] or crowd[image, g - 1] or not both:
                    continue
                iou = both / ((gt == g).sum() + (pred == p).sum() - both - ((gt == 0) & (pred == p)).sum())
                if iou > 0.5:
                    found[truth_class[image, g - 1]] += [iou, 1, 0, 0]
                    taken_g.add(g)
                    taken_p.add(p)
        for g in range(1, truth_class.shape[1] + 1):
            if (gt == g).any() and g not in taken_g and not crowd[image, g - 1]:
                found[truth_class[image, g - 1], 3] += 1
        for p in range(1, predicted_class.shape[1] + 1):
            if (pred == p).any() and p not in taken_p:
                own = predicted_class[image, p - 1]
                crowds = [g for g in range(1, crowd.shape[1] + 1) if crowd[image, g - 1]]
                excused = [0] + [g for g in crowds if truth_class[image, g - 1] == own]
                if np.isin(gt[pred == p], excused).mean() <= 0.5:
                    found[own, 2] += 1
    return found


def scenes(seed, images, slots=4, size=12):
    """Rectangles over void, and the same moved a little; classes and crowds at random."""
    rng = np.random.default_rng(seed)
    maps = np.zeros((2, images, size, size), np.int32)
    for image in range(images):
        for slot in range(rng.integers(0, slots + 1)):
            y, x = rng.integers(0, size - 3, 2)
            h, w = rng.integers(2, 8, 2)
            dy, dx = rng.integers(-1, 2, 2)
            maps[0, image, y : y + h, x : x + w] = slot + 1
            maps[1, image, max(y + dy, 0) : y + h, max(x + dx, 0) : x + w] = slot + 1
    classes = rng.integers(0, 3, (images, slots))
    crowd = (rng.random((images, slots)) < 0.3) & (classes < 2)
    changed = np.where(rng.random(classes.shape) < 0.2, rng.integers(0, 3, classes.shape), classes)
    return maps[0], classes.astype(np.int32), crowd, maps[1], changed.astype(np.int32)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_batching_gives_the_slow_answer(seed):
    arrays = scenes(seed, 6)
    parts = [tuple(a[i : i + 2] for a in arrays) for i in (0, 2, 4)]
    results = [run(metric(), *(p + (np.array([True, True]),) for p in order)) for order in (parts, parts[::-1])]
    assert results[0] == results[1]
    expected = slow(*arrays, 3)
    np.testing.assert_array_equal(counts(results[0]), expected[:, 1:])
    np.testing.assert_allclose([row["IoU_sum"] for row in results[0]["per_class"]], expected[:, 0], rtol=1e-14)


def test_a_perfect_answer():
    truth, classes, crowd, _, _ = scenes(0, 8)
    crowd = np.zeros_like(crowd)
    result = run(metric(), (truth, classes, crowd, truth, classes))
    assert result["PQ"] == result["SQ"] == result["RQ"] == result["things"]["PQ"] == result["stuff"]["PQ"] == 1
    assert result["classes"] == 3 and result["stuff"]["classes"] == 1


def test_an_answer_of_void_misses_everything():
    truth, classes, crowd, _, _ = scenes(0, 8)
    result = run(metric(), (truth, classes, crowd, np.zeros_like(truth), classes))
    assert result["PQ"] == 0 and all(tp == fp == 0 for tp, fp, _ in counts(result))


def test_nothing_at_all_is_undefined():
    empty = np.zeros((2, 3, 3), np.int32)
    slots = np.zeros((2, 2), np.int32)
    result = run(metric(), (empty, slots, slots > 0, empty, slots))
    assert result["PQ"] is result["things"]["SQ"] is result["stuff"]["RQ"] is None and result["classes"] == 0
    no_slots = np.zeros((2, 0), np.int32)
    assert run(metric(), (empty, no_slots, no_slots > 0, empty, no_slots))["PQ"] is None


def test_an_iou_of_exactly_one_half_is_no_match():
    result = run(metric(), (line((1, 4), (2, 4)), table(0, 2), flags(0, 0), line((1, 2), (2, 6)), table(0, 2)))
    assert counts(result) == [(0, 1, 1), (0, 0, 0), (1, 0, 0)]


def test_void_leaves_the_union_and_excuses_more_than_half():
    truth = line((1, 4), (0, 6), (2, 2))
    over = run(metric(), (truth, table(0, 2), flags(0, 0), line((1, 9), (0, 1), (2, 2)), table(0, 2)))
    assert counts(over)[0] == (1, 0, 0) and over["per_class"][0]["PQ"] == 1
    half = run(metric(), (truth, table(0, 2), flags(0, 0), line((0, 2), (1, 4), (0, 4), (2, 2)), table(1, 2)))
    assert counts(half)[1] == (0, 1, 0)
    more = run(metric(), (truth, table(0, 2), flags(0, 0), line((0, 2), (1, 5), (0, 3), (2, 2)), table(1, 2)))
    assert counts(more)[1] == (0, 0, 0)


def test_all_crowds_of_the_class_excuse_and_are_never_missed():
    truth = line((1, 4), (2, 4), (3, 4))
    predicted = line((1, 4), (2, 4), (3, 4))
    same = run(metric(), (truth, table(0, 0, 1), flags(1, 1, 1), predicted, table(0, 0, 0)))
    assert counts(same) == [(0, 1, 0), (0, 0, 0), (0, 0, 0)]  # the third lies on a crowd of another class
    masked = run(metric(), (truth, table(0, 0, 1), flags(1, 1, 1), predicted, table(0, 0, 0), np.array([False])))
    assert counts(masked) == [(0, 0, 0)] * 3


def number_segments(ids, known):
    """s + 1 where `ids` is `known[s]`, 0 elsewhere."""
    numbers = np.zeros(ids.shape, np.int32)
    for slot, one in enumerate(known):
        numbers[ids == one] = slot + 1
    return numbers


def golden_batch(ids, segments, columns):
    """Slots of the segments whose id is there; unused slots of the golden hold zeros."""
    numbered = np.stack([number_segments(i, table[:, 0]) for i, table in zip(ids, segments, strict=True)])
    numbered[ids == 0] = 0
    return numbered, *(segments[..., c] for c in columns)


@pytest.mark.reference
def test_reference_panoptic_quality(reference_data):
    golden = np.load(reference_data / "goldens/instance/pq_panopticapi.npz", allow_pickle=False)
    categories = golden["category_ids"].tolist()
    quality = PanopticQuality([str(i) for i in categories], golden["category_isthing"])
    truth, truth_class, crowd = golden_batch(golden["gt_ids"], golden["gt_segments_id_cat_crowd"], (1, 2))
    predicted, predicted_class = golden_batch(golden["pred_ids"], golden["pred_segments_id_cat"], (1,))
    arrays = (truth, truth_class - 1, crowd > 0, predicted, predicted_class - 1)
    for image in range(len(truth)):
        rows = run(quality, tuple(a[image : image + 1] for a in arrays))["per_class"]
        ours = [[row["IoU_sum"], row["TP"], row["FP"], row["FN"]] for row in rows]
        np.testing.assert_allclose(ours, golden["per_image_per_cat_iou_tp_fp_fn"][image], rtol=1e-15, err_msg=image)
    result = run(quality, arrays)
    ours = [[row["IoU_sum"], row["TP"], row["FP"], row["FN"]] for row in result["per_class"]]
    np.testing.assert_allclose(ours, golden["per_cat_iou_tp_fp_fn"], rtol=1e-14)
    ours = [[row[key] or 0 for key in ("PQ", "SQ", "RQ")] for row in result["per_class"]]
    np.testing.assert_allclose(ours, golden["per_cat_pq_sq_rq"], rtol=1e-14)
    for name, group in (("all", result), ("things", result["things"]), ("stuff", result["stuff"])):
        ours = [group[key] for key in ("PQ", "SQ", "RQ", "classes")]
        np.testing.assert_allclose(ours, golden[f"{name}_pq_sq_rq_n"], rtol=1e-14)


@pytest.mark.reference
def test_reference_two_crowds(reference_data):
    """panopticapi remembers one crowd of a class and counts the prediction on the other as wrong; we remember both."""
    golden = np.load(reference_data / "goldens/instance/pq_panopticapi.npz", allow_pickle=False)
    gt, pred = golden["twocrowd_gt_segments_id_cat_crowd"][None], golden["twocrowd_pred_segments_id_cat"][None]
    truth, truth_class, crowd = golden_batch(golden["twocrowd_gt_ids"][None], gt, (1, 2))
    predicted, predicted_class = golden_batch(golden["twocrowd_pred_ids"][None], pred, (1,))
    quality = PanopticQuality([str(i) for i in range(6)], golden["category_isthing"])
    result = run(quality, (truth, truth_class - 1, crowd > 0, predicted, predicted_class - 1))
    expected = golden["twocrowd_per_cat_iou_tp_fp_fn"][:, 1:]
    assert expected[0, 1] == 1
    expected[0, 1] = 0
    np.testing.assert_array_equal(counts(result), expected)
