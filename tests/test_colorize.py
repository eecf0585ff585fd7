"""The command colorize on photographs of all kinds, with tiny models of all three stages."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2lab
from untrained import save_untrained

from jax_densevit import colorize
from jax_densevit.configuration import read_config
from jax_densevit.data.images import read_image
from jax_densevit.errors import UserError
from jax_densevit.experiment import load
from jax_densevit.layers.bits import convert_bits, from_symbols
from jax_densevit.metrics.image import colorfulness
from jax_densevit.models.coltran.sampling import picture_keys, sample_colors
from jax_densevit.tasks.coltran_pipeline import paint

CONFIGS = Path(__file__).parent.parent / "configs/coltran"
WIDTH = {"hidden_size": 8, "mlp_size": 8, "num_heads": 2}
SIZES = {
    "colorizer": {"image_size": (4, 4)},
    "color_upsampler": {"image_size": (4, 4), "coarse_size": (4, 4)},
    "spatial_upsampler": {"image_size": (8, 8), "coarse_size": (4, 4)},
}


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """An untrained checkpoint of every stage, by name."""
    folder = tmp_path_factory.mktemp("stages")
    Image.fromarray(smooth(20, 20)).save(folder / "photo.png")

    def save(name, workdir, **sizes):
        sizes = {**SIZES[name], **sizes}
        config = read_config(f"{CONFIGS / name}.py:photos,quick")
        config.model.update(**WIDTH, image_size=sizes["image_size"])
        config.task.update(photo_size=(16, 16), **sizes)
        config.data.train.update(root=str(folder), split="")
        config.data.crop = (16, 16)
        config.batch_size = 8
        config.eval, config.checkpoint.best = type(config.eval)(), ""
        return save_untrained(config, folder / workdir)

    made = {name: save(name, name) for name in SIZES}
    return {**made, "other size": save("spatial_upsampler", "other", image_size=(16, 16), coarse_size=(8, 8))}


def smooth(height, width, seed=0):
    """A picture with shapes of every lightness, uint8."""
    few = np.random.default_rng(seed).integers(0, 256, (3, 4, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A large gray JPEG, 16-bit gray, CMYK, a turned photo of a phone in a sub-folder, and what is no photo."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "album").mkdir()
    Image.fromarray(smooth(2000, 3000)[..., 0]).save(folder / "large.jpg")
    Image.fromarray(smooth(31, 45)[..., 1].astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.fromarray(smooth(40, 33, 1)).convert("CMYK").save(folder / "cmyk.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(smooth(24, 60, 2)).save(folder / "album/turned.jpg", exif=turned)
    (folder / "broken.jpg").write_bytes(b"<html>")
    return folder


def options(workdirs, given, output, *more, stages=tuple(SIZES)):
    chain = [f"--{name}={workdirs[name]}" for name in stages]
    return [*chain, f"--input={given}", f"--output={output}", *more]


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def colored(workdirs, photos, tmp_path_factory):
    """The folder of photos colored: (output folder, exit code)."""
    output = tmp_path_factory.mktemp("colored") / "out"
    more = ("--num_samples=2", "--seed=5", "--raw", f"--sheet={output / 'sheet.png'}", "--batch_size=3")
    return output, colorize.main(options(workdirs, photos, output, *more))


def test_photos_of_all_kinds_come_out_upright_at_their_own_size(photos, colored):
    output, code = colored
    assert code == colorize.SOME_SKIPPED
    sizes = {"large": (2000, 3000), "sixteen": (31, 45), "cmyk": (40, 33), "album/turned": (60, 24)}
    ends = ("_1.png", "_2.png", "_1_raw.png", "_2_raw.png", ".json")
    assert files(output) == sorted([f"{name}{end}" for name in sizes for end in ends] + ["sheet.png"])
    for name, size in sizes.items():
        told = json.loads((output / f"{name}.json").read_text())
        given = read_image(photos / told["image"])
        assert told["input"] == ("gray" if name in ("large", "sixteen") else "color, made gray first")
        assert (told["height"], told["width"]) == size and told["seed"] == 5
        assert told["stages"]["spatial_upsampler"]["workdir"].endswith("spatial_upsampler")
        some = (slice(None, None, 1 + size[0] // 50), slice(None, None, 1 + size[1] // 50))
        lightness = rgb2lab(given[some])[..., 0]
        for i, sample in enumerate(told["samples"]):
            picture = pixels(output / Path(name).with_name(sample["file"]))
            assert picture.shape == (*size, 3)
            assert np.abs(rgb2lab(picture[some])[..., 0] - lightness).max() < 1  # 8 bits cannot say it better
            assert sample["colorfulness"] == colorfulness(picture) > 1
            assert sample["passes_per_row"] == 4
            assert pixels(output / f"{name}_{i + 1}_raw.png").shape == (8, 8, 3)
    assert not np.array_equal(pixels(output / "cmyk_1.png"), pixels(output / "cmyk_2.png"))
    assert pixels(output / "sheet.png").shape[1] > 4 * 256  # gray, two samples, truth


def test_says_what_was_gray(workdirs, photos, tmp_path, capsys):
    one = [photos / "sixteen.png", tmp_path / "out", "--num_samples=1"]
    assert colorize.main(options(workdirs, *one)) == 0
    assert "1 of 1 photos colored (1 gray ones, 0 in color made gray first)" in capsys.readouterr().out
    assert files(tmp_path / "out") == ["sixteen.json", "sixteen.png"]
    with pytest.raises(UserError, match=r"sixteen.png and 1 more files are already there.*--overwrite"):
        colorize.main(options(workdirs, *one))
    before = pixels(tmp_path / "out/sixteen.png")
    assert colorize.main(options(workdirs, *one, "--overwrite", "--seed=1")) == 0
    assert not np.array_equal(pixels(tmp_path / "out/sixteen.png"), before)


def test_a_photo_does_not_depend_on_the_others(workdirs, photos, colored, tmp_path):
    """Alone, or in another folder and batch: the same pixels."""
    for name in ("cmyk.jpg", "sixteen.png", "album/turned.jpg"):
        (tmp_path / "mixed/deeper").mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / name, tmp_path / "mixed/deeper")
    more = ("--num_samples=2", "--seed=5")
    colorize.main(options(workdirs, photos / "album/turned.jpg", tmp_path / "alone", *more))
    colorize.main(options(workdirs, tmp_path / "mixed", tmp_path / "batch", *more, "--method=jacobi"))
    for i in (1, 2):
        expected = pixels(colored[0] / f"album/turned_{i}.png")
        np.testing.assert_array_equal(pixels(tmp_path / f"alone/turned_{i}.png"), expected)
        np.testing.assert_array_equal(pixels(tmp_path / f"batch/deeper/turned_{i}.png"), expected)


def test_the_chain_is_that_of_the_tasks(workdirs, photos, colored):
    """The colorizer's sampler, then the tasks of the upsamplers with what came before as their coarse picture."""
    image = read_image(photos / "cmyk.jpg")
    first, color, spatial = (load(workdirs[name]) for name in SIZES)
    squeezed = _squeeze(image, (16, 16))[None]
    gray, _ = first.task.inputs({"image": squeezed})
    keys = picture_keys(5, np.array([colorize.example_id(Path("elsewhere/cmyk.jpg"))]), 2)
    drawn = jax.jit(lambda p: sample_colors(first.model, p, gray, keys))(first.variables["params"]).symbols
    for i in (0, 1):
        coarse = np.asarray(convert_bits(from_symbols(drawn[0, i]), 3, 8))[None]
        fine = color.task.decode(color.forward, {"image": squeezed}, coarse=coarse)["image"]
        picture = spatial.task.decode(spatial.forward, {"image": squeezed}, coarse=fine)["image"][0]
        np.testing.assert_array_equal(pixels(colored[0] / f"cmyk_{i + 1}_raw.png"), picture)
        np.testing.assert_array_equal(pixels(colored[0] / f"cmyk_{i + 1}.png"), paint(image, np.asarray(picture)))


