"""Colorization from end to end on a tiny model: evaluation beside its baseline, and predict on files of all kinds."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from skimage.color import rgb2lab
from skimage.metrics import peak_signal_noise_ratio

from jax_densevit import evaluate, predict
from jax_densevit.configuration import default_config, default_evaluator
from jax_densevit.data.images import read_image
from jax_densevit.errors import UserError
from jax_densevit.experiment import build, load
from jax_densevit.training.checkpoint import Checkpoints
from jax_densevit.training.state import TrainState, initial_variables


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with photos of three sizes, and a gray one."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i, size in enumerate([(40, 50), (50, 40), (40, 50), (36, 36)]):
        coarse = Image.fromarray(rng.integers(30, 220, (3, 4, 3)).astype(np.uint8))
        coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    coarse.convert("L").convert("RGB").save(folder / "gray.png")
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, photos):
    """A checkpoint of a tiny untrained U-Net that colors photos."""
    config = default_config()
    config.model.update({"name": "unet", "base": 2})
    config.data.train.update({"name": "photo_folder", "root": str(photos)})
    config.task = type(config.task)({"name": "colorization"})
    config.update({"steps": 4, "batch_size": 8})
    config.data.crop = (32, 32)
    evaluator = default_evaluator()
    evaluator.data.update({"name": "photo_folder", "root": str(photos)})
    evaluator.update({"batch_size": 2, "sheet": 2})
    config.eval.val = evaluator
    config.checkpoint.best = "-val/L1"
    experiment = build(config)
    batch = {"image": np.zeros((1, 32, 32, 3), np.uint8)}
    params, statistics = initial_variables(experiment.model, experiment.task, batch, jax.random.key(0))
    folder = tmp_path_factory.mktemp("run")
    with Checkpoints(folder) as checkpoints:
        state = TrainState(np.int32(4), params, statistics, None, {"count": np.zeros((), np.int32)})
        checkpoints.save(4, state, {}, experiment.meta())
    return folder


def test_evaluation_says_what_gray_would_score(workdir, photos, capsys):
    assert evaluate.main(["--workdir", str(workdir)]) == 0
    result = json.loads((workdir / "eval/val-4.json").read_text())
    assert result["examples"] == 4 and result["protocol"]["gray"] == "bt601"
    images = [read_image(photos / f"{i}.png") for i in range(4)]
    grays = [np.round(image @ [0.299, 0.587, 0.114]).astype(np.uint8)[..., None].repeat(3, -1) for image in images]
    expected = np.mean([peak_signal_noise_ratio(*pair) for pair in zip(images, grays, strict=True)])
    assert result["baselines"]["all gray"]["PSNR"] == pytest.approx(expected, abs=1e-3)
    assert result["summary"]["PSNR"] == result["colorization"]["PSNR"] < expected  # the model knows nothing
    printed = capsys.readouterr().out
    assert "all gray" in printed and f"{expected:.4g}" in printed and "%" not in printed
    with Image.open(workdir / "eval/val-4_sheet.png") as sheet:
        assert sheet.width > 3 * 256


def test_evaluation_is_the_same_in_other_batches(workdir, capsys):
    scores = []
    for size in ("1", "4"):
        arguments = ["--workdir", str(workdir), "--batch_size", size, "--max_side", "32"]
        assert evaluate.main(arguments) == 0
        scores.append(json.loads((workdir / "eval/val_max_side=32-4.json").read_text())["all_gray"])
    capsys.readouterr()
    for name, value in scores[0].items():
        exact = name not in ("SSIM", "CIEDE2000")
        assert scores[1][name] == (value if exact else pytest.approx(value, abs=1e-5)), name


def make_files(folder):
    rng = np.random.default_rng(1)
    rgb = np.asarray(Image.fromarray(rng.integers(30, 220, (4, 3, 3)).astype(np.uint8)).resize((33, 41)))
    folder.mkdir()
    Image.fromarray(rgb).save(folder / "color.png")
    Image.fromarray(rgb[..., 0]).save(folder / "gray.png")
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
    Image.fromarray(rgb).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.dstack([rgb, rgb[..., :1]])).save(folder / "alpha.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rgb).save(folder / "turned.jpg", exif=turned)
    Image.fromarray(rgb[:1, :1]).save(folder / "one pixel.png")
    Image.fromarray(rgb).resize((640, 480)).save(folder / "large.jpg")
    (folder / "broken.jpg").write_bytes(b"<html>not found</html>")


def test_predict_colors_files_of_all_kinds_at_their_own_size(workdir, tmp_path, capsys):
    make_files(tmp_path / "in")
    arguments = ["--workdir", str(workdir), "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    assert predict.main([*arguments, "--max_side", "64", "--keep_luminance"]) == predict.SOME_SKIPPED
    printed = capsys.readouterr()
    assert "8 of 9 images predicted" in printed.out and "broken.jpg" in printed.err
    for path in sorted((tmp_path / "in").iterdir()):
        if path.stem == "broken":
            continue
        given, colored = read_image(path), np.asarray(Image.open(tmp_path / f"out/{path.stem}.png"))
        assert colored.shape == given.shape
        gray = np.round(given @ [0.299, 0.587, 0.114]).astype(np.uint8)[..., None].repeat(3, -1)
        assert np.abs(rgb2lab(colored)[..., 0] - rgb2lab(gray)[..., 0]).max() < 1, path
        report = json.loads((tmp_path / f"out/{path.stem}.json").read_text())
        assert (report["height"], report["width"]) == given.shape[:2] and report["step"] == 4
        assert report["input"].startswith("gray" if path.stem in ("gray", "sixteen") else "color, made")
        assert report["luminance"] == "CIELAB lightness of the gray input"
    assert json.loads((tmp_path / "out/large.json").read_text())["decoded_at"] == [64, 64]
    assert json.loads((tmp_path / "out/turned.json").read_text())["height"] == 33


def test_load_decodes_a_photo_in_three_lines(workdir):
    loaded = load(workdir, decode={"max_side": 32})
    answer = loaded.task.decode(loaded.forward, {"image": np.zeros((1, 70, 90, 3), np.uint8)})
    assert answer["image"].shape == (1, 70, 90, 3)
    with pytest.raises(UserError, match="did you mean 'max_side'"):
        load(workdir, decode={"max_size": 32})
