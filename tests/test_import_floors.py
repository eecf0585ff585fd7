"""The floors of the house: imports only go down, TensorFlow stays in `data/`, Linen in `layers/` and `models/`."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jax_densevit"

# Floors of the folders and files of the package; below 0 is the ground that every room stands on. Whatever is not named
# is a command, on top.
FLOORS = {
    "errors": -1,
    "manifest": -1,
    "writing": -1,
    "layers": 0,
    "data": 1,
    "metrics": 1,
    "models": 2,
    "pretrained": 2,
    "peers": 3,
    "tasks": 3,
    "timing": 3,
    "training": 4,
    "configuration": 5,
    "distances": 5,
    "experiment": 5,
    "published": 5,
    "program": 6,
    "__init__": 6,  # the package's door, which opens a room only when it is asked to
    "studies": 6,
}
TOP = 7
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The first part of a file's place in the package: the folder, or the file's own name."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(source: str, package: str) -> list[tuple[int, str]]:
    """(line, absolute dotted name) of everything that a module of `package` imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            if node.args and isinstance(node.args[0], ast.Constant):
                found.append((node.lineno, str(node.args[0].value)))
    return found


def trespasses(source: str, place: str, package: str) -> list[str]:
    """What a module in room `place` imports against the rules, as sentences."""
    floor = FLOORS.get(place, TOP)
    wrong = []
    for line, name in imports(source, package):
        parts = name.split(".")
        if parts[0] == "jax_densevit" and len(parts) > 1 and parts[1] != place:
            target = FLOORS.get(parts[1], TOP if (PACKAGE / f"{parts[1]}.py").exists() else -1)
            if target > floor:
                wrong.append(f"line {line}: {name} is a floor above")
            elif target == floor == 1:
                wrong.append(f"line {line}: {name} is a neighbour, not below")
        if parts[0].startswith("tensorflow") and place != "data":
            wrong.append(f"line {line}: {name} outside data/")
        if parts[:2] == ["flax", "linen"] and place not in ("layers", "models"):
            wrong.append(f"line {line}: {name} outside layers/ and models/")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_floors(path):
    package = ".".join(("jax_densevit", *path.relative_to(PACKAGE).parent.parts))
    assert trespasses(path.read_text(encoding="utf-8"), room(path), package) == []


def test_every_folder_has_a_floor():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders <= FLOORS.keys()


def test_no_room_for_leftovers():
    assert [path.name for path in FILES if path.stem in ("utils", "util", "helpers", "common", "misc")] == []


def test_the_test_sees_trespassers():
    for source, place in (
        ("from jax_densevit.training import step", "tasks"),
        ("def f():\n    from jax_densevit.models import vit", "layers"),
        ("import jax_densevit.experiment as e", "training"),
        ("from ..models import vit", "layers"),
        ("from .. import models", "layers"),
        ("import tensorflow as tf", "training"),
        ("import importlib\nimportlib.import_module('tensorflow')", "models"),
        ("from tensorflow_datasets import load", "tasks"),
        ("import flax.linen as nn", "tasks"),
        ("from flax import linen", "training"),
        ("from jax_densevit.data import source", "metrics"),
    ):
        assert len(trespasses(source, place, f"jax_densevit.{place}")) == 1, source
    for source, place in (
        ("from jax_densevit.layers import resize\nfrom jax_densevit.errors import UserError", "models"),
        ("import tensorflow as tf", "data"),
        ("import flax.linen as nn", "layers"),
        ("from jax_densevit.models import vit", "models"),
        ("import jax_densevit", "layers"),
    ):
        assert trespasses(source, place, f"jax_densevit.{place}") == [], source
