import json
import subprocess
import sys

from jax_densevit.models import __main__ as command
from jax_densevit.models.counts import count_like_paper, count_parameters
from jax_densevit.models.registry import create_model, registered_models


def test_json_lists_every_variant(capsys):
    command.main(["--json"])
    rows = json.loads(capsys.readouterr().out)
    listed = {(row["model"], row["variant"]) for row in rows}
    assert listed == {(name, variant) for name, entry in registered_models().items() for variant in entry.variants}
    by_name = {(row["model"], row["variant"]): row for row in rows}
    pup = by_name["setr_pup", "L/16"]
    assert pup["parameters_as_published"] == 318_307_292 and pup["parameters"] == 317_922_542
    assert round(pup["gmacs"]) == 418
    assert by_name["unet", "64"]["parameters"] == 31_037_763
    assert sum(row["default"] for row in rows) == len(registered_models())


def test_table_cuts_no_number(capsys, monkeypatch):
    rows = [
        {
            "model": "a_model_with_a_rather_long_name",
            "variant": "L/16",
            "default": True,
            "image_size": [1024, 2048],
            "num_classes": 150,
            "parameters": 12_345_678_901,
            "parameters_as_published": 12_345_678_902,
            "gmacs": 12345.67,
        }
    ]
    monkeypatch.setattr(command, "model_table", lambda: rows)
    command.main([])
    out = capsys.readouterr().out
    for text in (
        "a_model_with_a_rather_long_name",
        "L/16 *",
        "1024x2048",
        "12,345,678,901",
        "12,345,678,902",
        "12345.7",
    ):
        assert text in out


def test_counts_do_not_depend_on_the_form():
    """Scanned or unrolled, with which image it is initialised: the same parameters."""
    sizes = {"hidden_size": 8, "num_layers": 4, "num_heads": 2, "mlp_size": 12, "image_size": 32, "num_classes": 3}
    counts = {
        count(create_model("setr_mla", **sizes, scan=scan), size)
        for scan in (False, True)
        for size in ((32, 32), (48, 17))
        for count in (count_parameters,)
    }
    assert len(counts) == 1
    model = create_model("setr_mla", **sizes)
    assert count_like_paper(model, (32, 32)) == counts.pop() + 5 * 513 * 3 + 2 * 8


def test_models_import_without_tensorflow():
    """Nothing that reads data is imported with the models, nor TensorFlow with anything they need."""
    code = (
        "import sys, jax_densevit.models; "
        "print([m for m in ('tensorflow', 'orbax.checkpoint', 'jax_densevit.data') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
