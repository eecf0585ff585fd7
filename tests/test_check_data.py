"""check_data: every fault that a set of files can have is found, named and answered with an option."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jax_densevit import check_data
from jax_densevit.data.class_names import default_palette
from jax_densevit.data.diagnosis import looks_soft
from jax_densevit.errors import UserError

CONFIG = """
from ml_collections import ConfigDict
from jax_densevit.configuration import default_config, default_evaluator

def get_config(arg=""):
    config = default_config()
    config.steps = 1
    config.data.crop = {crop}
    config.model = ConfigDict({{"name": "unet"}})
    config.data.train = ConfigDict({train})
    for name, options in {evaluators}.items():
        evaluator = default_evaluator()
        evaluator.data = ConfigDict(options)
        config.eval[name] = evaluator
    return config
"""


class Set:
    """A small set of files with 12 pairs, to be broken by the tests."""

    def __init__(self, root):
        self.root = root
        self.options = {"classes": ("sky", "tree", "road")}
        self.evaluators, self.crop = {}, (4, 4)
        for i in range(12):
            self.image(f"images/{i:02d}.png", seed=i)
            self.mask(f"labels/{i:02d}.png", np.resize([0, 1, 2, 2], (6, 8)))

    def image(self, name, size=(6, 8), seed=0):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(path)

    def mask(self, name, values, palette=None, dtype=np.uint8):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(np.asarray(values, dtype))
        if palette is not None:
            picture.putpalette([part for color in palette for part in color])
        picture.save(path)

    def masks(self, values, **options):
        for i in range(12):
            self.mask(f"labels/{i:02d}.png", values, **options)

    def config(self):
        source = {"name": "paired_folder", "images": f"{self.root}/images", "labels": f"{self.root}/labels"}
        path = self.root / "config.py"
        path.write_text(CONFIG.format(crop=self.crop, train={**source, **self.options}, evaluators=self.evaluators))
        return str(path)

    def check(self, capsys, *flags):
        """(exit code, report of train): from the JSON."""
        code = check_data.main([f"--config={self.config()}", "--json", *flags])
        report = json.loads(capsys.readouterr().out)
        assert report["ok"] == (code == 0)
        return code, report["sections"]


@pytest.fixture
def files(tmp_path):
    return Set(tmp_path)


def findings(section):
    return {finding["kind"]: finding for finding in section["findings"]}


def test_a_good_set(files, capsys):
    files.mask("labels/03.png", np.resize([0, 1, 255, 255], (6, 8)))
    code, sections = files.check(capsys)
    train = sections["train"]
    assert code == 0 and not train["findings"]
    assert train["examples"] == train["read"] == 12 and train["sizes"] == {"6x8": 12}
    # Every mask has 12 pixels of sky, 12 of tree, 24 of road; one has 24 ignored pixels instead of road.
    assert [(c["pixels"], c["files"]) for c in train["classes"]] == [(144, 12), (144, 12), (264, 11)]
    assert train["ignored_pixels"] == 24 and train["ids"]["255"] == {"pixels": 24, "label": 255}


def test_a_good_set_for_a_person(files, capsys):
    assert check_data.main([f"--config={files.config()}"]) == 0
    shown = capsys.readouterr().out
    assert "12 examples; all 6x8" in shown and "values in the masks: 0..2" in shown and "Ready to train" in shown
    assert "50.00 %" in shown and "\x1b" not in shown


def corrupt(files):
    data = (files.root / "images/02.png").read_bytes()
    (files.root / "images/02.png").write_bytes(data[: len(data) // 2])
    (files.root / "labels/05.png").write_bytes(b"")
    (files.root / "images/07.png").unlink()
    (files.root / "images/07.png").mkdir()


def jpeg_masks(files):
    files.options = {"classes": ("no", "yes")}
    shutil.rmtree(files.root / "labels")
    for i in range(12):
        files.mask(f"labels/{i:02d}.jpg", np.repeat([0, 255], 4)[None].repeat(6, 0))


def soft_masks(files):
    files.options = {"classes": ("no", "yes"), "threshold": 1}
    line = np.concatenate([np.zeros(20), [30, 60, 90, 120, 150, 180], np.full(22, 255)])
    files.masks(line.reshape(6, 8))


FAULTS = {
    "unreadable": (corrupt, "unreadable", "3 unreadable files.*on_bad='skip'", 3),
    "mismatch": (
        lambda f: f.mask("labels/04.png", np.zeros((7, 8))),
        "size_mismatch",
        "1 mask of another size",
        1,
    ),
    "missing mask": (lambda f: (f.root / "labels/06.png").unlink(), "unpaired", "1 file without a partner", 1),
    "missing image": (lambda f: (f.root / "images/06.png").unlink(), "unpaired", "unpaired='skip'", 1),
    "ids too high": (lambda f: f.mask("labels/09.png", np.full((6, 8), 7)), "unknown_ids", "the id 7 .*id_map", 1),
    "zero is void": (lambda f: f.masks(np.resize([0, 1, 2, 3], (6, 8))), "unknown_ids", "reduce_zero_label=True", 12),
    "0/255": (lambda f: f.masks(np.resize([0, 255], (6, 8))), "binary_masks", "threshold=1", 0),
    "RGB": (
        lambda f: f.masks(np.resize([10, 20, 30, 40], (6, 8, 3))),
        "unknown_ids",
        r"colors? \(\d+, \d+, \d+\).*palette=",
        12,
    ),
    "16 bit": (
        lambda f: f.masks(np.resize([0, 26_001], (6, 8)), dtype=np.uint16),
        "unknown_ids",
        "26001.*instance",
        12,
    ),
    "JPEG": (jpeg_masks, "jpeg_masks", "12 masks in JPEG.*threshold=128", 12),
    "soft": (soft_masks, "soft_masks", "12 masks with soft edges.*threshold=128", 12),
    "palettes": (
        lambda f: [
            f.mask("labels/00.png", np.resize([0, 1, 2], (6, 8)), default_palette(256)),
            f.mask("labels/01.png", np.resize([0, 1, 2], (6, 8)), default_palette(256)[::-1]),
        ],
        "palettes_differ",
        "their palettes differ.*palette=",
        3,
    ),
    "sizes without crop": (
        lambda f: [
            setattr(f, "crop", (0, 0)),
            f.image("images/00.png", (9, 9)),
            f.mask("labels/00.png", np.ones((9, 9))),
        ],
        "sizes",
        "2 sizes.*set data.crop",
        0,
    ),
    "no such folder": (
        lambda f: f.options.update(images=f"{f.root}/image"),
        "source",
        "There is no folder .*image; .* has config.py, images, labels",
        0,
    ),
    "ignore is a class": (lambda f: f.options.update(ignore=2), "source", "ignore=2 is also the value of class 2", 0),
    "empty": (
        lambda f: [shutil.rmtree(f.root / d) or (f.root / d).mkdir() for d in ("images", "labels")],
        "empty",
        "no example",
        0,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_and_fixable(files, capsys, fault):
    break_it, kind, words, count = FAULTS[fault]
    break_it(files)
    code, sections = files.check(capsys)
    found = findings(sections["train"])
    assert code == 1 and found[kind]["severity"] == "error", found
    assert not [f for k, f in found.items() if f["severity"] == "error" and k != kind], "one fault, one error"
    assert re.search(words, found[kind]["message"]), found[kind]["message"]
    assert len(found[kind]["files"]) == count
    # The person's report says the same and fits a narrow screen.
    assert check_data.main([f"--config={files.config()}"]) == 1
    assert "error: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("break_it", "kind", "words"),
    [
        (lambda f: f.options.update(classes=("sky", "tree", "road", "car")), "never_seen", "no pixel of 1 class: car"),
        (lambda f: f.mask("labels/02.png", np.full((6, 8), 255)), "all_ignored", "1 mask: all pixels are ignored"),
        (lambda f: f.image("images/02.png", seed=3), "duplicate", "1 picture twice"),
        (
            lambda f: f.mask("labels/02.png", np.resize([0, 1, 2], (6, 8))[..., None].repeat(3, 2)),
            "gray_rgb",
            "1 mask saved as RGB",
        ),
        (
            lambda f: [
                f.options.update(palette=default_palette(4)[1:]),
                f.masks(np.resize([0, 1, 2], (6, 8)), palette=default_palette(256)),
            ],
            "palette_order",
            "index 0 is colored",
        ),
    ],
)
def test_warnings_do_not_fail(files, capsys, break_it, kind, words):
    break_it(files)
    code, sections = files.check(capsys)
    found = findings(sections["train"])
    assert code == 0 and found[kind]["severity"] == "warning" and words in found[kind]["message"]


def test_pictures_in_two_sets_are_pointed_out(files, capsys):
    files.image("val/images/x.png", seed=5)
    files.image("val/images/y.png", seed=50)
    for name in "xy":
        files.mask(f"val/labels/{name}.png", np.resize([0, 1, 2], (6, 8)))
    val = {"name": "paired_folder", "images": f"{files.root}/val/images", "labels": f"{files.root}/val/labels"}
    files.evaluators = {"val": {**val, **files.options}, "other": {**val, "classes": ("a", "b", "c")}}
    code, sections = files.check(capsys)
    assert findings(sections["val"])["leak"]["files"] == [f"{files.root}/val/labels/x.png"]
    assert code == 1 and "classes_differ" in findings(sections["other"])
    code, sections = files.check(capsys, "--split=val")
    assert list(sections) == ["val"] and code == 0
    with pytest.raises(UserError, match="did you mean 'val'"):
        files.check(capsys, "--split=vall")


def test_skipped_partners_are_no_error_and_limit_is_kept(files, capsys):
    (files.root / "labels/06.png").unlink()
    files.options["unpaired"] = "skip"
    code, sections = files.check(capsys, "--limit=5")
    assert code == 0 and sections["train"]["examples"] == 11 and sections["train"]["read"] == 5


def test_any_source_can_be_checked(tmp_path, capsys):
    path = tmp_path / "config.py"
    train = {"name": "digit_scenes", "length": 30}
    path.write_text(CONFIG.format(crop=(0, 0), train=train, evaluators={"test": {**train, "split": "test"}}))
    assert check_data.main([f"--config={path}", "--json"]) == 0
    sections = json.loads(capsys.readouterr().out)["sections"]
    assert sections["train"]["sizes"] == {"64x64": 30} and 1 <= sections["test"]["objects"]["mean"] <= 4
    assert sections["train"]["classes"][0]["files"] == 30


def test_run_prints_one_sentence_and_leaves_with_1(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["check_data", "--config=no_such_file.py"])
    with pytest.raises(SystemExit) as left:
        check_data.run()
    assert left.value.code == 1
    assert capsys.readouterr().err.startswith("error: There is no config file 'no_such_file.py'")


def test_a_narrow_screen_without_unicode(files):
    files.options["classes"] = ("Himmel", "Bäume", "Straße")
    command = [sys.executable, "-m", "jax_densevit.check_data", f"--config={files.config()}"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "30"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr
    shown = "".join(done.stdout.split())  # folded, but nothing is cut
    assert "Readytotrain" in shown and "Stra?e" in shown and "25.00%12?Himmel" in shown


def test_ids_and_objects_do_not_look_soft():
    assert looks_soft({0: 5000, 255: 4000} | {value: 3 for value in range(20, 230, 10)})  # an anti-aliased mask
    assert looks_soft({v: 800 for v in range(5)} | {v: 900 for v in range(250, 256)} | {v: 1 for v in range(20, 230)})
    assert not looks_soft({0: 60_000} | {value: 150 for value in range(1, 113)})  # objects of a microscopy picture
    assert not looks_soft({0: 60_000} | {value: 150 for value in range(1, 256)})  # as many as fit 8 bits
    assert not looks_soft({0: 5000, 255: 300, 1: 900, 7: 1000})  # classes and void
    assert not looks_soft({0: 900, 149: 900} | {value: 5 for value in range(30, 130, 5)})  # many classes


@pytest.mark.reference
def test_real_sets_are_good(reference_data, tmp_path, capsys):
    path = tmp_path / "config.py"
    nuclei = {"name": "instance_folder", "root": str(reference_data / "data/nuclei")}
    evaluators = {split: {**nuclei, "split": split} for split in ("val", "test")}
    path.write_text(CONFIG.format(crop=(64, 64), train={**nuclei, "split": "train"}, evaluators=evaluators))
    assert check_data.main([f"--config={path}", "--json"]) == 0
    sections = json.loads(capsys.readouterr().out)["sections"]
    assert {name: section["read"] for name, section in sections.items()} == {"train": 160, "val": 30, "test": 30}
    assert not any(section["findings"] for section in sections.values())
