import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jax_densevit.layers.resize import resize_bilinear
from jax_densevit.tasks.losses import segmentation_loss
from jax_densevit.tasks.rooms import samples
from jax_densevit.tasks.rows import automatic_rows, map_over_pixels


def draw(seed, batch, source, classes, size, ignored=0.3):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (batch, *source, classes)).astype(np.float32)
    labels = rng.integers(0, classes, (batch, *size)).astype(np.uint8)
    labels[rng.random(labels.shape) < ignored] = 255
    return logits, labels


def direct(logits, labels, covers, loss, denominator, weights):
    """Resize to full size, then the loss from its definition; the same numbers by the memory-hungry way."""
    full = resize_bilinear(logits, covers)[:, : labels.shape[1], : labels.shape[2]]
    k = logits.shape[-1]
    valid = labels != 255
    ids = jnp.where(valid, labels, 0)
    weights = jnp.asarray(weights) if len(weights) else jnp.ones(k)
    if loss == "cross_entropy":
        pixel = -jnp.take_along_axis(jax.nn.log_softmax(full), ids[..., None], -1)[..., 0] * weights[ids]
        total = weights[ids]
    else:
        target = jax.nn.one_hot(ids, k)
        pixel = -(target * jax.nn.log_sigmoid(full) + (1 - target) * jax.nn.log_sigmoid(-full))
        pixel = (pixel * weights).mean(-1)
        total = jnp.ones(ids.shape)
    total = jnp.where(valid, total, 0).sum() if denominator == "valid" else labels.size
    return jnp.where(valid, pixel, 0).sum() / total


@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from(
        [
            ((4, 4), (16, 16), (16, 16)),
            ((3, 5), (12, 20), (11, 17)),
            ((5, 7), (13, 17), (13, 17)),
            ((9, 8), (6, 8), (5, 7)),
        ]
    ),
    rows=st.sampled_from([0, 1, 3, 5, 100]),
    loss=st.sampled_from(["cross_entropy", "bce"]),
    denominator=st.sampled_from(["all", "valid"]),
    weights=st.sampled_from([(), (0.5, 2.0, 0.0, 1.5)]),
)
def test_row_blocks_equal_resize_then_loss(seed, shape, rows, loss, denominator, weights):
    source, covers, size = shape
    logits, labels = draw(seed, 2, source, 4, size)

    def fused(logits):
        term = segmentation_loss(
            logits, labels, covers, loss=loss, denominator=denominator, class_weights=weights, rows=rows
        )
        return term.sum / term.weight

    value, slope = jax.jit(jax.value_and_grad(fused))(logits)
    expected, expected_slope = jax.jit(
        jax.value_and_grad(lambda logits: direct(logits, labels, covers, loss, denominator, weights))
    )(logits)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(slope, expected_slope, atol=1e-6 * float(jnp.abs(expected_slope).max()) + 1e-9)
    assert fused(logits) == pytest.approx(float(value), rel=1e-6)  # without a gradient: the other path


def test_nothing_to_learn_from_is_zero_and_a_wrong_label_is_loud():
    logits, labels = draw(0, 2, (4, 4), 3, (8, 8))
    for loss in ("cross_entropy", "bce"):

        def total(logits, labels, loss=loss):
            return segmentation_loss(logits, labels, (8, 8), loss=loss, denominator="valid").sum

        value, slope = jax.value_and_grad(total)(logits, jnp.full_like(labels, 255))
        assert value == 0 and not slope.any()
        assert segmentation_loss(logits, jnp.full_like(labels, 255), (8, 8), loss=loss, denominator="valid").weight == 0
        labels[0, 0, 0] = 3
        assert np.isnan(total(logits, labels))
        labels[0, 0, 0] = 255
    with pytest.raises(ValueError, match="2 class weights for 3 classes"):
        segmentation_loss(logits, labels, (8, 8), class_weights=(1, 2))


def test_parts_of_a_batch_add_up_to_the_whole():
    logits, labels = draw(1, 4, (4, 6), 3, (8, 12))
    labels[0] = 255
    whole = segmentation_loss(logits, labels, (8, 12), denominator="valid")
    parts = [segmentation_loss(logits[i : i + 1], labels[i : i + 1], (8, 12), denominator="valid") for i in range(4)]
    assert float(whole.sum) == pytest.approx(sum(float(p.sum) for p in parts), rel=1e-6)
    assert float(whole.weight) == sum(float(p.weight) for p in parts) == (labels != 255).sum()


def test_sharded_over_eight_devices_equals_one():
    logits, labels = draw(2, 8, (4, 4), 3, (16, 16))

    def value_and_slope(logits, labels):
        return jax.value_and_grad(lambda x: segmentation_loss(x, labels, (16, 16), rows=4).sum)(logits)

    expected, expected_slope = jax.jit(value_and_slope)(logits, labels)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    step = jax.jit(value_and_slope, in_shardings=(rows, rows))
    value, slope = step(logits, labels)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-5, atol=1e-7)
    # The batch stays where it is: one sum over devices after the loop, no gathering of logits.
    text = step.lower(logits, labels).compile().as_text()
    assert "all-gather" not in text and text.count("all-reduce(") <= 2


def test_five_heads_never_hold_full_size_logits():
    """Temporary memory of loss and gradient for five heads of 150 classes at 512x512: fused against direct."""
    heads = [jax.ShapeDtypeStruct((1, s, s, 150), jnp.float32) for s in (128, 32, 32, 32, 32)]
    labels = jax.ShapeDtypeStruct((1, 512, 512), jnp.uint8)

    def fused(heads, labels):
        return sum(segmentation_loss(head, labels, (512, 512)).sum for head in heads)

    def plain(heads, labels):
        return sum(direct(head, labels.astype(jnp.int32), (512, 512), "cross_entropy", "all", ()) for head in heads)

    temp = {}
    for function in (fused, plain):
        compiled = jax.jit(jax.grad(function)).lower(heads, labels).compile()
        temp[function] = compiled.memory_analysis().temp_size_in_bytes
    full = 512 * 512 * 150 * 4
    assert temp[plain] > 2 * full
    assert temp[fused] < full / 2
    assert automatic_rows(512, 150, 512) * 512 * 150 * 4 <= 8 * 2**20


@pytest.mark.parametrize("rows", [0, 1, 4, 7])
def test_pixels_by_row_blocks(rows):
    logits, _ = draw(3, 2, (5, 4), 6, (1, 1))
    full = resize_bilinear(logits, (20, 16))[:, :18, :15]
    labels, top = jax.jit(
        lambda x: map_over_pixels(
            lambda block: (block.argmax(-1), block.max(-1)),
            x,
            samples(5, 20, cut=18),
            samples(4, 16, cut=15),
            rows=rows,
        )
    )(logits)
    np.testing.assert_array_equal(labels, full.argmax(-1))
    np.testing.assert_allclose(top, full.max(-1), rtol=1e-5)


@pytest.mark.reference
def test_reference_cross_entropy(reference_data):
    golden = np.load(reference_data / "goldens/setr/misc_resize_loss_miou_sched.npz", allow_pickle=False)
    logits, labels = golden["loss_logits"].transpose(0, 2, 3, 1), golden["loss_labels"]
    for denominator, key in (("all", "loss_mean_all_pixels"), ("valid", "loss_mean_valid_pixels")):
        term = segmentation_loss(logits, labels, labels.shape[1:], denominator=denominator)
        assert float(term.sum / term.weight) == pytest.approx(float(golden[key]), abs=1e-5)
