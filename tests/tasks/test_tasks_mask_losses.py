import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates
from scipy.special import expit, log_softmax, softmax

from jax_densevit.tasks import mask_losses, pair_costs, points
from jax_densevit.tasks.matching import Assignment, match


def assignment(query, finite=True):
    query = jnp.asarray(query, jnp.int32)
    return Assignment(query, jnp.broadcast_to(jnp.asarray(finite), query.shape[:1]))


def draw(seed, batch=2, queries=5, targets=3, pixels=24):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (batch, queries, pixels)).astype(np.float32)
    return logits, (rng.random((batch, targets, pixels)) < 0.4).astype(np.float32)


def dice(x, t, squared):
    p = expit(x.astype(np.float64))
    sizes = (p**2).sum() + (t**2).sum() if squared else p.sum() + t.sum()
    return 1 - (2 * (p * t).sum() + 1) / (sizes + 1)


def cross_entropy(x, t):
    p = expit(x.astype(np.float64))
    return -(t * np.log(p) + (1 - t) * np.log(1 - p)).mean()


def focal(x, t):
    p = expit(x.astype(np.float64))
    right, alpha = p * t + (1 - p) * (1 - t), 0.25 * t + 0.75 * (1 - t)
    return (-alpha * (1 - right) ** 2 * np.log(right)).mean()


def giou(a, b):
    """Of two boxes, by hand."""
    (ax0, ax1), (bx0, bx1) = [(c[0] - c[2] / 2, c[0] + c[2] / 2) for c in (a, b)]
    (ay0, ay1), (by0, by1) = [(c[1] - c[3] / 2, c[1] + c[3] / 2) for c in (a, b)]
    common = max(min(ax1, bx1) - max(ax0, bx0), 0) * max(min(ay1, by1) - max(ay0, by0), 0)
    union = a[2] * a[3] + b[2] * b[3] - common
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return common / union - (hull - union) / hull


MASKS = {
    "dice": (pair_costs.dice_cost, mask_losses.dice_loss, lambda x, t: dice(x, t, False)),
    "squared dice": (
        lambda x, t: pair_costs.dice_cost(x, t, squared=True),
        lambda *a: mask_losses.dice_loss(*a, squared=True),
        lambda x, t: dice(x, t, True),
    ),
    "bce": (pair_costs.bce_cost, mask_losses.mask_bce_loss, cross_entropy),
    "focal": (pair_costs.focal_cost, mask_losses.focal_loss, focal),
}


@pytest.mark.parametrize("name", MASKS)
def test_costs_and_losses_of_masks_are_their_definitions_pair_by_pair(name):
    cost, loss, definition = MASKS[name]
    logits, targets = draw(0)
    pairs = np.array([[[definition(x, t) for t in targets[b]] for x in logits[b]] for b in range(2)])
    np.testing.assert_allclose(cost(logits, targets), pairs, rtol=1e-5, atol=1e-5)
    found = assignment([[4, 0, -1], [-1, 3, 1]])
    term = loss(mask_losses.matched(jnp.asarray(logits), found), targets, found)
    expected = pairs[0, 4, 0] + pairs[0, 0, 1] + pairs[1, 3, 1] + pairs[1, 1, 2]
    np.testing.assert_allclose(term.sum, expected, rtol=1e-5)
    assert term.weight == 4


def test_costs_in_half_precision_do_not_overflow():
    """Whole masks of a large picture: the sum over pixels would not fit float16."""
    logits, targets = np.full((1, 1, 70000), 8, np.float16), np.ones((1, 2, 70000), np.float16)
    targets[0, 1] = 0
    for name in MASKS:
        exact = [MASKS[name][2](logits[0, 0], targets[0, i].astype(np.float64)) for i in range(2)]
        cost = MASKS[name][0](jnp.asarray(logits), jnp.asarray(targets))[0, 0]
        np.testing.assert_allclose(cost, exact, rtol=1e-3, atol=1e-4 if "dice" in name else 0)


