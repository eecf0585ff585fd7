"""Decoding and losses of the segmentation task against slow NumPy."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jax_densevit.data.source import DataInfo
from jax_densevit.errors import UserError
from jax_densevit.models.output import DenseOutput
from jax_densevit.tasks import create_task
from jax_densevit.tasks.rooms import give_room, room_for
from jax_densevit.tasks.segmentation import SegmentationTask
from jax_densevit.tasks.sliding import window_starts

INFO = DataInfo("toy", classes=("background", "cat", "dog"))
WEIGHTS = np.random.default_rng(5).normal(size=(3, 3)).astype(np.float32)


def interpolate(picture, size):
    """torch's bilinear interpolation without aligned corners, written out: `[h, w, C]` to `[*size, C]`, float64."""
    for axis in (0, 1):
        given = picture.shape[axis]
        at = np.clip((np.arange(size[axis]) + 0.5) * given / size[axis] - 0.5, 0, given - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, given - 1)
        share = (at - low).reshape([-1 if a == axis else 1 for a in range(3)])
        picture = np.take(picture, low, axis) * (1 - share) + np.take(picture, high, axis) * share
    return picture


class Model:
    """A model whose answer depends on where a pixel lies in what it is fed, so misplaced windows show.

    Means over 4x4 patches (padded inside to a multiple of 4), a linear map, and a ramp down and across the input.
    """

    def __init__(self):
        self.shapes = set()
        self.jitted = jax.jit(self.compute)

    def __call__(self, images):
        return self.jitted(images)

    def compute(self, images):
        self.shapes.add(images.shape)  # runs once per compilation
        b, h, w, _ = images.shape
        covers = (-(-h // 4) * 4, -(-w // 4) * 4)
        x = jnp.pad(images, ((0, 0), (0, covers[0] - h), (0, covers[1] - w), (0, 0)))
        x = x.reshape(b, covers[0] // 4, 4, covers[1] // 4, 4, 3).mean((2, 4)) @ WEIGHTS
        ramp = jnp.linspace(0, 1, x.shape[1])[:, None, None] * jnp.array([1.0, 0, -1])
        ramp += jnp.linspace(0, 1, x.shape[2])[None, :, None] * jnp.array([0, 1.0, -0.5])
        return DenseOutput(x + ramp, covers=covers)

    def slow(self, image):
        """The same for one picture in NumPy, resized and cut to its size."""
        h, w, _ = image.shape
        rows, columns = -(-h // 4), -(-w // 4)
        padded = np.zeros((rows * 4, columns * 4, 3))
        padded[:h, :w] = image
        x = np.zeros((rows, columns, 3))
        for i in range(rows):
            for j in range(columns):
                x[i, j] = padded[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].reshape(16, 3).mean(0) @ WEIGHTS
                x[i, j] += np.array([1, 0, -1]) * (i / (rows - 1) if rows > 1 else 0)
                x[i, j] += np.array([0, 1, -0.5]) * (j / (columns - 1) if columns > 1 else 0)
        return interpolate(x, (rows * 4, columns * 4))[:h, :w]


def slow_slide(model, image, crop, stride):
    h, w, _ = image.shape
    padded = np.zeros((max(h, crop), max(w, crop), 3))
    padded[:h, :w] = image
    logits, count = np.zeros((*padded.shape[:2], 3)), np.zeros((*padded.shape[:2], 1))
    for i in range(max(h - crop + stride - 1, 0) // stride + 1):
        for j in range(max(w - crop + stride - 1, 0) // stride + 1):
            bottom, right = min(i * stride + crop, padded.shape[0]), min(j * stride + crop, padded.shape[1])
            top, left = max(bottom - crop, 0), max(right - crop, 0)
            logits[top:bottom, left:right] += model.slow(padded[top:bottom, left:right])
            count[top:bottom, left:right] += 1
    assert (count > 0).all()
    return (logits / count)[:h, :w]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def slow_decode(model, image, mode, crop, stride, sizes, flip, size, turns=(0,)):
    """Mean class probabilities of one uint8 picture."""
    normal = (image / 255.0 - np.array(INFO.mean)) / np.array(INFO.std)
    total = np.zeros((*size, 3))
    for test_size in sizes:
        for mirrored, turn in itertools.product((False, True) if flip else (False,), turns):
            x = np.rot90(interpolate(normal, test_size), -turn)
            x = x[:, ::-1] if mirrored else x
            logits = slow_slide(model, x, crop, stride) if mode == "slide" else model.slow(x)
            logits = logits[:, ::-1] if mirrored else logits
            total += softmax(interpolate(np.rot90(logits, turn), size))
    return total / (len(sizes) * (1 + flip) * len(turns))


def pictures(seed, batch, height, width):
    """Smooth random pictures: no two classes tie."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (batch, 4, 5, 3))
    return np.stack([interpolate(c, (height, width)) for c in coarse]).round().astype(np.uint8)


def check(options, sizes, image):
    """Decodes with `options` and compares everything with NumPy; returns the model for its shapes."""
    model, task = Model(), create_task("segmentation", INFO, **options)
    batch, (height, width) = {"image": image}, image.shape[1:3]
    answer = task.decode(model, batch, full=True, probabilities=True)
    plain = task.decode(model, batch, full=True)
    assert answer["labels"].dtype == jnp.int32 and plain["labels"].shape == (len(image), height, width)
    # The same in the corner of larger arrays.
    batch = give_room({"image": image}, {"image": 77})
    roomy = [task.decode(model, batch, full=True, probabilities=True), task.decode(model, batch, full=True)]
    assert roomy[0]["labels"].shape[1:] == (-(-height // 16) * 16, -(-width // 16) * 16)
    roomy = [{key: value[:, :height, :width] for key, value in result.items()} for result in roomy]
    for i, picture in enumerate(image):
        expected = slow_decode(
            model,
            picture,
            options.get("mode"),
            options.get("crop"),
            options.get("stride"),
            sizes,
            options.get("flip", False),
            (height, width),
            range(4) if options.get("rotate90") else (0,),
        )
        for result in (answer, roomy[0]):
            np.testing.assert_allclose(result["probabilities"][i], expected, atol=2e-5)
        for result in (answer, plain, *roomy):
            np.testing.assert_allclose(result["confidence"][i], expected.max(-1), atol=2e-5)
            # Where the best two are closer than rounding, either is right.
            two = np.sort(expected, -1)
            clear = two[..., -1] - two[..., -2] > 1e-4
            assert clear.mean() > 0.95
            np.testing.assert_array_equal(result["labels"][i][clear], expected.argmax(-1)[clear])
    return model


def test_whole_pictures_of_odd_sizes():
    check({}, [(13, 18)], pictures(0, 2, 13, 18))
    check({"flip": True}, [(13, 18)], pictures(0, 2, 13, 18))  # the model pads to (16, 20) inside


@pytest.mark.parametrize(("height", "width"), [(8, 8), (21, 17), (5, 30), (6, 7)])
def test_sliding_windows(height, width):
    check({"mode": "slide", "crop": 8, "stride": 5}, [(height, width)], pictures(1, 2, height, width))


def test_scales_flip_and_windows_together():
    options = {"mode": "slide", "crop": 12, "stride": 8, "scales": (0.5, 1.0, 1.5), "flip": True}
    check(options, [(10, 13), (20, 25), (30, 38)], pictures(2, 1, 20, 25))


@pytest.mark.parametrize("flip", [False, True])
def test_right_angles(flip):
    check({"rotate90": True, "flip": flip}, [(13, 18)], pictures(5, 2, 13, 18))
    options = {"mode": "slide", "crop": 8, "stride": 5, "scales": (1.0, 1.5)}
    check({**options, "rotate90": True, "flip": flip}, [(11, 14), (17, 21)], pictures(6, 1, 11, 14))


def test_base_size_keeps_the_aspect():
    check({"base_size": (30, 16), "flip": True}, [(16, 20)], pictures(3, 1, 20, 25))
    check({"base_size": (20, 16)}, [(16, 20)], pictures(3, 1, 20, 25))


def test_fixed_size_does_not_keep_the_aspect():
    check({"fixed_size": (12, 9)}, [(12, 9)], pictures(3, 2, 20, 25))
    check({"fixed_size": (16, 16), "flip": True}, [(16, 16)], pictures(4, 1, 11, 30))


def test_the_model_compiles_once_for_pictures_of_all_sizes():
    model, task = Model(), SegmentationTask(INFO, mode="slide", crop=8, stride=6, windows_at_once=4)
    for i, size in enumerate([(8, 8), (9, 21), (30, 12), (4, 5)]):
        task.decode(model, {"image": pictures(i, 2, *size)})
    assert model.shapes == {(4, 8, 8, 3)}  # two windows of each of two pictures


def test_pictures_with_room_compile_once_for_many_sizes(caplog):
    model, task = Model(), SegmentationTask(INFO, mode="slide", crop=8, stride=6, flip=True, scales=(1.0, 1.5))
    with jax.log_compiles():
        task.decode(model, give_room({"image": pictures(0, 1, 21, 23)}, {}))
        assert "Compiling" in caplog.text
        caplog.clear()
        for i, size in enumerate([(17, 20), (19, 18), (21, 21), (20, 17)]):
            task.decode(model, give_room({"image": pictures(i, 1, *size)}, {}))
        assert "Compiling" not in caplog.text


def test_rooms():
    for side in (*range(1, 300), 511, 1000, 1025, 2049, 4000):
        room = room_for((side, 16))[0]
        assert side <= room <= max(side + 15, side * 1.125)
    assert len({room_for((side, 16)) for side in range(257, 2049)}) == 24


@settings(max_examples=200, deadline=None)
@given(length=st.integers(1, 400), crop=st.integers(1, 100), stride=st.integers(1, 100))
def test_windows_cover_every_pixel_and_stay_inside(length, crop, stride):
    stride = min(stride, crop)
    starts = window_starts(length, crop, stride)
    covered = np.zeros(max(length, crop), bool)
    for start in starts:
        assert 0 <= start and start + crop <= len(covered)
        covered[start : start + crop] = True
    assert covered.all() and len(set(starts)) == len(starts)
    assert len(starts) == max(length - crop + stride - 1, 0) // stride + 1


def test_the_published_window_grids_and_sizes():
    assert len(window_starts(1025, 768, 512)) * len(window_starts(2049, 768, 512)) == 8
    assert len(window_starts(512, 512, 341)) * len(window_starts(683, 512, 341)) == 2
    task = SegmentationTask(INFO, mode="slide", crop=768, stride=512, base_size=(2049, 1025))
    assert task.decoding_size(1024, 2048) == (1025, 2049)
    task = SegmentationTask(INFO, mode="slide", crop=512, base_size=(2048, 512), short_side_at_least=512)
    assert task.stride == (341, 341)
    assert {task.decoding_size(480, 640, scale) for scale in (0.5, 0.75, 1.0)} == {(512, 683)}
    assert task.decoding_size(480, 640, 1.5) == (768, 1024)


def test_loss_of_all_heads():
    rng = np.random.default_rng(6)
    labels = rng.integers(0, 3, (2, 8, 8)).astype(np.uint8)
    heads = [rng.normal(size=(2, s, s, 3)).astype(np.float32) for s in (4, 2, 2)]
    output = DenseOutput(heads[0], auxiliary=tuple(heads[1:]), covers=(8, 8))
    terms = SegmentationTask(INFO).loss(output, {"labels": labels})
    assert [(name, term.coefficient) for name, term in terms.items()] == [
        ("segmentation", 1.0),
        ("auxiliary_1", 0.4),
        ("auxiliary_2", 0.4),
    ]
    for head, term in zip(heads, terms.values(), strict=True):
        slow = 0.0
        for logits, truth in zip(head, labels, strict=True):
            p = softmax(interpolate(logits, (8, 8)))
            slow -= np.log(np.take_along_axis(p, truth[..., None].astype(int), -1)).sum()
        assert float(term.sum) == pytest.approx(slow, rel=1e-5) and term.weight == labels.size
    terms = SegmentationTask(INFO, auxiliary_weight=[0.3, 0.1]).loss(output, {"labels": labels})
    assert [term.coefficient for term in terms.values()] == [1.0, 0.3, 0.1]
    with pytest.raises(UserError, match="3 factors, but the model has 2"):
        SegmentationTask(INFO, auxiliary_weight=(1, 1, 1)).loss(output, {"labels": labels})
    with pytest.raises(UserError, match="3 outputs, but the task 'segmentation' on 'toy' needs 2"):
        SegmentationTask(DataInfo("toy", classes=("a", "b"))).loss(output, {"labels": labels})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_function": "cross_entropi"}, "did you mean 'cross_entropy'"),
        ({"mode": "slides"}, "did you mean 'slide'"),
        ({"denominator": "everything"}, "known: all, valid"),
        ({"mode": "slide"}, "set crop"),
        ({"mode": "slide", "crop": 8, "stride": 9}, "leaves gaps"),
        ({"class_weights": (1.0, 2.0)}, "2 numbers for 3 classes"),
        ({"scales": ()}, "positive factors"),
        ({"base_size": (512, 0)}, "in pixels"),
        ({"fixed_size": (0, 512)}, "fixed_size .* must be .height, width. in pixels"),
        ({"fixed_size": (64, 64), "scales": (0.5, 1.0)}, "leave base_size, short_side_at_least and scales out"),
        ({"crop": (1, 2, 3)}, "one number of pixels"),
        ({"windows_at_once": 0}, "at least 1"),
        ({"flipp": True}, "did you mean 'flip'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        create_task("segmentation", INFO, **options)


def test_one_class_is_refused():
    with pytest.raises(UserError, match="at least two classes"):
        SegmentationTask(DataInfo("toy", classes=("cat",)))


def test_files_of_a_prediction(tmp_path):
    task = SegmentationTask(INFO)
    image = pictures(7, 1, 40, 50)[0]
    labels = np.zeros((40, 50), np.int32)
    labels[5:15, 5:25], labels[20:, 30:] = 1, 2
    confidence = np.where(labels == 1, 0.5, 0.75).astype(np.float32)
    paths = task.write(image, {"labels": labels, "confidence": confidence}, tmp_path, "scene", {"step": 7})
    assert sorted(path.name for path in paths) == sorted(path.name for path in tmp_path.iterdir())
    with Image.open(tmp_path / "scene.png") as written:
        assert written.mode == "P"
        np.testing.assert_array_equal(np.asarray(written), labels)
        assert np.asarray(written.convert("RGB"))[0, 0].tolist() == [0, 0, 0]  # the background is black
    with Image.open(tmp_path / "scene_overlay.png") as written:
        assert written.width >= 50 and written.height > 40  # the legend is below
    report = json.loads((tmp_path / "scene.json").read_text())
    assert (report["step"], report["height"], report["width"]) == (7, 40, 50)
    assert [(row["class"], row["pixels"]) for row in report["classes"]] == [
        ("background", 1400),
        ("cat", 200),
        ("dog", 400),
    ]
    assert report["classes"][1]["mean_confidence"] == 0.5 and report["mean_confidence"] == pytest.approx(0.725)


def test_sheet_shows_errors_and_unlabelled_ground():
    labels = np.zeros((40, 60), np.uint8)
    labels[:10], labels[30:] = 255, 1
    predicted = np.zeros((40, 60), np.int32)
    example = {
        "name": "a",
        "image": np.full((40, 60, 3), 200, np.uint8),
        "labels": labels,
        "predicted_labels": predicted,
    }
    page = np.asarray(SegmentationTask(INFO).sheet([example, example]))
    left, top, height = 20 + 3 * 268, 34, round(40 * 256 / 60)
    errors = page[top : top + height, left : left + 256]
    assert (errors[: height // 5] == errors[0, 0]).all()  # one flat colour for what is not labelled
    middle, low = errors[height // 2, 128].astype(int), errors[-5, 128].astype(int)
    assert np.ptp(middle) == 0 and low[0] - low[1] > 100  # right: gray; wrong: red
    lone = SegmentationTask(INFO).sheet([{"image": example["image"], "predicted_labels": predicted}])
    assert lone.width < page.shape[1]
