"""What `export` writes: weights under others' names bit for bit, programs that run where only JAX is."""

import functools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import jax_densevit
from jax_densevit import convert, export, program
from jax_densevit.data.source import DataInfo
from jax_densevit.errors import UserError
from jax_densevit.experiment import make_ready
from jax_densevit.models import create_model
from jax_densevit.models.registry import example_inputs
from jax_densevit.pretrained import read, restore_names
from jax_densevit.tasks import create_task

CONFIG = """
from jax_densevit.configuration import ConfigDict, default_config

def get_config(arg=""):
    config = default_config()
    sizes = {"hidden_size": 8, "num_layers": 4, "num_heads": 2, "mlp_size": 12, "head_channels": 4, "image_size": 32}
    config.model = ConfigDict({"name": "setr_naive", **sizes, "scan": True})
    config.data.train = ConfigDict({"name": "digit_scenes", "split": "train"})
    config.data.crop = (32, 32)
    config.steps = 1
    return config
"""
VIT = {"hidden_size": 8, "num_layers": 4, "num_heads": 2, "mlp_size": 12, "image_size": 32}
INFO = DataInfo("three", ("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)))
COLTRAN = {"image_size": (8, 8), "hidden_size": 8, "mlp_size": 12, "num_heads": 2, "num_layers": 1}
SYSTEMS = {
    "setr_pup": ("segmentation", {}, {**VIT, "head_channels": 4, "num_classes": 3}),
    "dpt": ("segmentation", {}, {**VIT, "reassemble": (2, 3, 4, 5), "features": 4, "num_classes": 3}),
    "uformer": ("colorization", {}, {"base": 2, "heads": (1,) * 9, "depths": (1,) * 9, "window": 2}),
    "coltran_color_upsampler": (
        "coltran_color_upsampler",
        {"image_size": (8, 8), "coarse_size": (8, 8), "photo_size": (8, 8)},
        COLTRAN,
    ),
}


@functools.cache
def ready(name):
    """A tiny model of noise, as if loaded."""
    task, task_options, options = SYSTEMS[name]
    model = create_model(name, **options)
    size = options.get("image_size", 32)
    inputs = example_inputs(model, (size, size) if isinstance(size, int) else size)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.1, 0.3, leaf.shape).astype(np.float32), shapes)
    return make_ready(model, variables, create_task(task, INFO, **task_options), INFO, None, 3)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A SETR that `convert` wrote, its weights drawn."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "config.py").write_text(CONFIG)
    model = create_model("setr_naive", **VIT, head_channels=4, num_classes=11)
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.uniform(0.1, 0.3, leaf.shape).astype(np.float32), variables)
    np.savez(folder / "setr.npz", **restore_names(variables, "setr", model))
    weights, config = f"--weights={folder / 'setr.npz'}", f"--config={folder / 'config.py'}"
    convert.main(["--source=setr", weights, config, f"--workdir={folder / 'run'}"])
    return folder / "run"