def _squeeze(image, size):
    """Means over areas, halves to even, by repeating pixels to a common multiple."""
    fine = image.repeat(size[0], 0).repeat(size[1], 1).astype(np.float64)
    blocks = fine.reshape(size[0], image.shape[0], size[1], image.shape[1], 3)
    return np.round(blocks.mean((1, 3))).astype(np.uint8)


def test_fewer_stages(workdirs, photos, tmp_path):
    """A colorizer alone colors with the middles of its bins, at its own few pixels."""
    given = (photos / "album/turned.jpg", tmp_path, "--raw", "--temperature=0", "--overwrite")
    colorize.main(options(workdirs, *given, stages=("colorizer",)))
    assert set(files(tmp_path)) == {"turned.png", "turned.json", "turned_raw.png"}  # no chance, one sample
    raw = pixels(tmp_path / "turned_raw.png")
    assert raw.shape == (4, 4, 3) and set(np.unique(raw % 32)) == {16}
    assert json.loads((tmp_path / "turned.json").read_text())["chroma"] == "of the colorizer, 4 x 4 pixels"
    colorize.main(options(workdirs, *given, stages=("colorizer", "color_upsampler")))
    assert set(np.unique(pixels(tmp_path / "turned_raw.png") % 32)) != {16}
    # Only the middle: a square of the 60 x 24 photo.
    colorize.main(options(workdirs, *given, "--crop", "--method=parallel", stages=("colorizer",)))
    picture, given = pixels(tmp_path / "turned.png"), read_image(photos / "album/turned.jpg")[18:42]
    assert picture.shape == (24, 24, 3)
    assert np.abs(rgb2lab(picture)[..., 0] - rgb2lab(given)[..., 0]).max() < 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"color_upsampler": "spatial_upsampler"}, "'coltran_spatial_upsampler', but --color_upsampler needs one for"),
        ({"color_upsampler": None}, "goes on from the color upsampler's pictures"),
        ({"spatial_upsampler": "other size"}, "starts from pictures of 8 x 8, but the stage before it makes 4 x 4"),
        ({"colorizer": "nowhere"}, "no checkpoint"),
    ],
)
def test_wrong_workdirs_are_refused_before_anything_is_written(workdirs, photos, tmp_path, change, message):
    chosen = {name: change.get(name, name) for name in SIZES}
    places = {**workdirs, "nowhere": tmp_path}
    chain = [f"--{name}={places[place]}" for name, place in chosen.items() if place is not None]
    with pytest.raises(UserError, match=message) as error:
        colorize.main([*chain, f"--input={photos}", f"--output={tmp_path / 'out'}"])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_samples=0"], "at least 1"),
        (["--sheet=x.gif"], "PNG or JPEG"),
        (["--temperature=-1"], "negative"),
        (["--top_k=600"], "1..512"),
    ],
)
def test_wrong_numbers_are_refused(workdirs, photos, tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        given = (photos / "cmyk.jpg", tmp_path / "out", *more)
        colorize.main(options(workdirs, *given, stages=("colorizer",)))
    assert not (tmp_path / "out").exists()


def test_no_photo_is_lost_and_no_output_is_colored_again(workdirs, photos, tmp_path):
    (tmp_path / "one").mkdir()
    photo = shutil.copy(photos / "sixteen.png", tmp_path / "one/a.png")
    for given, output, more, cause in (
        (tmp_path / "one", tmp_path / "one/colored", (), "lies in the input"),
        (photo, tmp_path / "one", ("--num_samples=1", "--overwrite"), "would overwrite the image"),
        (photo, tmp_path / "out", (f"--sheet={photo}", "--overwrite"), "would overwrite the image"),
    ):
        with pytest.raises(UserError, match=cause):
            colorize.main(options(workdirs, given, output, *more, stages=("colorizer",)))
    assert files(tmp_path) == ["one/a.png"]


def test_nothing_is_half_written(workdirs, photos, tmp_path):
    """A sample that cannot be written leaves those before it whole, no part of itself, and no JSON."""
    (tmp_path / "cmyk_2.png").mkdir()
    with pytest.raises(UserError, match=r"cmyk_2.png cannot be written"):
        given = (photos / "cmyk.jpg", tmp_path, "--overwrite", "--num_samples=2")
        colorize.main(options(workdirs, *given, stages=("colorizer",)))
    assert files(tmp_path) == ["cmyk_1.png"]
    pixels(tmp_path / "cmyk_1.png")


@pytest.mark.parametrize("size", [(50, 41), (5, 7), (3, 30), (1, 1)])
def test_painting_keeps_lightness_and_stretches_chroma(size):
    image = smooth(*size)
    for color in ((128, 128, 128), (150, 120, 110)):
        flat = np.full((8, 8, 3), color, np.uint8)
        painted = paint(image, flat)
        assert painted.shape == (*size, 3) and painted.dtype == np.uint8
        found, expected = rgb2lab(painted), rgb2lab(np.array(color, np.uint8)[None, None])[0, 0]
        assert np.abs(found[..., 0] - rgb2lab(image)[..., 0]).max() < 1
        middling = (found[..., 0] > 30) & (found[..., 0] < 80)  # where sRGB has this chroma
        assert np.abs(found[middling][:, 1:] - expected[1:]).max(initial=0) < 2
    gray = image[..., :1].repeat(3, -1)
    np.testing.assert_array_equal(paint(gray, np.full((8, 8, 3), 77, np.uint8)), gray)
    # Columns of color stay where they are.
    halves = np.full((2, 8, 3), (180, 120, 110), np.uint8)
    halves[:, 4:] = (110, 120, 180)
    if size[1] > 3:
        sides = rgb2lab(paint(np.full((*size, 3), 128, np.uint8), halves))
        assert (sides[:, 0, 2] > 5).all() and (sides[:, -1, 2] < -5).all()
