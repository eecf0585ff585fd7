"""Every code block of the README and the docs runs: Python as it stands, commands with configs at `quick` size."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Records of what was run by hand, with its commands: documents, not instructions.
RECORDS = {"benchmarks.md", "reliability.md", "scaling.md"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"python -m (jax_densevit\.\w+)(.*)")


def commands(block: str) -> list[tuple[str, list[str]]]:
    """The `python -m jax_densevit.x ...` lines of a block: (module, arguments), continued lines joined."""
    joined = block.replace("\\\n", " ")
    return [(m[1], shlex.split(m[2].split(" && ")[0])) for line in joined.splitlines() if (m := COMMAND.search(line))]


def shrunk(arguments: list[str]) -> list[str]:
    """The same arguments with every config of the library at its `quick` size."""

    def shrink(argument: str) -> str:
        if re.search(r"configs/\S+\.py", argument) and "quick" not in argument.rpartition("/")[2].partition(":")[2]:
            return argument + ("," if ":" in argument else ":") + "quick"
        return argument

    return [shrink(argument) for argument in arguments]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in RECORDS], ids=lambda page: page.name)
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    namespace = {}
    for language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(block, str(page), "exec"), namespace)
            continue
        for module, arguments in commands(block):
            code = importlib.import_module(module).main(shrunk(arguments))
            assert code in (0, None), f"{module} {arguments} gave {code}"


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_tests_that_are_named_exist():
    named = re.findall(r"[\w/]+\.py(?:::\w+)+", (ROOT / "docs/reliability.md").read_text(encoding="utf-8"))
    assert len(named) > 100
    for file, *names in (name.split("::") for name in named):
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert all(re.search(rf"^ *(def|class) {name}\b", text, re.MULTILINE) for name in names), f"{file} {names}"
