"""The spiral decoder: its order, its causality, and that writing step by step equals teacher forcing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.data.source import DataInfo
from jax_densevit.errors import UserError
from jax_densevit.layers.embedding import patchify
from jax_densevit.models import create_model
from jax_densevit.models.registry import find_model
from jax_densevit.models.spiral import spiral_order
from jax_densevit.tasks import create_task

TINY = {
    "hidden_size": 8,
    "num_layers": 1,
    "num_heads": 2,
    "mlp_size": 12,
    "decoder_layers": 2,
    "patch_size": 2,
    "image_size": 8,
    "num_classes": 3,
}
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 6, 10, 3)).astype(np.float32)
Y = RNG.integers(0, 3, (3, 6, 10)).astype(np.uint8)


def build(**options):
    """A model and parameters large enough that every input matters well above rounding."""
    model = create_model("spiral", **{**TINY, **options})
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), params)


MODEL, PARAMS = build()


@jax.jit
def forced(images, labels):
    return MODEL.apply({"params": PARAMS}, images, labels)


@jax.jit
def written(images):
    return MODEL.apply({"params": PARAMS}, images)


GRIDS = [(h, w) for h in range(1, 8) for w in range(1, 8)] + [(8, 16), (16, 16), (3, 17), (13, 2)]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "x".join(map(str, grid)))
def test_order(grid):
    height, width = grid
    order = spiral_order(height, width)
    assert order.dtype == np.int32 and sorted(order) == list(range(height * width))
    cells = np.stack(np.divmod(order, width), 1)
    centre = np.array([(height - 1) // 2, (width - 1) // 2])
    assert (cells[0] == centre).all()
    # Outward: a square around the start grows by a column and a row at a time, and is full before it grows again.
    away = (cells - centre)[:, :: -1 if height > width else 1]
    square = np.maximum(2 * away - 1, -2 * away).max(1)  # +1 is reached by the first growth, -1 by the second, ...
    assert (np.diff(square) >= 0).all()
    steps = np.abs(cells[1:, None] - cells[None]).sum(-1)
    for t, near in enumerate(steps, start=1):
        assert near[:t].min() == 1  # touches an earlier one
    if abs(height - width) <= 1:
        assert (np.abs(np.diff(cells, axis=0)).sum(1) == 1).all()

    if height != width:  # a grid on its side is the same walk
        np.testing.assert_array_equal(spiral_order(width, height), cells[:, 1] * height + cells[:, 0])


def test_order_of_the_study():
    """16 x 16 patches: 256 x 256 pixels."""
    walk = [(int(i) // 16, int(i) % 16) for i in spiral_order(16, 16)]
    assert walk[:5] == [(7, 7), (7, 8), (8, 8), (8, 7), (8, 6)] and walk[-1] == (15, 0)
    np.testing.assert_array_equal(spiral_order(3, 3).reshape(3, 3), [[4, 5, 8], [7, 6, 3], [0, 1, 2]])


def test_causality_of_every_position():
    """Other labels in the patch at place k of the spiral change nothing up to k, and the patch at k + 1."""
    order = spiral_order(3, 5)
    changed = np.repeat(Y[:1], 15, 0)
    for k, cell in enumerate(order):
        top, left = 2 * (cell // 5), 2 * (cell % 5)
        changed[k, top : top + 2, left : left + 2] = (changed[k, top : top + 2, left : left + 2] + 1) % 3
    images = np.repeat(X[:1], 15, 0)
    before, after = (forced(images, labels).logits for labels in (np.repeat(Y[:1], 15, 0), changed))
    moved = np.abs(patchify(np.asarray(after - before), 2)).max(-1).reshape(15, 15)[:, order]
    for k in range(15):
        assert moved[k, : k + 1].max() < 1e-6, k
        assert (moved[k, k + 1 :] > 1e-4).all(), k


def test_all_pixels_of_the_picture_matter_everywhere():
    changed = X[:1].copy()
    changed[:, :2, :2] += 1  # a corner, late in the spiral
    difference = np.abs(forced(X[:1], Y[:1]).logits - forced(changed, Y[:1]).logits)
    assert (patchify(np.asarray(difference), 2).max(-1) > 1e-5).all()


@pytest.mark.parametrize("size", [(6, 10), (5, 9), (8, 8)])
def test_writing_equals_teacher_forcing(size):
    """With caches, token by token, and all tokens at once from the labels that were written: the same logits."""
    images = RNG.normal(size=(3, *size, 3)).astype(np.float32)
    step_by_step = written(images)
    labels = np.argmax(step_by_step.logits, -1)[:, : size[0], : size[1]]
    assert len(np.unique(labels)) == 3  # the feedback says something
    at_once = forced(images, labels)
    np.testing.assert_allclose(step_by_step.logits, at_once.logits, atol=1e-5)
    assert step_by_step.covers == at_once.covers == tuple(side + side % 2 for side in size)
    other = forced(images, (labels + 1) % 3)
    assert np.abs(other.logits - at_once.logits).max() > 0.1


def test_pictures_of_a_batch_do_not_meet():
    together = written(X).logits
    for i in range(3):
        np.testing.assert_allclose(written(X[i : i + 1]).logits[0], together[i], atol=1e-5)
        np.testing.assert_allclose(forced(X[i : i + 1], Y[i : i + 1]).logits[0], forced(X, Y).logits[i], atol=1e-5)


def test_labels_that_are_no_class_are_one_unknown():
    labels = Y.copy()
    labels[:, :3] = 255
    other = labels.astype(np.int32)
    other[:, :3] = -1
    assert np.abs(forced(X, labels).logits - forced(X, Y).logits).max() > 0.01
    np.testing.assert_array_equal(forced(X, labels).logits, forced(X, other).logits)


def test_the_program_does_not_grow_with_the_picture():
    def products(size):
        jaxpr = jax.make_jaxpr(lambda x: MODEL.apply({"params": PARAMS}, x).logits)(jnp.zeros((1, *size, 3)))
        return str(jaxpr).count("dot_general[")

    assert products((12, 10)) == products((24, 32)) > 20


def test_macs_are_those_the_compiler_counts():
    sizes = {"hidden_size": 128, "num_heads": 4, "mlp_size": 512, "patch_size": 4, "image_size": (24, 32)}
    model = create_model("spiral", **{**TINY, **sizes, "num_classes": 7})
    images, labels = jax.ShapeDtypeStruct((1, 24, 32, 3), jnp.float32), jax.ShapeDtypeStruct((1, 24, 32), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    # All at once: of a scan over tokens, the compiler counts one.
    flops = jax.jit(model.apply).lower(variables, images, labels).cost_analysis()["flops"]
    assert 1.0 <= flops / (2 * find_model("spiral").macs(model, (24, 32))) < 1.05


def test_every_parameter_learns():
    labels = Y.copy()
    labels[:, 2:4, 4:6] = 255  # or the label "unknown" would have no gradient

    def loss(params):
        return jnp.sum(jnp.sin(MODEL.apply({"params": params}, X, labels, train=True).logits))

    gradient = jax.jit(jax.grad(loss))(PARAMS)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.all(np.isfinite(leaf)) and np.any(leaf), jax.tree_util.keystr(path)


def test_bfloat16_and_dropout():
    model = create_model("spiral", **TINY, dtype="bfloat16", dropout=0.5)
    apply = jax.jit(model.apply, static_argnames="train")
    half = apply({"params": PARAMS}, X, Y)
    assert half.logits.dtype == jnp.float32 and half.features["tokens"].dtype == jnp.bfloat16
    full = forced(X, Y).logits
    assert 0 < np.abs(half.logits - full).max() < 0.1 * np.abs(full).max()
    dropped = [apply({"params": PARAMS}, X, Y, train=True, rngs={"dropout": jax.random.key(i)}).logits for i in (0, 1)]
    assert np.abs(dropped[0] - dropped[1]).max() > 0.1
    assert apply({"params": PARAMS}, X).logits.shape == full.shape


def test_task_gives_labels_in_training_and_none_in_decoding():
    info = DataInfo("toy", ("background", "cat", "dog"))
    task = create_task("spiral", info)
    batch = {"image": RNG.integers(0, 255, (3, 6, 10, 3)).astype(np.uint8), "labels": Y}
    images, labels = task.inputs(batch)
    assert labels is batch["labels"] and task.num_outputs == 3
    terms = task.loss(forced(images, labels), batch)
    # The sum of the cross-entropies is minus the logarithm of the label maps' likelihood.
    log = jax.nn.log_softmax(forced(images, labels).logits)
    likelihood = np.take_along_axis(np.asarray(log), Y[..., None].astype(int), -1).sum()
    assert float(terms["spiral"].sum) == pytest.approx(-likelihood, rel=1e-5)
    answer = task.decode(written, batch)
    np.testing.assert_array_equal(answer["labels"], np.argmax(written(images).logits, -1))
    assert task.protocol()["task"] == "spiral"


def test_refusals():
    with pytest.raises(UserError, match="use the task 'spiral'"):
        MODEL.apply({"params": PARAMS}, X, train=True)
    with pytest.raises(UserError, match="num_heads=3 does not divide hidden_size=8"):
        build(num_heads=3)
