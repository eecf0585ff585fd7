import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_densevit.errors import UserError
from jax_densevit.metrics.confusion import ConfusionMatrix


def slow_matrix(labels, predictions, k, ignore):
    matrix = np.zeros((k, k + 1), np.int64)
    for label, prediction in zip(labels.ravel().tolist(), predictions.ravel().tolist(), strict=True):
        if label != ignore:
            matrix[label, prediction if 0 <= prediction < k else k] += 1
    return matrix


def names(k):
    return [f"class {i}" for i in range(k)]


def run(metric, *batches):
    state = metric.empty()
    for batch in batches:
        state = metric.merge(state, jax.device_get(jax.jit(metric.measure)(*batch)))
    return state


def random_maps(seed, n, k, shape=(5, 7)):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, (n, *shape)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.2] = 255
    return labels, rng.integers(-1, k + 2, (n, *shape)).astype(np.int32)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), cuts=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=4))
def test_any_batching_gives_the_numpy_answer(seed, cuts):
    """Batches are padded to one size with masked examples, as an evaluation pads them; merged in any order."""
    metric, size = ConfusionMatrix(names(3)), max(cuts)
    measure = jax.jit(metric.measure)
    labels, predictions = random_maps(seed, sum(cuts), 3)
    parts, start = [], 0
    for cut in cuts:
        rows = [start + i if i < cut else start for i in range(size)]
        parts.append(jax.device_get(measure(labels[rows], predictions[rows], np.arange(size) < cut)))
        start += cut
    expected = slow_matrix(labels, predictions, 3, 255)
    forward = metric.empty()
    for part in parts:
        forward = metric.merge(forward, part)
    nested = metric.empty()
    for part in reversed(parts):
        nested = metric.merge(part, nested)
    for state in (forward, nested):
        np.testing.assert_array_equal(state["matrix"], expected)
        assert state["matrix"].dtype == np.int64 and state["valid"] == (labels != 255).sum()


