"""The commands evaluate and predict on a small trained-and-saved model, from nothing but its workdir."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from untrained import digit_unet, save_untrained

from jax_densevit import evaluate, predict
from jax_densevit.configuration import default_config, default_evaluator
from jax_densevit.data.images import read_image, stretch_contrast
from jax_densevit.errors import UserError
from jax_densevit.experiment import build, load


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A checkpoint of a tiny U-Net for digit scenes: parameters `3`, and their moving average at step 7."""
    config = digit_unet((32, 40), 5, batch_size=2, sheet=2)
    return save_untrained(config, tmp_path_factory.mktemp("run"))


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_evaluate_needs_the_workdir_alone(workdir, capsys):
    assert evaluate.main(["--workdir", str(workdir)]) == 0
    result = json.loads((workdir / "eval/val-7.json").read_text())
    assert result["examples"] == 5 and result["segmentation"]["pixels"] == 5 * 32 * 40
    assert result["protocol"]["mode"] == "whole" and result["versions"]["jax"] == jax.__version__
    assert len(result["segmentation"]["per_class"]) == 11
    printed = capsys.readouterr().out
    assert "mIoU" in printed and "background" in printed and "val-7_confusion.png" in printed
    for kind in ("sheet", "confusion"):
        with Image.open(workdir / f"eval/val-7_{kind}.png") as picture:
            assert picture.width > 300


def test_evaluate_with_other_data_and_decoding_keeps_its_own_file(workdir, capsys):
    arguments = ["--mode", "slide", "--crop", "16", "--flip", "--data.length=3", "--batch_size", "8", "--which=params"]
    assert evaluate.main(["--workdir", str(workdir), "--name", "val", *arguments]) == 0
    result = json.loads((workdir / "eval/val_mode=slide_crop=16_flip=True-7.json").read_text())
    assert result["examples"] == 3 and result["data"]["length"] == 3
    assert (result["protocol"]["mode"], result["protocol"]["crop"], result["protocol"]["flip"]) == (
        "slide",
        [16, 16],
        True,
    )
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--name", "vall"], "did you mean 'val'"),
        (["--flipp"], "did you mean 'flip'"),
        (["--data.lenght=3"], "did you mean 'length'"),
        (["--step", "8"], "no checkpoint of step 8"),
        (["stray"], "belongs to no option"),
    ],
)
def test_wrong_flags_of_evaluate_are_named(workdir, arguments, message):
    with pytest.raises(UserError, match=message):
        evaluate.main(["--workdir", str(workdir), *arguments])


