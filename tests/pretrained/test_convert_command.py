"""`convert` and `load`: from a published file to a workdir that the other commands take, whole or not at all."""

import hashlib
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from torch_writer import write_zip

import jax_densevit
from jax_densevit import convert, evaluate, predict
from jax_densevit.configuration import read_config
from jax_densevit.errors import UserError
from jax_densevit.experiment import build
from jax_densevit.models import create_model
from jax_densevit.pretrained import restore_names
from jax_densevit.training.checkpoint import Checkpoints
from jax_densevit.training.initial import take_over
from jax_densevit.training.state import TrainState, initial_variables

CONFIG = """
from jax_densevit.configuration import ConfigDict, default_config, default_evaluator

def get_config(arg=""):
    config = default_config()
    config.model = ConfigDict({"name": "unet", "base": 2})
    if arg == "absent":  # a public set that is not on this machine
        config.data.train = ConfigDict({"name": "cityscapes", "root": "no/such/folder", "split": "train"})
    elif arg == "prepared":
        config.data.train = ConfigDict({"name": "arrays", "folder": "nowhere"})
    else:
        scenes = {"name": "digit_scenes", "length": 3, "size": (32, 32), "digits": (1, 2), "scale": (10, 16)}
        config.data.train = ConfigDict({**scenes, "split": "train"})
        config.eval.val = default_evaluator()
        config.eval.val.data = ConfigDict({**scenes, "split": "val"})
    config.data.crop = (32, 32)
    config.update({"steps": 1, "ema": 0.9})
    return config
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    return str(tmp_path / "config.py")


def unet(classes=11):
    """(model, variables of noise, the same under the names of U-Net's repository)."""
    model = create_model("unet", base=2, num_classes=classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.1, 0.3, leaf.shape).astype(np.float32), shapes)
    return model, variables, restore_names(variables, "unet", model)


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_workdir_that_the_commands_take(config, tmp_path, capsys):
    model, variables, names = unet()
    weights = write_zip(tmp_path / "unet.pth", {"state_dict": names, "epoch": 2})
    workdir = tmp_path / "run"
    arguments = ["--source=unet", f"--weights={weights}", f"--config={config}", f"--workdir={workdir}"]
    assert convert.main(arguments) == 0
    printed = capsys.readouterr().out
    count = len(jax.tree.leaves(variables))
    assert f"unet: {count} arrays loaded." in printed and "mean (0.0, 0.0, 0.0)" in printed
    origin = Checkpoints(workdir, read_only=True).read_meta(0)["origin"]
    assert origin["source"] == "unet" and origin["weights"] == str(weights)
    assert origin["sha256"] == {"unet.pth": hashlib.sha256(weights.read_bytes()).hexdigest()}

    assert evaluate.main(["--workdir", str(workdir)]) == 0
    assert json.loads((workdir / "eval/val-0.json").read_text())["examples"] == 3
    picture = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 48, 3), np.uint8)).save(picture)
    assert predict.main(["--workdir", str(workdir), "--input", str(picture), "--output", str(tmp_path / "out")]) == 0
    loaded = jax_densevit.load(workdir)
    assert loaded.info.classes[1] == "0" and loaded.info.std == (1.0, 1.0, 1.0)  # as U-Net's files were trained
    image = np.asarray(Image.open(picture))[None]
    (inputs,) = loaded.inputs(image)
    np.testing.assert_allclose(inputs, image / 255, atol=1e-6)
    want = model.apply(variables, inputs).logits
    np.testing.assert_array_equal(loaded.forward(inputs).logits, jax.jit(model.apply)(variables, inputs).logits)
    np.testing.assert_allclose(loaded.forward(inputs).logits, want, rtol=1e-5, atol=1e-5)

    # The same from the file, with a config and with a model alone.
    for options in ({"config": config}, {"model": "unet", "base": 2, "num_classes": 11}):
        again = jax_densevit.load(weights, source="unet", **options)
        jax.tree.map(np.testing.assert_array_equal, again.variables, loaded.variables)
        np.testing.assert_array_equal(again.inputs(image)[0], inputs)
    assert again.task is None and again.config is None


def test_other_classes_and_fine_tuning(config, tmp_path, capsys):
    """The head stays behind and is drawn anew; the rest starts a training with `config.init`."""
    _, variables, names = unet(classes=4)
    weights, workdir = write_zip(tmp_path / "unet.pth", names), tmp_path / "run"
    arguments = ["--source=unet", f"--weights={weights}", f"--config={config}", f"--workdir={workdir}"]
    with pytest.raises(UserError, match=r"2 of another shape \(outc\.conv\.bias is float32\[4\], not \[11\]"):
        convert.main(arguments)
    assert not workdir.exists()
    assert convert.main([*arguments, "--leave_out=^head/"]) == 0
    assert "2 left out (head/bias, head/kernel)" in capsys.readouterr().out
    # It will be trained: normalised as the data says, not as the file's models saw it.
    assert jax_densevit.load(workdir).info.mean == (0.5, 0.5, 0.5)
    experiment = build(read_config(config))
    batch = {"image": np.zeros((1, 32, 32, 3), np.uint8)}
    state = TrainState(0, *initial_variables(experiment.model, experiment.task, batch, jax.random.key(7)), None, {})
    state, sentence = take_over(state, workdir)
    assert "0 left at their initial values" in sentence
    kernel = state.params["encoder_0"]["first"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel, variables["params"]["encoder_0"]["first"]["conv"]["kernel"])


