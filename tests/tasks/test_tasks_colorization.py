"""Colorization: the loss against slow NumPy, decoding at any size, luminance, numbers and files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2lab
from skimage.metrics import peak_signal_noise_ratio

from jax_densevit.data.source import DataInfo
from jax_densevit.errors import UserError
from jax_densevit.layers.resize import resize_bilinear
from jax_densevit.models.output import DenseOutput
from jax_densevit.tasks import create_task
from jax_densevit.tasks.colorization import averages
from jax_densevit.tasks.rooms import give_room

INFO = DataInfo("photos", mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
BT601 = np.array([0.299, 0.587, 0.114])


def photos(seed, count=2, height=40, width=52):
    """Smooth pictures in moderate colors, uint8."""
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(rng.integers(60, 200, (3, 4, 3)).astype(np.uint8)) for _ in range(count)]
    return np.stack([np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)) for picture in pictures])


def gray_of(image):
    return np.round(image @ BT601).astype(np.uint8)


def rgb_outputs(pictures):
    """What a model must say for these pictures, float in [0, 1]."""
    return ((pictures - np.array(INFO.mean)) / np.array(INFO.std)).astype(np.float32)


class Painter:
    """A model that answers with given outputs, whatever it sees, and remembers what it saw."""

    def __init__(self, outputs, covers=None):
        self.outputs, self.covers, self.seen = jnp.asarray(outputs), covers, None

    def __call__(self, images):
        self.seen = np.asarray(images)
        covers = self.covers or images.shape[1:3]
        return DenseOutput(self.outputs, covers=tuple(covers))


class Tinter:
    """A model at half resolution that answers with its input, red added and blue taken: sizes padded inside to even."""

    def __init__(self, task):
        self.task, self.shapes = task, []

    def __call__(self, images):
        self.shapes.append(images.shape[1:3])
        covers = tuple(side + side % 2 for side in images.shape[1:3])
        padded = jnp.pad(images, ((0, 0), (0, covers[0] - images.shape[1]), (0, covers[1] - images.shape[2]), (0, 0)))
        half = padded.reshape(len(images), covers[0] // 2, 2, covers[1] // 2, 2, 3).mean((2, 4))
        tint = np.array([0.1, 0.0, -0.1], np.float32) / np.array(self.task.info.std, np.float32)
        return DenseOutput(half + tint, covers=covers)


@pytest.mark.parametrize(
    ("loss", "target", "covers"),
    [
        ("charbonnier", "rgb", (48, 64)),
        ("charbonnier", "lab_ab", (40, 52)),
        ("l1", "rgb", (40, 52)),
        ("l2", "lab_ab", (48, 64)),
    ],
)
def test_the_loss_is_the_mean_over_pixels_that_are_no_padding(loss, target, covers):
    task = create_task("colorization", INFO, target=target, loss_function=loss, epsilon=0.01, auxiliary_weight=[0.25])
    rng, image = np.random.default_rng(0), photos(1)
    outputs = rng.normal(0, 0.3, (2, 12, 16, task.num_outputs)).astype(np.float32)
    full = rng.normal(0, 0.3, (2, *covers, task.num_outputs)).astype(np.float32)  # a head that needs no resizing
    sizes = np.array([[40, 52], [31, 20]], np.int32)
    output = DenseOutput(jnp.asarray(outputs), (jnp.asarray(full),), covers=covers)
    terms = jax.jit(task.loss)(output, {"image": image, "size": sizes})
    assert {name: term.coefficient for name, term in terms.items()} == {"colorization": 1.0, "auxiliary_1": 0.25}
    for name, head in (("colorization", outputs), ("auxiliary_1", full)):
        term = terms[name]
        enlarged = np.asarray(resize_bilinear(head, covers))[:, :40, :52].astype(np.float64)
        truth = image / 255.0
        if target == "rgb":
            difference = enlarged * np.array(INFO.std) + np.array(INFO.mean) - truth
        else:
            difference = enlarged - rgb2lab(truth)[..., 1:] / 100
        value = {"l1": np.abs, "l2": np.square, "charbonnier": lambda d: np.sqrt(d**2 + 1e-4)}[loss](difference)
        expected = value[0].sum() + value[1, :31, :20].sum()
        assert float(term.sum) == pytest.approx(expected, rel=2e-4)
        assert float(term.weight) == task.num_outputs * (40 * 52 + 31 * 20)


@pytest.mark.parametrize("target", ["rgb", "lab_ab"])
def test_the_gradient_by_blocks_is_that_of_the_plain_loss(target):
    task = create_task("colorization", INFO, target=target, loss_rows=7)
    outputs = np.random.default_rng(0).normal(0, 0.3, (2, 10, 13, task.num_outputs)).astype(np.float32)
    batch = {"image": photos(2), "size": np.array([[40, 52], [12, 52]], np.int32)}

    def blocks(x):
        return task.loss(DenseOutput(x, covers=(40, 52)), batch)["colorization"].sum

    def plain(x):
        return task.loss(DenseOutput(resize_bilinear(x, (40, 52)), covers=(40, 52)), batch)["colorization"].sum

    np.testing.assert_allclose(jax.jit(jax.grad(blocks))(outputs), jax.jit(jax.grad(plain))(outputs), atol=1e-4)


def test_the_input_is_gray_in_whole_levels_and_normalised():
    image = photos(3)
    for formula, weights in {"bt601": BT601, "study_bgr": BT601[::-1], "bt709": [0.2126, 0.7152, 0.0722]}.items():
        (inputs,) = create_task("colorization", INFO, gray=formula).inputs({"image": image})
        levels = (np.asarray(inputs) * np.array(INFO.std) + np.array(INFO.mean)) * 255
        assert np.abs(levels - levels.round()).max() < 1e-4
        assert np.abs(levels - (image @ np.array(weights))[..., None]).max() < 0.501
    gray = np.repeat(gray_of(image)[..., None], 3, -1)
    for formula in ("mean", "lab_l", "bt709"):
        np.testing.assert_array_equal(create_task("colorization", INFO, gray=formula).make_gray(gray), gray[..., 0])


def test_a_model_that_knows_gives_the_very_picture():
    image = photos(4)
    task = create_task("colorization", INFO)
    answer = task.decode(Painter(rgb_outputs(image / 255)), {"image": image})
    np.testing.assert_array_equal(answer["image"], image)
    assert np.abs(answer["gray"] - image @ BT601).max() < 0.501
    lab = create_task("colorization", INFO, target="lab_ab", gray="lab_l")
    answer = lab.decode(Painter((rgb2lab(image)[..., 1:] / 100).astype(np.float32)), {"image": image})
    assert np.abs(answer["image"].astype(int) - image).max() <= 2  # lightness was rounded to a gray level
    kept = create_task("colorization", INFO, keep_luminance=True, gray="lab_l")
    answer = kept.decode(Painter(rgb_outputs(image / 255)), {"image": image})
    assert np.abs(answer["image"].astype(int) - image).max() <= 2


def test_outputs_beyond_white_and_black_are_clipped():
    image = photos(5)
    answer = create_task("colorization", INFO).decode(Painter(rgb_outputs(3 * (image / 255 - 0.5))), {"image": image})
    expected = np.clip(np.round(255 * 3 * (image / 255 - 0.5)), 0, 255)
    assert np.abs(answer["image"].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("options", [{"keep_luminance": True}, {"target": "lab_ab"}, {"max_side": 32}])
def test_luminance_is_that_of_the_gray_input(options):
    image = photos(6, 1, 48, 64)
    image[:, ::2, ::2] //= 2  # detail that no enlarged prediction could have
    task = create_task("colorization", INFO, **options)
    noise = np.random.default_rng(0).normal(0, 0.5, (1, *task.decoding_size(48, 64), task.num_outputs))
    answer = jax.device_get(task.decode(Painter(noise.astype(np.float32)), {"image": image}))
    lightness, expected = rgb2lab(answer["image"])[..., 0], rgb2lab(np.repeat(gray_of(image)[..., None], 3, -1))[..., 0]
    assert np.abs(lightness - expected).max() < 0.7  # half an 8-bit level in every channel
    assert np.abs(rgb2lab(answer["image"])[..., 1:]).mean() > 5


@pytest.mark.parametrize("options", [{}, {"keep_luminance": True}, {"max_side": 64}, {"fixed_size": (32, 64)}])
def test_room_in_the_arrays_changes_nothing(options):
    task = create_task("colorization", INFO, **options)
    for size in ((37, 45), (50, 100)):
        batch = {"image": photos(7, 2, *size)}
        plain = task.decode(Tinter(task), batch)
        roomy = task.decode(Tinter(task), give_room(batch, {}))
        for name in ("image", "gray"):
            inner = np.asarray(roomy[name])[:, : size[0], : size[1]].astype(int)
            assert np.abs(inner - plain[name]).max() <= (name == "image")


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (10, 40), (33, 71), (64, 65), (130, 260)])
def test_pictures_of_any_size_are_decoded(size):
    task = create_task("colorization", INFO, max_side=128)
    model, image = Tinter(task), photos(8, 1, *size)
    answer = jax.device_get(task.decode(model, {"image": image}))
    assert answer["image"].shape == (1, *size, 3) and answer["image"].dtype == np.uint8
    (fed,) = model.shapes
    assert min(fed) >= 32 and max(fed) <= 128
    assert max(size) <= 128 or fed == ((64, 128) if size[0] > 1 else (32, 128))
    tint = answer["image"].astype(int) - answer["gray"][..., None]
    assert tint[..., 0].mean() > 8 and tint[..., 2].mean() < -8


def test_a_large_photo_gets_the_chroma_found_at_a_smaller_size():
    image = photos(9, 1, 96, 160)
    task = create_task("colorization", INFO, max_side=64, gray="lab_l")
    small = Image.fromarray(image[0]).resize((64, 32), Image.Resampling.BILINEAR)
    model = Painter(rgb_outputs(np.asarray(small)[None] / 255))
    answer = jax.device_get(task.decode(model, {"image": image}))
    # What the model saw is the gray photo, properly averaged.
    seen = (model.seen[0, ..., 0] * INFO.std[0] + INFO.mean[0]) * 255
    expected = Image.fromarray(np.asarray(answer["gray"])[0]).resize((64, 32), Image.Resampling.BILINEAR)
    assert np.abs(seen - np.asarray(expected, np.float64)).max() < 1.01
    # The colors are those of the photo but for what shrinking lost.
    assert peak_signal_noise_ratio(image[0], answer["image"][0]) > 38


@pytest.mark.parametrize(("given", "length"), [(100, 32), (33, 32), (7, 32), (64, 64), (1, 5)])
def test_averages_are_those_of_pillow(given, length):
    values = np.random.default_rng(0).random((1, given)).astype(np.float32)
    expected = Image.fromarray(values).resize((length, 1), Image.Resampling.BILINEAR)
    weights = averages(given, length, given + 3)
    np.testing.assert_allclose(np.pad(values, ((0, 0), (0, 3))) @ weights.T, np.asarray(expected), atol=1e-5)


def test_numbers_with_the_gray_input_beside_them():
    image = photos(10, 3)
    task = create_task("colorization", INFO)
    colored = np.clip(image.astype(int) + np.array([9, 0, -9]), 0, 255).astype(np.uint8)
    predictions = {"image": colored, "gray": gray_of(image)}
    metrics = task.metrics()
    measured = jax.jit(task.measure)(predictions, {"image": image, "mask": np.array([True, True, False])})
    states = {name: metric.merge(metric.empty(), jax.device_get(measured[name])) for name, metric in metrics.items()}
    results = {name: metric.compute(states[name]) for name, metric in metrics.items()}
    summary, gray = task.summary(results), task.baselines(results)["all gray"]
    assert list(summary)[0] == "PSNR" and summary.keys() == gray.keys() and not task.percent
    grays = np.repeat(gray_of(image)[..., None], 3, -1)
    for numbers, pictures in ((summary, colored), (gray, grays)):
        pairs = list(zip(image[:2], pictures[:2], strict=True))
        assert numbers["PSNR"] == pytest.approx(np.mean([peak_signal_noise_ratio(*pair) for pair in pairs]))
    assert gray["colorfulness"] == 0 and gray["delta_colorfulness"] < 0 and summary["colorfulness"] > 0
    json.dumps(results, allow_nan=False)


def test_sheet_and_files(tmp_path):
    image = photos(11, 2, 60, 90)
    task = create_task("colorization", INFO, max_side=64)
    answer = jax.device_get(task.decode(Tinter(task), {"image": image}))
    examples = [
        {"image": image[i], "name": f"photo {i}", **{f"predicted_{name}": answer[name][i] for name in answer}}
        for i in range(2)
    ]
    page = task.sheet(examples)
    assert page.width > 3 * 256 and page.height > 2 * 170
    one = {name: value[0] for name, value in answer.items()}
    paths = task.write(image[0], one, tmp_path, "photo", {"step": 3, **task.protocol()})
    assert [path.name for path in paths] == list(task.file_names("photo")) == ["photo.png", "photo.json"]
    np.testing.assert_array_equal(np.asarray(Image.open(paths[0])), one["image"])
    report = json.loads(paths[1].read_text())
    assert report["input"] == "color, made gray first (bt601)" and report["decoded_at"] == [32, 64]
    assert report["luminance"].startswith("CIELAB") and report["step"] == 3 and report["colorfulness"] > 5
    gray = np.repeat(one["gray"][..., None], 3, -1)
    assert json.loads(task.write(gray, one, tmp_path, "gray")[1].read_text())["input"] == "gray"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "rbg"}, "did you mean 'rgb'"),
        ({"gray": "BT601"}, "gray formula"),
        ({"loss_function": "l3"}, "did you mean 'l"),
        ({"epsilon": 0.0}, "above 0"),
        ({"max_side": 5}, "at least 32"),
        ({"fixed_size": (3, 0)}, "fixed_size"),
        ({"keep_luma": True}, "did you mean 'keep_luminance'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        create_task("colorization", INFO, **options)


def test_a_model_with_other_outputs_is_refused():
    task, image = create_task("colorization", INFO, target="lab_ab"), photos(12)
    with pytest.raises(UserError, match="3 outputs, but task.target='lab_ab' needs 2"):
        task.decode(Painter(rgb_outputs(image / 255)), {"image": image})
    with pytest.raises(UserError, match="2 factors"):
        create_task("colorization", INFO, auxiliary_weight=[1, 2]).loss(
            DenseOutput(jnp.zeros((2, 40, 52, 3)), covers=(40, 52)), {"image": image}
        )