def make_images(folder):
    """Images of all kinds, in sub-folders, with a file that only looks like one."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (40, 33, 3)).astype(np.uint8)
    (folder / "deeper").mkdir(parents=True)
    Image.fromarray(rgb).save(folder / "rgb.png")
    Image.fromarray(rgb[..., 0]).save(folder / "deeper/gray picture.PNG")
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(folder / "deeper/sixteen.png")
    Image.fromarray(rgb).convert("CMYK").save(folder / "cmyk.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(rgb).save(folder / "turned.jpg", exif=turned)
    Image.fromarray(rgb).quantize(16).save(folder / "rgb.gif")  # the stem of another file
    (folder / "broken.jpg").write_bytes(b"<html>not found</html>")
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")


def test_predict_a_folder(workdir, tmp_path, capsys):
    images, output = tmp_path / "images", tmp_path / "out"
    make_images(images)
    arguments = ["--workdir", str(workdir), "--input", str(images), "--output", str(output)]
    assert predict.main(arguments) == predict.SOME_SKIPPED
    printed = capsys.readouterr()
    assert "6 of 7 images predicted" in printed.out
    assert "broken.jpg" in printed.err and printed.err.count("skipped") == 1
    stems = ["cmyk", "deeper/gray picture", "deeper/sixteen", "rgb.gif", "rgb.png", "turned"]
    assert files(output) == sorted(f"{stem}{end}" for stem in stems for end in (".png", "_overlay.png", ".json"))
    report = json.loads((output / "turned.json").read_text())
    assert (report["height"], report["width"]) == (33, 40)  # as it is displayed
    assert report["step"] == 7 and report["image"] == "turned.jpg" and 0 < report["mean_confidence"] <= 1
    assert sum(row["share"] for row in report["classes"]) == pytest.approx(1)

    # The label map is what the loaded model says.
    loaded = load(workdir)
    with Image.open(images / "rgb.png") as image, Image.open(output / "rgb.png.png") as labels:
        expected = loaded.task.decode(loaded.forward, {"image": np.asarray(image)[None]})["labels"][0]
        np.testing.assert_array_equal(np.asarray(labels), expected)

    with pytest.raises(UserError, match="17 more files are already there"):
        predict.main(arguments)
    assert predict.main([*arguments, "--overwrite", "--mode=slide", "--crop=16"]) == predict.SOME_SKIPPED
    assert json.loads((output / "turned.json").read_text())["mode"] == "slide"


def test_predict_stretches_as_training_did_and_draws_the_picture_as_it_is(tmp_path, capsys):
    rng = np.random.default_rng(3)
    for split in ("train", "val"):
        for kind, values in (("images", rng.integers(3, 30, (32, 32, 3))), ("instances", np.eye(32) > 0)):
            (tmp_path / split / kind).mkdir(parents=True)
            Image.fromarray(values.astype(np.uint8)).save(tmp_path / split / kind / "dark.png")
    config = default_config()
    data = {"name": "instance_folder", "root": str(tmp_path), "stretch": (1.0, 99.0)}
    config.model.update({"name": "unet", "base": 2})
    config.data.train.update({**data, "split": "train"})
    config.update({"steps": 1, "batch_size": 8, "ema": 0.9})
    config.data.crop = (32, 32)
    evaluator = default_evaluator()
    evaluator.data.update({**data, "split": "val"})
    config.eval.val = evaluator
    save_untrained(config, tmp_path / "run")

    picture, output = tmp_path / "val/images/dark.png", tmp_path / "out"
    predict.main(["--workdir", str(tmp_path / "run"), "--input", str(picture), "--output", str(output)])
    loaded = load(tmp_path / "run")
    seen = stretch_contrast(read_image(picture), (1.0, 99.0))
    expected = loaded.task.decode(loaded.forward, {"image": seen[None]}, full=True)
    report = json.loads((output / "dark.json").read_text())
    assert report["stretch"] == [1.0, 99.0]
    assert report["mean_confidence"] == pytest.approx(float(expected["confidence"].mean()), abs=1e-4)

    evaluator.data.stretch = ()
    with pytest.raises(UserError, match="same stretch"):
        build(config)


def test_predict_refuses_what_would_do_harm(workdir, tmp_path, capsys):
    images = tmp_path / "images"
    make_images(images)
    start = ["--workdir", str(workdir), "--input"]
    for output in (images, images / "predictions"):
        with pytest.raises(UserError, match="lies in the input"):
            predict.main([*start, str(images), "--output", str(output)])
    with pytest.raises(UserError, match="would overwrite the image"):
        predict.main([*start, str(images / "rgb.png"), "--output", str(images), "--overwrite"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        predict.main([*start, str(images), "--output", str(tmp_path / "file")])
    with pytest.raises(UserError, match="no file or folder"):
        predict.main([*start, str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")])
    with pytest.raises(UserError, match="No image could be read"):
        predict.main([*start, str(images / "broken.jpg"), "--output", str(tmp_path / "out")])
    assert "web page" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no image"):
        predict.main([*start, str(tmp_path / "empty"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists() or files(tmp_path / "out") == []


def test_names_that_would_meet_keep_their_suffix(workdir):
    task = load(workdir).task
    names = [Path(name) for name in ("a/x.png", "a/X.jpg", "b/x.png", "c/y.png", "c/y_overlay.jpg", "c/z.png")]
    stems = predict.name_outputs({name: name for name in names}, task.file_names)
    assert [str(stem) for stem in stems.values()] == ["a/x.png", "a/X.jpg", "b/x", "c/y.png", "c/y_overlay.jpg", "c/z"]
    made = [stem.with_name(file) for stem in stems.values() for file in task.file_names(stem.name)]
    assert len({str(path).lower() for path in made}) == len(made) == 18


def test_no_weights_no_prediction(tmp_path):
    image = tmp_path / "a.png"
    Image.new("RGB", (32, 32)).save(image)
    command = [sys.executable, "-m", "jax_densevit.predict", "--workdir", str(tmp_path), "--input", str(image)]
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 1 and "no checkpoint" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
