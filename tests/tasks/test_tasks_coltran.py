"""ColTran's tasks against NumPy: preprocessing, bits of every stage, random channels, answers, numbers, learning."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from jax_densevit.data.source import DataInfo
from jax_densevit.errors import UserError
from jax_densevit.models.output import ChannelOutput, SymbolOutput
from jax_densevit.models.registry import create_model, find_model
from jax_densevit.tasks import create_task
from jax_densevit.tasks.coltran_upsamplers import random_channels
from jax_densevit.training.optimizer import RMSPROP_EPSILON

INFO = DataInfo("photos")
SIZES = {
    "coltran_colorizer": {"image_size": 8, "photo_size": 16},
    "coltran_color_upsampler": {"image_size": 8, "coarse_size": 8, "photo_size": 16},
    "coltran_spatial_upsampler": {"image_size": 8, "coarse_size": 4, "photo_size": 16},
}
UPSAMPLERS = tuple(SIZES)[1:]
WIDTH = {"hidden_size": 8, "mlp_size": 8, "num_heads": 2}


def task_of(name, **options):
    return create_task(name, INFO, **{**SIZES[name], **options})


def model_of(name, size=(8, 8)):
    return create_model(name, variant="tiny", image_size=size, **WIDTH)


def photos(count=3, height=16, width=16, seed=0):
    """Smooth random pictures, uint8."""
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)) for _ in range(count)]
    return np.stack([np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC)) for picture in pictures])


def seeds(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, (count, 2), dtype=np.uint32)


def blocks(image, size):
    """Means of blocks, halves to even: int64 `[B, size, size, 3]`."""
    factor = image.shape[1] // size
    return np.round(image.reshape(len(image), size, factor, size, factor, 3).astype(np.float64).mean((2, 4))).astype(
        int
    )


def gray_of(image):
    """floor(0.2989 R + 0.587 G + 0.114 B) in float32, one operation after the other."""
    red, green, blue = np.moveaxis(image.astype(np.float32), -1, 0)
    return np.floor((red * np.float32(0.2989) + green * np.float32(0.587)) + blue * np.float32(0.114)).astype(int)


def bits_of(logits, truth):
    """Bits of every symbol, in float64."""
    logits = np.asarray(logits, np.float64)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -np.log2(np.take_along_axis(shares, truth[..., None], -1)[..., 0])


def noise(shape, seed=1):
    return np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)


def stage(name, image):
    """What a stage sees of square pictures and must answer: (values, gray, truth), by slow NumPy."""
    fitted = blocks(blocks(image, 16), 8)
    if name == "coltran_colorizer":
        coarse = fitted // 32
        return None, gray_of(fitted), 64 * coarse[..., 0] + 8 * coarse[..., 1] + coarse[..., 2]
    if name == "coltran_color_upsampler":
        coarse = fitted // 32
    else:
        coarse = blocks(fitted, 4).repeat(2, 1).repeat(2, 2)
    return np.moveaxis(coarse, -1, 1), gray_of(fitted), np.moveaxis(fitted, -1, 1)


@pytest.mark.parametrize("name", SIZES)
def test_inputs_are_the_papers_preprocessing(name):
    image = photos(3, 32, 32)
    found = jax.device_get(jax.jit(task_of(name).inputs)({"image": image}))
    values, gray, truth = stage(name, image)
    if name == "coltran_colorizer":
        expected = (gray, truth)
    else:
        expected = (values, gray, np.tile([0, 1, 2], (3, 1)))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == np.int32


@pytest.mark.parametrize("size", [(32, 47), (50, 32), (32, 32)])
def test_other_shapes_give_the_square_in_the_middle(size):
    image, task = photos(2, *size), task_of("coltran_colorizer")
    top, left = ((side - 32) // 2 for side in size)
    square = image[:, top : top + 32, left : left + 32]
    for one, other in zip(task.inputs({"image": image}), task.inputs({"image": square}), strict=True):
        np.testing.assert_array_equal(one, other)


def test_models_that_are_not_square_get_the_window_of_their_shape():
    task = task_of("coltran_colorizer", image_size=[4, 8], photo_size=[8, 16])
    image = photos(1, 32, 40)
    gray, symbols = task.inputs({"image": image})
    assert gray.shape == symbols.shape == (1, 4, 8)
    np.testing.assert_array_equal(gray, task.inputs({"image": image[:, 6:26]})[0])
    with pytest.raises(UserError, match="same proportions"):
        task_of("coltran_colorizer", image_size=[4, 8])


def test_the_colorizers_loss_in_bits_per_pixel():
    task, image = task_of("coltran_colorizer"), photos()
    *_, symbols = stage("coltran_colorizer", image)
    heads = noise((2, 3, 8, 8, 512))
    terms = jax.jit(task.loss)(SymbolOutput(*heads), {"image": image})
    assert {name: term.coefficient for name, term in terms.items()} == {"autoregressive": 0.99, "parallel": 0.01}
    for term, logits in zip(terms.values(), heads, strict=True):
        assert float(term.sum / term.weight) == pytest.approx(bits_of(logits, symbols).mean(), rel=1e-6)
        assert float(term.weight) == symbols.size
    uniform = task.loss(SymbolOutput(*jnp.zeros(heads.shape)), {"image": image})
    assert all(float(term.sum / term.weight) == pytest.approx(9) for term in uniform.values())


@pytest.mark.parametrize("name", UPSAMPLERS)
def test_the_upsamplers_loss_in_bits_per_sub_pixel_of_one_random_channel(name):
    task, batch = task_of(name), {"image": photos(5), "seed": seeds(5)}
    values, gray, truth = stage(name, batch["image"])
    found_values, found_gray, channels = jax.device_get(jax.jit(task.inputs)(batch))
    rows = np.arange(5)[:, None]
    np.testing.assert_array_equal(channels[:, 0], random_channels(batch["seed"]))
    np.testing.assert_array_equal(found_values, values[rows, channels])
    np.testing.assert_array_equal(found_gray, gray)
    logits = noise((5, 1, 8, 8, 256))
    (term,) = jax.jit(task.loss)(ChannelOutput(logits), batch).values()
    assert float(term.sum / term.weight) == pytest.approx(bits_of(logits, truth[rows, channels]).mean(), rel=1e-6)
    # Without seeds all three channels are learned from.
    logits = noise((5, 3, 8, 8, 256))
    (term,) = jax.jit(task.loss)(ChannelOutput(logits), {"image": batch["image"]}).values()
    assert float(term.sum / term.weight) == pytest.approx(bits_of(logits, truth).mean(), rel=1e-6)


def test_channels_are_drawn_from_the_seed_of_each_example_alone_and_evenly():
    many = seeds(6000)
    channels = np.asarray(random_channels(many))
    assert np.abs(np.bincount(channels, minlength=3) / 6000 - 1 / 3).max() < 0.02
    np.testing.assert_array_equal(random_channels(many[::-1][:100]), channels[::-1][:100])
    assert (np.asarray(random_channels(seeds(6000, 1))) != channels).mean() > 0.6


@pytest.mark.parametrize("name", SIZES)
def test_microbatches_add_up_and_padding_counts_nothing(name):
    task, image = task_of(name), photos(4)
    batch = {"image": image, "seed": seeds(4), "size": np.array([[16, 16], [9, 16], [16, 7], [5, 3]], np.int32)}
    shape = (4, 8, 8, 512) if name == "coltran_colorizer" else (4, 1, 8, 8, 256)
    output = SymbolOutput(noise(shape), noise(shape, 2)) if len(shape) == 4 else ChannelOutput(noise(shape))

    def terms(rows, batch=batch):
        part = jax.tree.map(lambda x: x[rows], (output, batch))
        return task.loss(*part)

    whole, parts = terms(slice(0, 4)), [terms(slice(0, 1)), terms(slice(1, 4))]
    for key, term in whole.items():
        assert float(term.weight) == 64 + 4 * 8 + 8 * 3 + 2 * 1  # fitted pixels that see no padding
        assert float(term.weight) == sum(float(part[key].weight) for part in parts)
        assert float(term.sum) == pytest.approx(sum(float(part[key].sum) for part in parts), rel=1e-6)
    # What lies in the padding has no effect on the loss itself.
    dirty = image.copy()
    dirty[1, 10:] = 255 - dirty[1, 10:]
    if name == "coltran_colorizer":
        for key, term in terms(slice(0, 4), {**batch, "image": dirty}).items():
            assert float(term.sum) == float(whole[key].sum)


@pytest.mark.parametrize("name", SIZES)
def test_decoding_gives_bits_pictures_and_truth(name):
    task, image = task_of(name), photos(2, 40, 32)
    _, gray, truth = stage(name, image[:, 4:36])
    seen = []
    if name == "coltran_colorizer":
        heads = noise((2, 2, 8, 8, 512))

        def forward(*inputs):
            seen.append(inputs)
            return SymbolOutput(*jnp.asarray(heads))

        answer = jax.device_get(task.decode(forward, {"image": image}))
        for head, which in zip(heads, ("autoregressive", "parallel"), strict=True):
            np.testing.assert_allclose(answer[f"{which}_bits"], bits_of(head, truth), rtol=1e-5, atol=1e-5)
        best = heads[1].argmax(-1)

        def coarse(symbols):
            return 32 * np.stack([symbols // 64, symbols // 8 % 8, symbols % 8], -1)

        np.testing.assert_array_equal(answer["image"], coarse(best))
        np.testing.assert_array_equal(answer["truth"], coarse(truth))
        sampled = task.decode(forward, {"image": image}, sampler=lambda gray: gray + 200)
        np.testing.assert_array_equal(sampled["image"], coarse(gray + 200))
        np.testing.assert_array_equal(sampled["autoregressive_bits"], answer["autoregressive_bits"])
    else:
        logits = noise((2, 3, 8, 8, 256))

        def forward(*inputs):
            seen.append(inputs)
            return ChannelOutput(jnp.asarray(logits))

        answer = jax.device_get(task.decode(forward, {"image": image}))
        np.testing.assert_allclose(answer["bits"], bits_of(logits, truth), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(answer["image"], np.moveaxis(logits.argmax(-1), 1, -1))
        np.testing.assert_array_equal(answer["truth"], np.moveaxis(truth, 1, -1))
        # The stage before answers in 8-bit values; those of the truth give the same again.
        size = task.coarse_size[0]
        before = blocks(answer["truth"], size)
        again = jax.device_get(task.decode(forward, {"image": image}, coarse=before))
        for key, value in answer.items():
            np.testing.assert_array_equal(again[key], value)
    np.testing.assert_array_equal(answer["gray"], gray)
    assert answer["image"].dtype == answer["truth"].dtype == np.uint8
    # Host and device arrays, and arrays with room, give the same model inputs.
    roomy = np.pad(image, ((0, 0), (0, 8), (0, 16), (0, 0)))
    for batch in ({"image": jnp.asarray(image)}, {"image": jnp.asarray(roomy), "size": (40, 32)}):
        task.decode(forward, batch)
        for one, other in zip(seen[0], seen[-1], strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", SIZES)
def test_numbers_baselines_sheet_and_files(name, tmp_path):
    task, image = task_of(name), photos(3, 24, 20)
    shape = (3, 8, 8, 512) if name == "coltran_colorizer" else (3, 3, 8, 8, 256)
    output = SymbolOutput(noise(shape), noise(shape, 2)) if len(shape) == 4 else ChannelOutput(noise(shape))
    answer = jax.device_get(task.decode(lambda *_: jax.tree.map(jnp.asarray, output), {"image": image}))
    metrics = task.metrics()
    batch = {"image": image, "mask": np.array([True, False, True])}
    measured = jax.device_get(jax.jit(task.measure)(answer, batch))
    states = {key: metric.merge(metric.empty(), measured[key]) for key, metric in metrics.items()}
    results = {key: metric.compute(states[key]) for key, metric in metrics.items()}
    summary, baselines = task.summary(results), task.baselines(results)
    key = "autoregressive_bits" if name == "coltran_colorizer" else "bits"
    assert next(iter(summary)) == "bits" and summary["bits"] == pytest.approx(answer[key][[0, 2]].mean(), abs=1e-4)
    assert all(numbers.keys() == summary.keys() for numbers in baselines.values())
    uniform = {"coltran_colorizer": 9, "coltran_color_upsampler": 5, "coltran_spatial_upsampler": 8}[name]
    assert next(iter(baselines.values()))["bits"] == uniform
    last = list(baselines.values())[-1]
    assert np.isnan(last["bits"]) and last["PSNR"] > 0
    if name == "coltran_colorizer":
        assert last["colorfulness"] == 0
    json.dumps([results, task.protocol()], allow_nan=False)
    assert task.charts(results) == {} and not task.percent
    examples = [
        {"image": image[i], "name": f"p{i}", **{f"predicted_{k}": v[i] for k, v in answer.items()}} for i in (0, 1)
    ]
    assert task.sheet(examples).width > 3 * 256
    paths = task.write(image[0], {k: v[0] for k, v in answer.items()}, tmp_path, "a", task.protocol())
    assert [path.name for path in paths] == list(task.file_names("a"))
    np.testing.assert_array_equal(np.asarray(Image.open(paths[0])), answer["image"][0])
    report = json.loads(paths[1].read_text())
    assert report["input_size"] == [24, 20] and report["input"].startswith("color")


@pytest.mark.parametrize("name", SIZES)
def test_bits_of_one_batch_fall(name):
    task, model = task_of(name), model_of(name)
    batch = {"image": photos(2), "seed": seeds(2)}
    params = model.init(jax.random.key(0), *task.inputs(batch))["params"]
    # The update that trained the published weights, at a higher rate.
    optimizer = optax.chain(optax.scale_by_rms(0.9, RMSPROP_EPSILON, eps_in_sqrt=False), optax.scale(-3e-3))

    def objective(params):
        terms = task.loss(model.apply({"params": params}, *task.inputs(batch), train=True), batch)
        return sum(term.coefficient * term.sum / term.weight for term in terms.values())

    @jax.jit
    def step(params, state):
        loss, gradient = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for _ in range(30):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    first = 9 if name == "coltran_colorizer" else 8
    assert losses[0] == pytest.approx(first, abs=0.7) and losses[-1] < losses[0] - 1.5


@pytest.mark.parametrize("name", SIZES)
def test_the_work_of_training_is_that_of_what_the_model_sees(name):
    task, entry = create_task(name, INFO), find_model(name)
    model = create_model(name)
    macs = task.training_macs(lambda size: entry.macs(model, size))
    # Forward FLOPs of the original: 331 G; 0.34 T and 4.6 T for three channels. Its upsamplers project embeddings for
    # every pixel, ours in two tables.
    projection = 2 * 1024 * 512 * (64 * 64 if "color" in name else 256 * 256)
    original = {"coltran_colorizer": 331e9, "coltran_color_upsampler": 113e9, "coltran_spatial_upsampler": 1.53e12}
    expected = original[name] - (projection if name in UPSAMPLERS else 0)
    assert 2 * macs == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("coltran_colorizer", {"image_size": 0}, "image_size"),
        ("coltran_colorizer", {"parallel_weight": -1.0}, "negative"),
        ("coltran_color_upsampler", {"bits": 9}, "1 to 8"),
        ("coltran_spatial_upsampler", {"coarse_size": [4, 8]}, "same proportions"),
        ("coltran_spatial_upsampler", {"coarse": 4}, "did you mean 'coarse_size'"),
    ],
)
def test_wrong_options_are_named(name, options, message):
    with pytest.raises(UserError, match=message):
        task_of(name, **options)


def test_small_pictures_and_models_without_the_second_head_are_refused():
    task = task_of("coltran_colorizer")
    with pytest.raises(UserError, match="7 x 20 are smaller.*largest_crop"):
        task.decode(None, {"image": photos(1, 7, 20)})
    with pytest.raises(UserError, match="parallel_head"):
        task.loss(SymbolOutput(jnp.zeros((1, 8, 8, 512))), {"image": photos(1)})
