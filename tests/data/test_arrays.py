"""Prepared sets: what is written is what is read, whole or not at all, and it trains without TensorFlow."""

import json
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jax_densevit import prepare
from jax_densevit.data.pipeline import evaluation_plan, evaluation_stream, train_stream
from jax_densevit.data.source import DataInfo
from jax_densevit.data.sources import create_source
from jax_densevit.data.sources.arrays import fit_example, write_arrays
from jax_densevit.errors import UserError

CONFIG = """
from jax_densevit.configuration import default_config, default_evaluator

def get_config(arg=""):
    config = default_config()
    config.steps = 1
    config.data.train = {"name": "digit_scenes", "length": 6, "size": (32, 40), "scale": (8, 12)}
    val = default_evaluator()
    val.data = {"name": "digit_scenes", "split": "val", "length": 3, "size": (32, 40), "scale": (8, 12)}
    config.eval.val = val
    return config
"""


class Memory:
    def __init__(self, sizes, labels=True, bad=()):
        self.info = DataInfo("memory", ("a", "b", "c"), ((0, 0, 0),) * 3, mean=(0.5, 0.25, 0.0))
        self.sizes, self.labels, self.bad = sizes, labels, bad

    def __len__(self):
        return len(self.sizes)

    def size(self, index):
        return self.sizes[index]

    def read(self, index):
        if index in self.bad:
            raise UserError(f"file{index}.png: this file is empty; fetch it again.")
        rng = np.random.default_rng(index)
        size = self.sizes[index]
        example = {"image": rng.integers(0, 256, (*size, 3)).astype(np.uint8), "id": f"bild ü{index}"}
        if self.labels:
            example |= {"labels": rng.integers(0, 3, size).astype(np.uint8)}
            example |= {"instances": rng.integers(0, 1000, size).astype(np.uint16)}
        return example


@pytest.mark.parametrize("labels", [True, False])
def test_written_is_read(tmp_path, labels):
    source = Memory([(8, 10)] * 7, labels)
    progress = []
    folder = write_arrays(source, tmp_path / "deep" / "set", threads=3, progress=progress.append)
    prepared = create_source("arrays", folder=str(folder))
    assert progress == list(range(1, 8))
    assert prepared.info == source.info and len(prepared) == 7 and prepared.size(3) == (8, 10)
    for index in range(7):
        ours, theirs = prepared.read(index), source.read(index)
        assert ours.keys() == theirs.keys() and ours["id"] == theirs["id"]
        for name in set(ours) - {"id"}:
            np.testing.assert_array_equal(ours[name], theirs[name])
            assert ours[name].dtype == theirs[name].dtype and type(ours[name]) is np.ndarray
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["set"]


def test_streams_are_those_of_the_set_itself(tmp_path):
    source = Memory([(8, 10)] * 7)
    prepared = create_source("arrays", folder=str(write_arrays(source, tmp_path / "set")))
    for options in ({}, {"crop": (5, 6)}):
        ours = train_stream(prepared, batch_size=3, seed=1, feeder="threads", **options)
        theirs = train_stream(source, batch_size=3, seed=1, feeder="threads", **options)
        for _ in range(5):
            a, b = next(ours), next(theirs)
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])
    plan = evaluation_plan(prepared, 4)
    assert plan == evaluation_plan(source, 4)
    assert sum(batch["mask"].sum() for batch in evaluation_stream(prepared, plan)) == 7


def test_fit_pads_the_whole_image_in():
    source = Memory([(20, 40)])
    example = source.read(0)
    fitted = fit_example(example, (30, 20), "pad", source.info)
    expected = np.asarray(Image.fromarray(example["image"]).resize((20, 10), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(fitted["image"][:10], expected)
    assert (fitted["image"][10:] == (128, 64, 0)).all(), "the mean colour"
    np.testing.assert_array_equal(fitted["labels"][:10], example["labels"][1::2, 1::2])
    np.testing.assert_array_equal(fitted["instances"][:10], example["instances"][1::2, 1::2])
    assert (fitted["labels"][10:] == 255).all() and (fitted["instances"][10:] == 0).all()


def test_fit_crops_the_middle():
    source = Memory([(20, 40)])
    example = source.read(0)
    fitted = fit_example(example, (20, 20), "crop", source.info)
    np.testing.assert_array_equal(fitted["image"], example["image"][:, 10:30])
    np.testing.assert_array_equal(fitted["labels"], example["labels"][:, 10:30])
    assert fit_example(example, (7, 3), "crop", source.info)["labels"].shape == (7, 3)
    with pytest.raises(UserError, match="fit is 'stretch'"):
        fit_example(example, (20, 20), "stretch", source.info)


def test_sets_of_several_sizes_need_one(tmp_path):
    source = Memory([(8, 10), (10, 8)])
    with pytest.raises(UserError, match=r"bild ü1 has size \(10, 8\).*give the size"):
        write_arrays(source, tmp_path / "set")
    assert not list(tmp_path.iterdir()), "nothing half-written"
    write_arrays(source, tmp_path / "set", (10, 10))
    assert create_source("arrays", folder=str(tmp_path / "set")).size(1) == (10, 10)


def test_failures_leave_nothing_behind(tmp_path):
    with pytest.raises(UserError, match="file5.png"):
        write_arrays(Memory([(8, 8)] * 9, bad=[5]), tmp_path / "set", threads=4)
    with pytest.raises(UserError, match="no examples"):
        write_arrays(Memory([]), tmp_path / "set")
    assert not list(tmp_path.iterdir())
    (tmp_path / "set").mkdir()
    with pytest.raises(UserError, match="set exists already"):
        write_arrays(Memory([(8, 8)]), tmp_path / "set")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="set cannot be written"):
        write_arrays(Memory([(8, 8)]), tmp_path / "file" / "set")


def test_a_full_disk_is_one_sentence(tmp_path):
    """A limit on the size of files stands in for the full disk: the room is asked for before anything is mapped."""
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(__file__).rsplit("/", 1)[0]!r})
from test_arrays import Memory
from jax_densevit.data.sources.arrays import write_arrays
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
write_arrays(Memory([(256, 256)] * 20), {str(tmp_path / "set")!r})
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1, "an error, not a killed process"
    assert "set cannot be written (File too large)" in run.stderr
    assert not list(tmp_path.iterdir())


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path):
        return write_arrays(Memory([(8, 10)] * 7), tmp_path / "set")

    def test_not_a_prepared_folder(self, tmp_path):
        with pytest.raises(UserError, match="not a prepared folder.*jax_densevit.prepare"):
            create_source("arrays", folder=str(tmp_path))

    def test_truncated_missing_and_foreign_arrays(self, folder):
        path = folder / "labels.npy"
        content = path.read_bytes()
        for bad in (content[:200], b"", b"junk" * 50):
            path.write_bytes(bad)
            with pytest.raises(UserError, match="labels.npy is missing or damaged"):
                create_source("arrays", folder=str(folder))
        np.save(path, np.zeros((7, 8, 9), np.uint8))
        with pytest.raises(UserError, match=r"labels.npy holds uint8 \(7, 8, 9\)"):
            create_source("arrays", folder=str(folder))
        np.save(path, np.array([{"a": 1}], object))
        with pytest.raises(UserError, match="labels.npy is missing or damaged"):
            create_source("arrays", folder=str(folder))  # never unpickled
        path.unlink()
        with pytest.raises(UserError, match="labels.npy is missing or damaged"):
            create_source("arrays", folder=str(folder))

    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}'])
    def test_damaged_info(self, folder, content):
        (folder / "info.json").write_text(content)
        with pytest.raises(UserError, match="info.json is damaged"):
            create_source("arrays", folder=str(folder))

    def test_another_format(self, folder):
        values = json.loads((folder / "info.json").read_text())
        (folder / "info.json").write_text(json.dumps(values | {"format": 2}))
        with pytest.raises(UserError, match="format 2"):
            create_source("arrays", folder=str(folder))