def test_weights_under_other_names(workdir, tmp_path, capsys):
    """The way back from `convert`: the same names, the same bits."""
    start = ["--workdir", str(workdir)]
    assert export.main([*start, "--format=setr", f"--output={tmp_path / 'setr.safetensors'}"]) == 0
    assert "in the names of 'setr'; read back, difference 0" in capsys.readouterr().out
    original, back = read(workdir.parent / "setr.npz"), read(tmp_path / "setr.safetensors")
    assert original.keys() == back.keys()
    for name, array in original.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    # The backbone as a plain ViT, for timm and as Google's file; both start another model.
    backbone = "--leave_out=^(?!backbone/)"
    assert export.main([*start, "--format=timm", f"--output={tmp_path / 'vit.safetensors'}", backbone]) == 0
    assert export.main([*start, "--format=npz", f"--output={tmp_path / 'vit.npz'}", backbone]) == 0
    want = jax_densevit.load(workdir).variables["params"]["backbone"]
    for file, source in (("vit.safetensors", "timm_vit"), ("vit.npz", "vit_npz")):
        options = {"source": source, "model": "vit", **VIT, "num_classes": 2, "scan": True}
        loaded = jax_densevit.load(tmp_path / file, leave_out=["^(head|norm)/"], **options)
        got = loaded.variables["params"]["backbone"]
        jax.tree.map(np.testing.assert_array_equal, got["tokens"], want["tokens"])
    with pytest.raises(UserError, match=r"have no name for \d+ arrays of this Setr \(auxiliary_head_0/"):
        export.main([*start, "--format=timm", f"--output={tmp_path / 'no.safetensors'}"])
    with pytest.raises(UserError, match="for UNet, not for Setr"):
        export.main([*start, "--format=unet", f"--output={tmp_path / 'no.safetensors'}"])
    with pytest.raises(UserError, match="did you mean 'setr'"):
        export.main([*start, "--format=set", f"--output={tmp_path / 'no.safetensors'}"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["setr.safetensors", "vit.npz", "vit.safetensors"]


def test_nothing_is_replaced_unasked(workdir, tmp_path, monkeypatch, capsys):
    """A file that is there, one of the files that go with it, a checkpoint's own folder, and a file for a folder."""
    (tmp_path / "a").write_text("mine")
    (tmp_path / "run_b.py").write_text("mine")
    start = [f"--workdir={workdir}", "--format=setr"]
    for output, more, cause in (
        (tmp_path / "a", "--format=setr", "a is already there; choose another --output, or say --overwrite"),
        (tmp_path / "b", "--format=stablehlo", r"run_b\.py is already there"),
        (workdir / "checkpoints/0/manifest.json", "--overwrite", "lies in the input .*checkpoints"),
        (tmp_path / "a/b", "--overwrite", "is a file; name a folder"),
    ):
        with pytest.raises(UserError, match=cause):
            export.main([*start, f"--output={output}", more])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "mine", "run_b.py": "mine"}
    assert export.main([*start, f"--output={tmp_path / 'a'}", "--overwrite"]) == 0
    assert len(read(tmp_path / "a")) == len(read(workdir.parent / "setr.npz"))
    # Back again: not into the weights themselves.
    arguments = ["--source=setr", f"--weights={workdir}", f"--config={workdir.parent / 'config.py'}"]
    with pytest.raises(UserError, match="lies in the weights"):
        convert.main([*arguments, f"--workdir={workdir / 'again'}"])
    assert not (workdir / "again").exists()


def test_what_was_not_written_as_it_should_be_gets_no_name(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "read", lambda path: {name: array + 1 for name, array in read(path).items()})
    with pytest.raises(UserError, match="did not come back as it was written"):
        export.main([f"--workdir={workdir}", "--format=setr", f"--output={tmp_path / 'a.safetensors'}"])
    monkeypatch.setattr(program, "run_stablehlo", lambda artifact, arrays: {"logits": np.zeros(3)})
    with pytest.raises(UserError, match="outputs differ from the model's"):
        export.main([f"--workdir={workdir}", "--format=stablehlo", f"--output={tmp_path / 'a'}", "--batch=1"])
    assert not list(tmp_path.iterdir())


ALONE = """
import runpy, sys
for name in ("jax_densevit", "flax", "orbax", "optax", "ml_collections", "tensorflow", "PIL"):
    sys.modules[name] = None  # as where they are not installed
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", SYSTEMS)
def test_programs_run_where_only_jax_is(name, tmp_path):
    """Another process, without this library: the answers of the live model, for any number of images."""
    loaded = ready(name)
    size = {"coltran_color_upsampler": (8, 8), "uformer": (32, 32)}.get(name, (32, 48))
    made = program.make_program(loaded, size)
    lines = export.export_program(loaded, made, "stablehlo", tmp_path / "a.stablehlo", 0, program.PLATFORMS)
    assert "difference from the model on noise" in lines[0]
    facts = json.loads((tmp_path / "a.stablehlo.json").read_text())
    assert facts["inputs"]["image"] == ["uint8", ["batch", *size, 3]] and facts["classes"]["2"] == "c"
    arrays = program.noise(made, 3)
    for key, array in arrays.items():
        np.save(tmp_path / f"{key}.npy", array)
    runner = tmp_path / "run_a.py"
    code = [line for line in runner.read_text().partition('"""\n\n')[2].splitlines() if line]
    assert len(code) <= 20
    given = [str(tmp_path / f"{key}.npy") for key in arrays]
    command = [sys.executable, "-c", ALONE, str(runner), *given, str(tmp_path / "answers.npz")]
    fast = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **fast})
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "answers.npz", allow_pickle=False) as answers:
        answers = dict(answers)
    # Against the model itself, called as everybody calls it.
    more = {"coarse": arrays["coarse"]} if "coarse" in arrays else {}
    want = loaded.task.decode(loaded.forward, {"image": arrays["image"]}, full=True, **more)
    assert set(answers) <= {*want, "logits"} and "image" in answers or "labels" in answers
    for key in answers.keys() & want.keys():
        np.testing.assert_allclose(answers[key], want[key], atol=1e-5, err_msg=key)
    if "logits" in answers and not more:
        logits = loaded.forward(*loaded.inputs(arrays["image"])).logits
        np.testing.assert_allclose(answers["logits"], logits, rtol=1e-5, atol=1e-5)