@pytest.mark.parametrize("name", MASKS)
def test_hard_masks(name):
    """The same mask costs nothing, empty against empty included; confident logits stay finite with their gradients."""
    loss = MASKS[name][1]
    masks = np.zeros((1, 3, 16), np.float32)
    masks[0, 0], masks[0, 1, 5:9] = 1, 1
    logits, found = jnp.asarray(200 * masks - 100), assignment([[0, 1, 2]])
    assert abs(loss(logits, masks, found).sum) < 1e-6
    gradient = jax.grad(lambda x: loss(x, 1 - masks, found).sum)(logits)
    assert np.isfinite(gradient).all() and loss(logits, 1 - masks, found).sum > 0.7


def test_class_cost_and_loss():
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(0, 2, (2, 4, 6)).astype(np.float32), np.array([[0, 4, 255], [3, -1, -1]])
    p = softmax(logits.astype(np.float64), -1)
    cost = np.asarray(pair_costs.class_cost(logits, labels))
    np.testing.assert_allclose(cost[0, :, :2], -p[0][:, [0, 4]], rtol=1e-5)
    np.testing.assert_allclose(cost[1, :, 0], -p[1][:, 3], rtol=1e-5)
    assert np.isfinite(cost).all()

    answers = np.array([[5, 0, 5, 4], [5, 5, 3, 5]])  # by query
    weights = np.array([1, 1, 1, 1, 1, 0.1])
    term = mask_losses.class_loss(logits, labels, assignment([[1, 3, -1], [2, -1, -1]]))
    each = -np.take_along_axis(log_softmax(logits.astype(np.float64), -1), answers[..., None], -1)[..., 0]
    np.testing.assert_allclose(term.sum, (weights[answers] * each).sum(), rtol=1e-5)
    np.testing.assert_allclose(term.weight, weights[answers].sum(), rtol=1e-6)
    assert np.isnan(mask_losses.class_loss(logits, labels, assignment([[1, 3, 0], [2, -1, -1]])).sum)


def test_box_costs_and_losses():
    rng = np.random.default_rng(2)
    boxes = rng.uniform(0.1, 0.9, (2, 5, 4)).astype(np.float32)
    targets = rng.uniform(0.1, 0.9, (2, 3, 4)).astype(np.float32)
    l1 = np.abs(boxes[:, :, None].astype(np.float64) - targets[:, None]).sum(-1)
    overlap = np.array([[[giou(a, b) for b in targets[i]] for a in boxes[i]] for i in range(2)])
    np.testing.assert_allclose(pair_costs.box_l1_cost(boxes, targets), l1, rtol=1e-5)
    np.testing.assert_allclose(pair_costs.box_giou_cost(boxes, targets), -overlap, rtol=1e-4, atol=1e-5)
    found = assignment([[4, -1, 1], [0, -1, -1]])
    chosen = mask_losses.matched(jnp.asarray(boxes), found)
    pairs = ([0, 0, 1], [4, 1, 0], [0, 2, 0])
    np.testing.assert_allclose(mask_losses.box_l1_loss(chosen, targets, found).sum, l1[pairs].sum(), rtol=1e-5)
    term = mask_losses.box_giou_loss(chosen, targets, found)
    np.testing.assert_allclose(term.sum, 3 - overlap[pairs].sum(), rtol=1e-5)
    assert term.weight == 3
    empty = jnp.zeros((1, 1, 4))
    value, gradient = jax.value_and_grad(lambda b: mask_losses.box_giou_loss(b, empty, assignment([[0]])).sum)(empty)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@jax.jit
def losses(logits, classes, masks, labels, count):
    costs = pair_costs.dice_cost(logits, masks) + pair_costs.class_cost(classes, labels)
    found = match(costs, count)
    chosen = mask_losses.matched(logits, found)
    return {
        "dice": mask_losses.dice_loss(chosen, masks, found),
        "bce": mask_losses.mask_bce_loss(chosen, masks, found),
        "class": mask_losses.class_loss(classes, labels, found),
    }