def test_data_that_is_not_here(config, tmp_path, capsys):
    """Classes and palette of public sets are known without them."""
    weights = write_zip(tmp_path / "unet.pth", unet(classes=19)[2])
    start = ["--source=unet", f"--weights={weights}", f"--workdir={tmp_path / 'run'}"]
    flags = ["--mean=0.5", "--std=0.25,0.25,0.5", "--config.model.dtype=bfloat16"]
    assert convert.main([*start, f"--config={config}:absent", *flags]) == 0
    loaded = jax_densevit.load(tmp_path / "run", decode={"flip": True})
    assert loaded.info.classes[:2] == ("road", "sidewalk") and loaded.task.flip
    assert (loaded.info.mean, loaded.info.std) == ((0.5,) * 3, (0.25, 0.25, 0.5))
    assert loaded.model.dtype == jax.numpy.bfloat16
    with pytest.raises(UserError, match="says config.data.train, and it cannot: nowhere is not a prepared folder"):
        convert.main([*start[:2], f"--workdir={tmp_path / 'other'}", f"--config={config}:prepared"])


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


def test_nothing_is_written_unless_all_is_well(config, tmp_path):
    """One tensor missing, one extra, another variant, hostile and damaged files: a sentence, and no trace."""
    import pickle

    _, _, names = unet()
    first, last = list(names)[0], list(names)[-1]
    folder = tmp_path / "files"
    folder.mkdir()
    good = write_zip(folder / "good.pth", names)
    content = good.read_bytes()
    flipped = bytearray(content)
    flipped[content.index(names[last].tobytes())] ^= 8
    (folder / "flipped.pth").write_bytes(flipped)
    (folder / "cut.pth").write_bytes(content[: len(content) // 2])
    np.savez(folder / "objects.npz", a=np.array([Payload(tmp_path / "it-ran")], dtype=object))
    write_zip(folder / "code.pth", {}, data_pickle=pickle.dumps({"a": Payload(tmp_path / "it-ran")}, protocol=2))
    write_zip(folder / "up.pth", names, members={"../outside": b"x"})
    write_zip(folder / "lacking.pth", {name: array for name, array in names.items() if name != first})
    write_zip(folder / "extra.pth", names | {"surplus": np.zeros(3, np.float32)})
    write_zip(folder / "variant.pth", unet(classes=3)[2])
    before = files(tmp_path)
    for name, cause in (
        ("flipped.pth", "is damaged"),
        ("cut.pth", "is damaged"),
        ("objects.npz", "holds objects"),
        ("code.pth", "nothing of it was run"),
        ("up.pth", "leads out of its folder"),
        ("lacking.pth", rf"1 missing \(\S+ \(there {first}\)\)"),
        ("extra.pth", r"1 unexpected \(surplus\)"),
        ("variant.pth", r"2 of another shape \(outc\.conv\.bias"),
        ("absent.pth", "cannot be read"),
    ):
        arguments = ["--source=unet", f"--weights={folder / name}", f"--config={config}"]
        with pytest.raises(UserError, match=cause) as caught:
            convert.main([*arguments, f"--workdir={tmp_path / 'run'}"])
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
        with pytest.raises(UserError, match=cause):
            jax_densevit.load(folder / name, source="unet", config=config)
        assert files(tmp_path) == before
    arguments = [f"--weights={good}", f"--config={config}"]
    for more, cause in (
        (["--source=unett", f"--workdir={tmp_path / 'run'}"], "did you mean 'unet'"),
        (["--source=unet", f"--workdir={folder}"], "something in .* already"),
        (["--source=unet", f"--workdir={good}"], "is a file"),
        (["--source=unet", f"--workdir={tmp_path / 'run'}", "--std=0"], "std above 0"),
        (["--source=unet", f"--workdir={tmp_path / 'run'}", "--leave_out=heda"], "'heda' matches neither"),
    ):
        with pytest.raises(UserError, match=cause):
            convert.main([*arguments, *more])
        assert files(tmp_path) == before


def test_load_says_what_it_needs(config, tmp_path):
    weights = write_zip(tmp_path / "unet.pth", unet()[2])
    for options, cause in (
        ({}, "is a file: say its source"),
        ({"source": "unet"}, "either the config or the model"),
        ({"source": "unet", "config": config, "model": "unet"}, "either the config or the model"),
        ({"source": "unet", "config": config, "base": 2}, "base: options of the model belong into its config"),
        ({"source": "unet", "config": config, "step": 3}, "are for workdirs"),
    ):
        with pytest.raises(UserError, match=cause):
            jax_densevit.load(weights, **options)
    with pytest.raises(UserError, match="no checkpoint"):
        jax_densevit.load(tmp_path)
    with pytest.raises(UserError, match="are for weight files"):
        jax_densevit.load(tmp_path, model="unet")


def test_load_where_tensorflow_is_not_installed(config, tmp_path):
    weights = write_zip(tmp_path / "unet.pth", unet()[2])
    convert.main(["--source=unet", f"--weights={weights}", f"--config={config}", f"--workdir={tmp_path / 'run'}"])
    code = """
import sys
sys.modules["tensorflow"] = None  # as where it is not installed
import numpy as np
import jax_densevit

image = np.full((1, 32, 32, 3), 7, np.uint8)
for loaded in (
    jax_densevit.load(sys.argv[1]),
    jax_densevit.load(sys.argv[2], source="unet", config=sys.argv[3]),
    jax_densevit.load(sys.argv[2], source="unet", model="unet", base=2, num_classes=11),
):
    print(loaded.forward(*loaded.inputs(image)).logits.shape)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "run"), str(weights), config]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["(1, 32, 32, 11)"] * 3, done.stderr