def test_fixed_batches_sliding_windows_and_a_model_alone():
    loaded = ready("setr_pup")
    made = program.make_program(loaded, (32, 32))
    arrays = program.noise(made, 2)
    got = program.run_stablehlo(program.stablehlo(made, 2, ("cpu",)), arrays)
    assert program.differences(made, got, program.live(made, arrays))[1]
    with pytest.raises(ValueError, match=r"shape|dimension"):
        program.run_stablehlo(program.stablehlo(made, 2, ("cpu",)), {"image": arrays["image"][:, :24]})
    task = create_task("segmentation", INFO, mode="slide", crop=32)
    sliding = make_ready(loaded.model, loaded.variables, task, INFO, None, 0)
    made = program.make_program(sliding, (32, 48))
    with pytest.raises(UserError, match="say --batch=1"):
        program.stablehlo(made, 0)
    arrays = program.noise(made, 1)
    got = program.run_stablehlo(program.stablehlo(made, 1, ("cpu",)), arrays)
    assert got.keys() == {"labels", "confidence"}
    want = task.decode(sliding.forward, {"image": arrays["image"]}, full=True)
    np.testing.assert_allclose(got["confidence"], want["confidence"], atol=1e-5)
    alone = make_ready(loaded.model, loaded.variables, None, INFO, None, 0)
    got = program.live(program.make_program(alone, (32, 32)), arrays | {"image": arrays["image"][:, :, :32]})
    (inputs,) = alone.inputs(arrays["image"][:, :, :32])
    np.testing.assert_allclose(got["logits"], loaded.forward(inputs).logits, rtol=1e-5, atol=1e-5)


def test_wrong_flags(workdir, tmp_path):
    start = [f"--workdir={workdir}", f"--output={tmp_path / 'a'}"]
    for flags, cause in (
        (["--format=setr", "--flip"], "--flip is for programs"),
        (["--format=stablehlo", "--leave_out=head"], "is for weights"),
        (["--format=stablehlo", "--size=a"], "neither a side nor"),
        (["--format=stablehlo", "--size=1,2,3"], "say --size=HEIGHT,WIDTH"),
        (["--format=stablehlo", "--platforms=gpu"], "no platform named 'gpu'"),
        (["--format=setr", f"--output={tmp_path}"], "is a folder"),
        (["--format=onnx"], "needs jax2onnx|cannot translate"),
    ):
        with pytest.raises(UserError, match=cause):
            export.main([*start, *flags])
    assert not list(tmp_path.iterdir())
