"""The script that draws learning curves of several runs."""

import json

import pytest
from PIL import Image

from jax_densevit.errors import UserError
from jax_densevit.studies import curves


def run(folder, best):
    folder.mkdir()
    lines = [{"step": step, "loss": 1 / step, "lr": 0.1} for step in (5, 10, 15)]
    lines += [{"step": step, "evaluator": "val", "examples": 2, "mIoU": best * step / 10} for step in (5, 10)]
    lines += [{"step": 10, "evaluator": "test", "mIoU": 0.9}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_curves(tmp_path, capsys):
    output = tmp_path / "curves.png"
    curves.main([run(tmp_path / "grid", 0.5), run(tmp_path / "rows", 0.25), f"--output={output}"])
    assert capsys.readouterr().out.splitlines() == [
        "| step | mIoU, grid | mIoU, rows | training loss, grid | training loss, rows |",
        "| --: | --: | --: | --: | --: |",
        "| 5 | 0.2500 | 0.1250 | 0.2000 | 0.2000 |",
        "| 10 | 0.5000 | 0.2500 | 0.1000 | 0.1000 |",
    ]
    with Image.open(output) as picture:
        assert picture.size == (990, 396) and len(picture.convert("RGB").getcolors(1 << 20)) > 20
    losses, scores = curves.read_run(tmp_path / "grid", "test", "mIoU")
    assert losses[15] == 1 / 15 and scores == {10: 0.9}
    with pytest.raises(UserError, match="no workdir"):
        curves.read_run(tmp_path, "val", "mIoU")
    with pytest.raises(UserError, match="no 'mIoU' of an evaluator 'vall'"):
        curves.read_run(tmp_path / "grid", "vall", "mIoU")
