"""The command `fid` by two processes: what one process finds, to the last digit that float64 keeps."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_network
from PIL import Image
from together import run_together

from jax_densevit import fid

pytestmark = pytest.mark.multiprocess


def test_two_processes_find_what_one_finds(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for folder, count in (("pictures", 11), ("reference", 13)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            picture = np.clip(rng.uniform(0, 255, 3) + rng.normal(0, 40, (20 + i, 30, 3)), 0, 255)
            Image.fromarray(picture.astype(np.uint8)).save(tmp_path / folder / f"{i}.png")
    (tmp_path / "reference/5.png").write_bytes(b"no picture")

    def arguments(name):
        where = [f"--{side}={tmp_path / side}" for side in ("pictures", "reference")]
        files = [f"--output={tmp_path / name}.json", f"--save_reference={tmp_path / name}.npz"]
        return [*where, *files, "--batch_size=8"]

    environment = {
        **os.environ,
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", "count=4"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    monkeypatch.setattr(fid, "load_network", lambda *arguments: tiny_network.tiny_network())
    command = [sys.executable, tiny_network.__file__, *arguments("two")]
    done = run_together(command, environment, lambda: fid.main(arguments("one")))
    assert [code for code, _, _ in done] == [2, 2], done
    # The first process prints; whoever has read a picture says that it could not.
    assert ["fd_tiny" in printed for _, printed, _ in done] == [True, False]
    assert sum("5.png" in errors for _, _, errors in done) == 1
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["device"] == one["device"] and two["device"].startswith("8 x ") and two["pictures"]["count"] == 11
    for key in ("fd_tiny", "kd_tiny", "colorfulness", "reference_colorfulness"):
        assert two[key] == pytest.approx(one[key], rel=1e-9, abs=1e-12) and one[key] != 0
    with np.load(tmp_path / "one.npz") as first, np.load(tmp_path / "two.npz") as second:
        assert first.files == second.files
        for name in ("mu", "sigma"):
            np.testing.assert_allclose(second[name], first[name], rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(second["names"], first["names"])