def test_scores_written_out_by_hand():
    labels = np.array([[[0, 0, 0, 1], [1, 1, 255, 255]]])
    predictions = np.array([[[0, 0, 1, 1], [1, 3, 0, 1]]])
    result = ConfusionMatrix(["a", "b", "c", "d"])
    result = result.compute(run(result, (labels, predictions)))
    # a: TP 2, FN 1, FP 0. b: TP 2, FN 1, FP 1. c: nowhere. d: never labelled, predicted once.
    assert [row["IoU"] for row in result["per_class"]] == [2 / 3, 2 / 4, None, 0.0]
    assert [row["accuracy"] for row in result["per_class"]] == [2 / 3, 2 / 3, None, None]
    assert [row["precision"] for row in result["per_class"]] == [1.0, 2 / 3, None, 0.0]
    assert [row["dice"] for row in result["per_class"]] == [4 / 5, 4 / 6, None, 0.0]
    assert [row["pixels"] for row in result["per_class"]] == [3, 3, 0, 0]
    assert result["mIoU"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert result["mean_accuracy"] == pytest.approx(2 / 3)
    assert result["pixel_accuracy"] == pytest.approx(4 / 6)
    assert result["fwIoU"] == pytest.approx(0.5 * 2 / 3 + 0.5 * 1 / 2)
    assert result["mean_dice"] == pytest.approx((4 / 5 + 4 / 6) / 3)


def test_an_id_outside_the_classes_is_a_miss_and_never_dropped():
    labels = np.array([[[0, 0, 1, 1]]])
    predictions = np.array([[[0, -1, 255, 2]]])
    metric = ConfusionMatrix(["a", "b"])
    result = metric.compute(run(metric, (labels, predictions)))
    assert [row["IoU"] for row in result["per_class"]] == [0.5, 0.0]
    assert result["predicted_outside_classes"] == 3 and result["pixels"] == 4


def test_labels_that_are_no_class_are_refused():
    metric = ConfusionMatrix(["a", "b"])
    with pytest.raises(UserError, match="2 pixels whose id is neither a class"):
        run(metric, (np.array([[[0, 7, 254, 255]]]), np.zeros((1, 1, 4), int)))


def test_lost_pixels_are_noticed():
    metric = ConfusionMatrix(["a", "b"])
    state = run(metric, (np.array([[[0, 1]]]), np.array([[[0, 1]]])))
    state["matrix"] = state["matrix"] * 0
    with pytest.raises(RuntimeError, match="0 pixels were counted where 2"):
        metric.merge(state, metric.empty())


def test_counts_beyond_32_bits_and_nothing_at_all():
    metric = ConfusionMatrix(["a", "b"])
    big = {"matrix": np.array([[2**40 + 1, 1, 0], [0, 2**33, 0]]), "unknown": np.array(0)}
    big["valid"] = big["matrix"].sum()
    merged = metric.merge(big, big)
    assert merged["matrix"][0, 0] == 2**41 + 2
    empty = metric.compute(metric.empty())
    assert empty["mIoU"] is None and empty["pixel_accuracy"] is None and empty["fwIoU"] is None
    ignored = metric.compute(run(metric, (np.full((2, 3, 3), 255), np.zeros((2, 3, 3), int))))
    assert ignored["pixels"] == 0 and ignored["mIoU"] is None


@pytest.mark.reference
def test_reference_scores_exactly(reference_data):
    golden = np.load(reference_data / "goldens/metrics/miou_golden.npz", allow_pickle=False)
    cases = sorted(
        {key.split("/")[0] for key in golden.files if key.endswith("/confusion") and key.split("/")[0] + "/iou"}
    )
    seen = 0
    for case in cases:
        if f"{case}/miou" not in golden.files or f"{case}/iou" not in golden.files:
            continue
        matrix = golden[f"{case}/confusion"]
        if f"{case}/gt" in golden.files:
            metric = ConfusionMatrix(names(len(matrix)), int(golden[f"{case}/ignore"]))
            state = run(metric, (golden[f"{case}/gt"], golden[f"{case}/pred"]))
            np.testing.assert_array_equal(state["matrix"][:, :-1], matrix, err_msg=case)
        else:
            metric = ConfusionMatrix(names(len(matrix)))
            state = {"matrix": np.pad(matrix, ((0, 0), (0, 1))), "valid": matrix.sum(), "unknown": np.array(0)}
        result = metric.compute(state)
        for ours, theirs in (("IoU", "iou"), ("accuracy", "class_acc"), ("dice", "dice"), ("precision", "precision")):
            column = [np.nan if row[ours] is None else row[ours] for row in result["per_class"]]
            np.testing.assert_array_equal(column, golden[f"{case}/{theirs}"], err_msg=f"{case} {ours}")
        for ours, theirs in (
            ("mIoU", "miou"),
            ("mean_accuracy", "macc"),
            ("pixel_accuracy", "pixel_acc"),
            ("fwIoU", "fwiou"),
            ("mean_dice", "mdice"),
        ):
            np.testing.assert_allclose(result[ours], golden[f"{case}/{theirs}"], rtol=1e-15, err_msg=f"{case} {ours}")
        seen += 1
    assert seen >= 12


@pytest.mark.reference
def test_reference_out_of_range_and_the_five_class_matrix(reference_data):
    golden = np.load(reference_data / "goldens/metrics/miou_golden.npz", allow_pickle=False)
    metric = ConfusionMatrix(["a", "b"])
    result = metric.compute(run(metric, (golden["out_of_range_pred/gt"][None], golden["out_of_range_pred/pred"][None])))
    assert [row["IoU"] for row in result["per_class"]] == golden["out_of_range_pred/iou_count_as_miss"].tolist()
    assert result["pixel_accuracy"] == golden["out_of_range_pred/pixel_acc_count_as_miss"]

    golden = np.load(reference_data / "goldens/setr/misc_resize_loss_miou_sched.npz", allow_pickle=False)
    metric = ConfusionMatrix(names(5))
    state = run(metric, (golden["miou_gt"], golden["miou_pred"]))
    np.testing.assert_array_equal(state["matrix"][:, :5], golden["miou_cm_rows_gt"])
    result = metric.compute(state)
    assert (result["mIoU"], result["pixel_accuracy"]) == (golden["miou"], golden["aacc"])
    assert result["mean_accuracy"] == golden["macc"]
