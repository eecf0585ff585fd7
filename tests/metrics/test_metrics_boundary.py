import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_densevit.metrics.boundary import BoundaryIoU, boundary_width


def slow_boundary(mask):
    """Mask minus its d-fold 3x3 erosion over a frame of zeros, pixel by pixel."""
    d = max(1, int(round(0.02 * np.hypot(*mask.shape))))
    eroded = np.pad(mask, 1).astype(bool)
    for _ in range(d):
        before = np.pad(eroded, 1, constant_values=True)  # only the frame of zeros eats into the mask
        eroded = np.ones_like(eroded)
        for dy in range(3):
            for dx in range(3):
                eroded &= before[dy : dy + eroded.shape[0], dx : dx + eroded.shape[1]]
    return mask & ~eroded[1:-1, 1:-1]


def slow_counts(labels, predictions, k, ignore):
    both, union = np.zeros(k, np.int64), np.zeros(k, np.int64)
    for label, prediction in zip(labels, predictions, strict=True):
        scored = label != ignore
        for c in range(k):
            a = slow_boundary((label == c) & scored)
            b = slow_boundary((prediction == c) & scored)
            both[c] += (a & b).sum()
            union[c] += (a | b).sum()
    return both, union


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([(1, 5), (60, 70)]))
def test_counts_of_blobs_against_erosion(seed, size):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 3, (2, 2, size[0] // 6 + 1, size[1] // 6 + 1))
    labels, predictions = coarse.repeat(6, 2).repeat(6, 3)[:, :, : size[0], : size[1]]
    labels, predictions = labels.copy(), predictions.copy()
    labels[:, : size[0] // 4, : size[1] // 2] = 255
    predictions[:, -1:, -1:] = 9
    metric = BoundaryIoU(["a", "b", "c"])
    measure = jax.jit(metric.measure)
    state = metric.merge(metric.empty(), jax.device_get(measure(labels, predictions)))
    both, union = slow_counts(labels, predictions, 3, 255)
    np.testing.assert_array_equal(state["both"], both)
    np.testing.assert_array_equal(state["truth"] + state["predicted"] - state["both"], union)
    room = ((0, 0), (0, 3), (0, 20))  # the same in the corner of a larger array
    wide = [np.pad(labels, room, constant_values=255), np.pad(predictions, room, constant_values=1)]
    wide = jax.device_get(jax.jit(metric.measure)(*wide, None, size))
    assert all((wide[key] == state[key]).all() for key in state)
    one = jax.device_get(measure(labels, predictions, np.array([True, False])))
    np.testing.assert_array_equal(one["both"], slow_counts(labels[:1], predictions[:1], 3, 255)[0])


def test_perfect_is_one_and_absent_is_none():
    labels = np.zeros((1, 20, 20), np.uint8)
    labels[:, 5:12, 5:12], labels[:, :3] = 1, 255
    metric = BoundaryIoU(["a", "b", "c"])
    result = metric.compute(metric.merge(metric.empty(), jax.device_get(jax.jit(metric.measure)(labels, labels))))
    assert [row["boundary_IoU"] for row in result["per_class"]] == [1.0, 1.0, None]
    assert result["mean_boundary_IoU"] == 1.0


def test_boundary_width_is_python_s_rounding():
    rng = np.random.default_rng(0)
    sizes = [(1024, 2048), (4, 4), (45, 60), (75, 100), (15, 20), *rng.integers(1, 2049, (200, 2)).tolist()]
    widths = jax.jit(jax.vmap(lambda size: boundary_width(size[0], size[1], (2048, 2048))))(np.array(sizes))
    assert widths.tolist() == [max(1, round(0.02 * np.hypot(*size))) for size in sizes]
    assert boundary_width(1024, 2048, (1024, 2048)) == 46


@pytest.mark.reference
def test_reference_boundaries(reference_data):
    golden = np.load(reference_data / "goldens/metrics/miou_golden.npz", allow_pickle=False)
    metric = BoundaryIoU(["background", "mask"])
    for gt, prediction, iou in zip(
        *(np.unpackbits(golden[f"boundary/{key}"], axis=-1) for key in ("gt", "pred")),
        golden["boundary/iou"],
        strict=True,
    ):
        state = metric.merge(metric.empty(), jax.device_get(jax.jit(metric.measure)(gt[None], prediction[None])))
        assert metric.compute(state)["per_class"][1]["boundary_IoU"] == iou