@jax.jit
def total(*arguments):
    terms = losses(*arguments).values()
    return sum(jnp.where(term.weight > 0, term.sum / jnp.maximum(term.weight, 1e-9), 0) for term in terms)


def test_the_order_of_objects_and_their_padding_change_nothing():
    rng = np.random.default_rng(5)
    logits, masks = draw(5)
    classes, labels = rng.normal(size=(2, 5, 4)).astype(np.float32), rng.integers(0, 3, (2, 3))
    plain = total(logits, classes, masks, labels, np.array([3, 3]))
    order = [2, 0, 1]
    np.testing.assert_allclose(total(logits, classes, masks[:, order], labels[:, order], np.array([3, 3])), plain, 1e-6)
    wide, ids = np.pad(masks, ((0, 0), (0, 4), (0, 0))), np.pad(labels, ((0, 0), (0, 4)), constant_values=-1)
    np.testing.assert_allclose(total(logits, classes, wide, ids, np.array([3, 3])), plain, 1e-6)


def test_unmatched_masks_get_no_gradient_and_empty_batches_are_finite():
    rng = np.random.default_rng(6)
    logits, masks = draw(6)
    classes, labels = rng.normal(size=(2, 5, 4)).astype(np.float32), rng.integers(0, 3, (2, 3))
    gradient = jax.jit(jax.grad(total, (0, 1)))
    for count in ([2, 1], [3, 0], [0, 0]):
        to_masks, to_classes = gradient(logits, classes, masks, labels, np.array(count))
        np.testing.assert_array_equal((np.abs(to_masks).max(-1) > 0).sum(1), count)
        assert np.isfinite(to_masks).all() and (np.abs(to_classes) > 0).any(-1).all()
    terms = losses(logits, classes, masks, labels, np.array([0, 0]))
    assert terms["dice"].weight == terms["dice"].sum == 0
    nothing = -log_softmax(classes.astype(np.float64), -1)[..., 3].mean()
    np.testing.assert_allclose(terms["class"].sum / terms["class"].weight, nothing, rtol=1e-5)
    no_slots = losses(logits, classes, masks[:, :0], labels[:, :0], np.array([0, 0]))
    np.testing.assert_allclose(no_slots["class"].sum, terms["class"].sum, rtol=1e-6)


def test_more_objects_than_queries():
    rng = np.random.default_rng(7)
    logits, masks = draw(7, queries=2, targets=4)
    classes, labels = rng.normal(size=(2, 2, 4)).astype(np.float32), rng.integers(0, 3, (2, 4))
    terms = losses(logits, classes, masks, labels, np.array([4, 1]))
    assert terms["dice"].weight == 3
    np.testing.assert_allclose(terms["class"].weight, 3.1)
    assert all(np.isfinite(term.sum) for term in terms.values())


def test_costs_that_are_no_numbers_make_every_loss_nan():
    """A query with NaN masks is never matched: its image's losses must say so, not its absence."""
    rng = np.random.default_rng(8)
    logits, masks = draw(8)
    logits[1, 2, 0] = np.nan
    classes, labels = rng.normal(size=(2, 5, 4)).astype(np.float32), rng.integers(0, 3, (2, 3))
    terms = losses(logits, classes, masks, labels, np.array([3, 2]))
    assert all(np.isnan(term.sum) for term in terms.values())
    found = assignment([[1, 0]], finite=False)
    for loss in (mask_losses.box_l1_loss, mask_losses.box_giou_loss):
        assert np.isnan(loss(jnp.full((1, 2, 4), 0.5), jnp.full((1, 2, 4), 0.5), found).sum)
    fine = losses(logits, classes, masks, labels, np.array([3, 0]))  # no object there: nothing to match
    assert all(np.isfinite(term.sum) for term in fine.values())


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_sampled_points_fade_to_zero_outside(seed):
    rng = np.random.default_rng(seed)
    maps = rng.normal(size=(2, 3, 6, 9)).astype(np.float32)
    place = rng.uniform(-0.1, 1.1, (2, 3, 11, 2)).astype(np.float32)
    expected = np.array(
        [
            [
                map_coordinates(m, [p[:, 1] * 6 - 0.5, p[:, 0] * 9 - 0.5], order=1, mode="grid-constant")
                for m, p in zip(*pair, strict=True)
            ]
            for pair in zip(maps, place, strict=True)
        ]
    )
    np.testing.assert_allclose(points.sample(maps, place), expected, atol=1e-5)
    shared = points.sample(maps, place[:, :1])
    np.testing.assert_allclose(shared[:, 2], points.sample(maps[:, 2], place[:, 0]), atol=1e-6)


