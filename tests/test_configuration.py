"""Configs: every key checked, overrides typed, round trips exact."""

import json

import pytest

from jax_densevit.configuration import (
    check_config,
    choose,
    config_from_json,
    default_config,
    default_evaluator,
    read_config,
    split_overrides,
    words,
)
from jax_densevit.errors import UserError

FILE = """
from jax_densevit.configuration import default_config, default_evaluator, words

def get_config(arg=""):
    quick = "quick" in words(arg, "quick", "large")
    config = default_config()
    config.steps = 3 if quick else 300
    config.model.name = "unet"
    config.data.train.name = "digit_scenes"
    config.data.crop = (64, 64)
    config.eval.val = default_evaluator()
    return config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(FILE)
    return str(path)


def test_argument_and_overrides(file):
    config = read_config(
        file + ":quick",
        {
            "optimizer.learning_rate": "1",
            "data.crop": "(32, 48)",
            "data.flip": "0.5",
            "data.rotate90": "true",
            "model.hidden_size": "96",
            "model.variant": "B/16",
            "eval.val.every": "10",
            "eval.val.data.root": "some/folder",
        },
    )
    assert config.steps == 3
    assert config.optimizer.learning_rate == 1.0
    assert config.data.crop == (32, 48) and config.data.flip == 0.5 and config.data.rotate90 is True
    assert config.model.hidden_size == 96 and config.model.variant == "B/16"
    assert config.eval.val.every == 10 and config.eval.val.data.root == "some/folder"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("optimizer.learning_rat", "1", "did you mean 'learning_rate'"),
        ("optimiser.learning_rate", "1", "did you mean 'optimizer'"),
        ("steps", "1e3", "expected a value of type int"),
        ("data.crop", "64", "expected a value of type tuple"),
        ("data.rotate90", "1", "expected a value of type bool"),
        ("optimizer", "adamw", "is a section"),
        ("seed.x", "1", "no such field"),
        ("batch_size", "0", "positive multiple"),
        ("checkpoint.best", "vall/mIoU", "names no evaluator"),
        ("epochs", "2.0", "exactly one of"),
    ],
)
def test_refused_overrides(file, key, value, says):
    with pytest.raises(UserError, match=says):
        read_config(file, {key: value})


def test_refused_files(tmp_path, file):
    with pytest.raises(UserError, match="no config file"):
        read_config(str(tmp_path / "none.py"))
    with pytest.raises(UserError, match="did you mean 'quick'"):
        read_config(file + ":quik")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="defines no get_config"):
        read_config(str(tmp_path / "empty.py"))
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    with pytest.raises(UserError, match="broken.py, line 1"):
        read_config(str(tmp_path / "broken.py"))
    (tmp_path / "extra.py").write_text(FILE.replace("return", "config.unlock(); config.batchsize = 3\n    return"))
    with pytest.raises(UserError, match="did you mean 'batch_size'"):
        read_config(str(tmp_path / "extra.py"))


def test_round_trip_through_json(file):
    config = read_config(file, {"eval.val.every": "7", "optimizer.multipliers": "(('head', 10.0),)"})
    again = config_from_json(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.data.crop == (64, 64) and again.optimizer.multipliers == (("head", 10.0),)
    check_config(again)


def test_old_configs_get_new_fields():
    old = default_config().to_dict()
    old["steps"] = 3
    del old["optimizer"]["clip_norm"]
    old["eval"] = {"val": {"data": {"name": "x"}, "every": 3}}
    config = config_from_json(old)
    assert config.optimizer.clip_norm == 0.0
    assert config.eval.val.sheet == default_evaluator().sheet and config.eval.val.every == 3


def test_words_and_overrides_on_the_command_line():
    assert words("", "a") == frozenset() and words("a,b", "a", "b") == {"a", "b"}
    assert choose(frozenset({"b"}), "a", "b") == "b" and choose(frozenset(), "a", "b") == "a"
    with pytest.raises(UserError, match="both"):
        choose(frozenset({"a", "b"}), "a", "b")
    assert split_overrides(["--x", "--config.a.b=1=2", "--config.c", "3"]) == ({"a.b": "1=2", "c": "3"}, ["--x"])
    with pytest.raises(UserError, match="has no value"):
        split_overrides(["--config.a"])