class TestCommand:
    @pytest.fixture
    def config(self, tmp_path):
        (tmp_path / "config.py").write_text(CONFIG)
        return f"--config={tmp_path / 'config.py'}"

    def test_train_and_evaluation_splits(self, tmp_path, config, capsys):
        assert prepare.main([config, f"--output={tmp_path / 'train'}"]) == 0
        assert "6 examples" in capsys.readouterr().out
        assert (
            prepare.main([config, "--split", "val", "--size=16x16", "--fit=crop", "--output", str(tmp_path / "val")])
            == 0
        )
        train, val = (create_source("arrays", folder=str(tmp_path / name)) for name in ("train", "val"))
        assert (len(train), train.size(0), len(val), val.size(0)) == (6, (32, 40), 3, (16, 16))
        scenes = create_source("digit_scenes", length=6, size=(32, 40), scale=(8, 12))
        np.testing.assert_array_equal(train.read(4)["labels"], scenes.read(4)["labels"])
        assert train.info.classes == scenes.info.classes

    def test_what_was_prepared_is_not_prepared_again(self, tmp_path):
        """An output that is there is refused; one that lies among the photos adds none to them."""
        (tmp_path / "photos").mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8), (250, 80 * i, 0)).save(tmp_path / f"photos/{i}.png")
        data = f'{{"name": "photo_folder", "root": {str(tmp_path / "photos")!r}}}'
        text = CONFIG.replace('{"name": "digit_scenes", "length": 6, "size": (32, 40), "scale": (8, 12)}', data)
        (tmp_path / "config.py").write_text(text)
        arguments = [f"--config={tmp_path / 'config.py'}", f"--output={tmp_path / 'photos/prepared'}"]
        assert prepare.main(arguments) == 0
        with pytest.raises(UserError, match="prepared exists already; name another"):
            prepare.main(arguments)
        assert prepare.main([*arguments[:1], f"--output={tmp_path / 'photos/again'}"]) == 0
        assert len(create_source("arrays", folder=str(tmp_path / "photos/again"))) == 3

    def test_overrides(self, tmp_path, config):
        prepare.main([config, "--config.data.train.length=2", f"--output={tmp_path / 'train'}"])
        assert len(create_source("arrays", folder=str(tmp_path / "train"))) == 2

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [(["--size=16"], "--size=16 is not HEIGHTxWIDTH"), (["--split=vall"], "did you mean 'val'")],
    )
    def test_mistakes(self, tmp_path, config, arguments, message):
        with pytest.raises(UserError, match=message):
            prepare.main([config, *arguments, f"--output={tmp_path / 'out'}"])
        assert not (tmp_path / "out").exists()

    def test_a_mistake_is_one_sentence_and_exit_code_one(self, tmp_path):
        run = subprocess.run(
            [sys.executable, "-m", "jax_densevit.prepare", "--config=none.py", f"--output={tmp_path / 'out'}"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 1
        assert len(run.stderr.splitlines()) == 1 and "none.py" in run.stderr


class TestRegistry:
    def test_unknown_names_and_options(self):
        with pytest.raises(UserError, match="no data source named 'array'; did you mean 'arrays'"):
            create_source("array")
        with pytest.raises(UserError, match="'arrays' has no option 'foldr'; did you mean 'folder'"):
            create_source("arrays", foldr="x")
        with pytest.raises(UserError, match="'arrays' needs the option 'folder'"):
            create_source("arrays")