def test_points_are_taken_where_masks_are_undecided():
    """A soft edge at x = 0.5: three quarters of the points lie near it, the rest anywhere."""
    ramp = np.linspace(-8, 8, 32, dtype=np.float32)
    logits = jnp.broadcast_to(ramp, (2, 3, 16, 32))
    place = np.asarray(points.uncertain_points(jax.random.key(0), logits, 200))
    assert place.shape == (2, 3, 200, 2) and (place >= 0).all() and (place < 1).all()
    near = np.abs(place[..., 0] - 0.5)
    assert (near[..., :150].max(-1) < 0.27).all() and near[..., 150:].max() > 0.45
    assert not np.array_equal(place[0, 0], place[0, 1])
    uniform = points.uncertain_points(jax.random.key(0), logits, 200, importance=0.0, oversample=1.0)
    assert uniform.shape == (2, 3, 200, 2)


def test_losses_at_the_centres_of_pixels_are_those_of_pixels():
    logits, masks = draw(9, batch=1, queries=3, pixels=20)
    y, x = np.mgrid[:4, :5]
    centres = np.stack([(x + 0.5) / 5, (y + 0.5) / 4], -1).reshape(1, 1, 20, 2)
    found = assignment([[0, 1, 2]])
    at_points = [points.sample(values.reshape(1, 3, 4, 5), centres) for values in (logits, masks)]
    for name in MASKS:
        loss = MASKS[name][1]
        np.testing.assert_allclose(loss(*at_points, found).sum, loss(logits, masks, found).sum, rtol=1e-5)


@pytest.mark.reference
def test_reference_losses(reference_data):
    golden = np.load(reference_data / "goldens/instance/hf_detr_seg_loss.npz", allow_pickle=False)
    classes, labels, count = golden["class_logits"], golden["target_labels"], golden["n_targets"]
    boxes, true_boxes = golden["pred_boxes"], golden["target_boxes"]
    weights = golden["cost_weights_class_l1_giou"]
    costs = (
        weights[0] * pair_costs.class_cost(classes, labels)
        + weights[1] * pair_costs.box_l1_cost(boxes, true_boxes)
        + weights[2] * pair_costs.box_giou_cost(boxes, true_boxes)
    )
    found = jax.jit(match)(costs, count)
    np.testing.assert_array_equal(found.query, golden["query_of_target"])
    masks = golden["target_masks"].reshape(3, 5, -1)
    logits = mask_losses.matched(golden["mask_logits"], found).reshape(3, 5, -1)
    near = mask_losses.matched(boxes, found)
    terms = {
        "loss_ce": mask_losses.class_loss(classes, labels, found, no_object=float(golden["eos_coef"])),
        "loss_bbox": mask_losses.box_l1_loss(near, true_boxes, found),
        "loss_giou": mask_losses.box_giou_loss(near, true_boxes, found),
        "loss_mask": mask_losses.focal_loss(logits, masks, found),
        "loss_dice": mask_losses.dice_loss(logits, masks, found),
    }
    for name, term in terms.items():
        np.testing.assert_allclose(term.sum / term.weight, golden[name], rtol=1e-5, err_msg=name)
