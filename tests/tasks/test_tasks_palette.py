"""Segmentation by colours: loss and decoding against NumPy, what is written and drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jax_densevit.data.class_names import CITYSCAPES_CLASSES, CITYSCAPES_PALETTE
from jax_densevit.data.source import DataInfo
from jax_densevit.errors import UserError
from jax_densevit.models.output import DenseOutput
from jax_densevit.tasks import create_task
from jax_densevit.tasks.palette import ACTIVATIONS, PaletteTask

CITIES = DataInfo("cityscapes", CITYSCAPES_CLASSES, CITYSCAPES_PALETTE)
PALETTE = np.array(CITYSCAPES_PALETTE) / 255


def outputs_of(colors):
    """What the hard sigmoid turns into these colours."""
    return (np.asarray(colors, np.float32) - 0.5) / 0.2


def forward_of(logits):
    """A model that answers `logits` to whatever comes, for pictures of their size."""
    return lambda images: DenseOutput(jnp.asarray(logits, jnp.float32), covers=images.shape[1:3])


def test_activations_are_those_of_keras_2_and_3():
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    np.testing.assert_allclose(ACTIVATIONS["hard_sigmoid"](x), np.clip(0.2 * x + 0.5, 0, 1), atol=1e-7)
    np.testing.assert_allclose(ACTIVATIONS["hard_sigmoid_6"](x), jax.nn.hard_sigmoid(x), atol=1e-7)
    np.testing.assert_allclose(ACTIVATIONS["sigmoid"](x), 1 / (1 + np.exp(-x)), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"loss_function": "mse", "denominator": "all", "activation": "sigmoid"}])
def test_loss_against_numpy(options):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 19, (2, 6, 8)).astype(np.uint8)
    labels[0, :2] = 255
    weights = tuple(rng.uniform(0.5, 2, 19))
    logits = rng.normal(size=(2, 6, 8, 3)).astype(np.float32) * 3
    task = create_task("palette", CITIES, class_weights=weights, **options)
    terms = task.loss(DenseOutput(logits, auxiliary=(logits,), covers=(6, 8)), {"labels": labels})
    assert [(name, term.coefficient) for name, term in terms.items()] == [("palette", 1.0), ("auxiliary_1", 0.4)]
    total = weight = 0.0
    for at in np.ndindex(labels.shape):
        if labels[at] == 255:
            continue
        x = logits[at].astype(np.float64)
        color = 1 / (1 + np.exp(-x)) if "activation" in options else np.clip(0.2 * x + 0.5, 0, 1)
        error = color - PALETTE[labels[at]]
        error = error**2 if options else np.abs(error)
        total += weights[labels[at]] * error.sum() / 3
        weight += weights[labels[at]]
    for term in terms.values():
        assert float(term.sum) == pytest.approx(total, rel=1e-5)
        assert float(term.weight) == pytest.approx(labels.size if options else weight, rel=1e-5)


def test_loss_at_the_resolution_of_the_labels():
    """Outputs are enlarged before they become colours, by blocks of rows or at once."""
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 19, (1, 12, 16)).astype(np.uint8)
    small = rng.normal(size=(1, 3, 4, 3)).astype(np.float32)
    large = jax.image.resize(small, (1, 12, 16, 3), "bilinear", antialias=False)
    want = PaletteTask(CITIES).loss(DenseOutput(large, covers=(12, 16)), {"labels": labels})["palette"].sum
    for rows in (0, 5):
        got = PaletteTask(CITIES, loss_rows=rows).loss(DenseOutput(small, covers=(12, 16)), {"labels": labels})
        assert float(got["palette"].sum) == pytest.approx(float(want), rel=1e-5)


def test_a_label_that_is_no_class_stops_training():
    labels = np.full((1, 2, 2), 3, np.uint8)
    labels[0, 0, 0] = 19
    output = DenseOutput(jnp.zeros((1, 2, 2, 3)), covers=(2, 2))
    assert np.isnan(PaletteTask(CITIES).loss(output, {"labels": labels})["palette"].sum)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 999), st.booleans())
def test_decoding_finds_the_nearest_color(seed, flip):
    rng = np.random.default_rng(seed)
    colors = rng.uniform(0, 1, (1, 5, 6, 3))
    colors[0, 0] = PALETTE[rng.integers(0, 19, 6)]
    answer = PaletteTask(CITIES, flip=flip).decode(
        forward_of(outputs_of(colors)), {"image": np.zeros((1, 5, 6, 3), np.uint8)}
    )
    mean = (colors + colors[:, :, ::-1]) / 2 if flip else colors
    distance = ((mean[..., None, :] - PALETTE) ** 2).sum(-1)
    two = np.sort(distance, -1)
    clear = two[..., 1] - two[..., 0] > 1e-5
    np.testing.assert_array_equal(answer["labels"][clear], distance.argmin(-1)[clear])
    assert np.abs(answer["colors"] - mean * 255).max() <= 0.5 + 1e-3 and answer["colors"].dtype == jnp.uint8


def test_every_color_is_its_own_class_at_the_labels_resolution():
    """Cityscapes has colours as close as those of its bus and its train; and labels larger than the outputs."""
    ids = np.arange(19)
    exact = PaletteTask(CITIES).choose(outputs_of(PALETTE), full=True)
    np.testing.assert_array_equal(exact["labels"], ids)
    np.testing.assert_array_equal(exact["colors"], CITYSCAPES_PALETTE)
    logits = np.repeat(outputs_of(PALETTE[[13, 8, 10]])[None, None], 2, 1)  # car, vegetation, sky
    answer = PaletteTask(CITIES, fixed_size=(2, 3)).decode(
        forward_of(logits), {"image": np.zeros((1, 10, 30, 3), np.uint8)}, full=True
    )
    assert answer["labels"].shape == (1, 10, 30)
    for column, name in ((0, "car"), (15, "vegetation"), (29, "sky")):
        assert (np.asarray(answer["labels"])[0, :, column] == CITYSCAPES_CLASSES.index(name)).all()


def test_scores_are_those_of_segmentation():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 19, (2, 8, 8)).astype(np.uint8)
    labels[:, :2] = 255
    task = PaletteTask(CITIES)
    right = task.decode(forward_of(outputs_of(PALETTE[labels % 19])), {"image": np.zeros((2, 8, 8, 3), np.uint8)})
    counts = task.measure(right, {"labels": jnp.asarray(labels)})
    results = {name: metric.compute(jax.device_get(counts[name])) for name, metric in task.metrics().items()}
    assert task.summary(results)["mIoU"] == 1.0 and next(iter(task.summary(results))) == "mIoU"
    assert task.protocol()["task"] == "palette" and task.protocol()["activation"] == "hard_sigmoid"


def test_data_without_a_palette_are_painted_as_they_are_drawn():
    info = DataInfo("toy", classes=("background", "cat", "dog"))
    task = PaletteTask(info)
    assert task.num_outputs == 3 and task.palette.shape == (3, 3) and not task.palette[0].any()
    np.testing.assert_array_equal(task.choose(outputs_of(task.palette))["labels"], [0, 1, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_function": "maes"}, "did you mean 'mae'"),
        ({"activation": "hard_sigmoid6"}, "did you mean 'hard_sigmoid_6'"),
        ({"class_weights": (1.0, 1.0, 1.0)}, "3 numbers for 19 classes"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        create_task("palette", CITIES, **options)


def test_refusals():
    info = DataInfo("twins", ("cat", "dog"), ((1, 2, 3), (1, 2, 3)))
    with pytest.raises(UserError, match="paints 'cat' and 'dog' in the same colour"):
        PaletteTask(info)
    with pytest.raises(UserError, match="19 outputs, but the task 'palette' on 'cityscapes' needs 3"):
        PaletteTask(CITIES).loss(DenseOutput(jnp.zeros((1, 2, 2, 19)), covers=(2, 2)), {"labels": jnp.zeros((1, 2, 2))})
    with pytest.raises(UserError, match="no probabilities"):
        PaletteTask(CITIES).decode(
            forward_of(np.zeros((1, 4, 4, 3))), {"image": np.zeros((1, 4, 4, 3), np.uint8)}, probabilities=True
        )


def test_files_and_sheet(tmp_path):
    task = PaletteTask(CITIES)
    image = np.full((40, 50, 3), 90, np.uint8)
    labels = np.zeros((40, 50), np.int32)
    labels[20:] = 13
    colors = np.random.default_rng(3).integers(0, 255, (40, 50, 3)).astype(np.uint8)
    paths = task.write(image, {"labels": labels, "colors": colors}, tmp_path, "street", {"step": 7})
    assert tuple(path.name for path in paths) == task.file_names("street")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(task.file_names("street"))
    with Image.open(tmp_path / "street_colors.png") as written:
        np.testing.assert_array_equal(np.asarray(written), colors)
    example = {"image": image, "labels": labels.astype(np.uint8), "predicted_labels": labels, "name": "a"}
    plain = task.sheet([example])
    page = task.sheet([{**example, "predicted_colors": colors}])
    assert page.width == plain.width + 268  # one column more: the colours themselves, between image and prediction
    cell = np.asarray(page)[34 : 34 + 4, 20 + 268 : 20 + 268 + 4]
    assert (cell == colors[0, 0]).all()  # enlarged sixfold, pixels staying visible
