"""The benchmark: order of turns, arithmetic of the report, a tiny run, and what it says when something is missing."""

import json
import sys

import jax
import pytest

from jax_densevit import benchmark
from jax_densevit.errors import UserError
from jax_densevit.models.registry import find_model
from jax_densevit.timing import Contender, Job, parse_job, time_in_turn


@pytest.mark.parametrize(
    "text,job",
    [
        ("vit:S/16@64", Job("vit", "S/16", (64, 64))),
        ("unet:bilinear-16@32x48", Job("unet", "bilinear-16", (32, 48))),
        ("unet", Job("unet", "64", (224, 224))),
        ("unet@16", Job("unet", "64", (16, 16))),
    ],
)
def test_jobs_read_and_print(text, job):
    assert parse_job(text) == job
    assert parse_job(str(job)) == job


@pytest.mark.parametrize("text", ["vti:B/16", "vit:B/61@224", "vit:B/16@big", ""])
def test_wrong_jobs_are_refused(text):
    with pytest.raises(UserError):
        parse_job(text)


def test_contenders_take_turns_and_are_waited_for():
    """On a clock that only our calls move: times are exact, and a late `wait` is inside the measured time."""
    now, calls = [0.0], []

    def contender(name, seconds):
        def call():
            calls.append(name)
            now[0] += seconds

        def wait():
            now[0] += 1.0

        return Contender(name, "forward", call, wait)

    times = time_in_turn([contender("a", 2.0), contender("b", 3.0)], 3, clock=lambda: now[0])
    assert calls == ["a", "a", "b", "b"] + ["a", "b"] * 3
    assert times == [[3.0] * 3, [4.0] * 3]


def test_short_calls_are_timed_in_groups():
    now, calls = [0.0], []

    def call():
        calls.append(1)
        now[0] += 0.01

    (times,) = time_in_turn([Contender("a", "forward", call, lambda: None)], 2, clock=lambda: now[0])
    assert len(calls) == 2 + 2 * 5
    assert times == pytest.approx([0.01, 0.01])


def test_rows_and_ratios():
    job = Job("unet", "16", (16, 16))
    ours = Contender("jax_densevit", "forward", None, None, facts={"flops": 4e9})
    peer = Contender("peer", "forward", None, None, same=False)
    rows = [
        benchmark.report_row(job, ours, [4.0, 2.0, 1.0], batch=8, peak=10e9),
        benchmark.report_row(job, peer, [3.0, 5.0, 2.0], batch=8, peak=10e9),
    ]
    benchmark.add_ratios(rows)
    assert rows[0]["images_per_second"] == 4.0 and rows[0]["mfu"] == pytest.approx(0.2)
    assert rows[0]["tflops_per_second"] == pytest.approx(0.002) and "ratio" not in rows[0]
    assert rows[1]["ratio"] == 1.5 and rows[1]["ratio_of_minima"] == 2.0 and "mfu" not in rows[1]


def test_a_tiny_run_prints_json_and_a_table(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "measured_peak", lambda dtype: 1e12)
    arguments = ["--models", "unet:16@32", "--batch", "1", "--rounds", "2", "--train"]
    benchmark.main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    forward, step = report["results"]
    assert (forward["kind"], step["kind"]) == ("forward", "train step")
    macs = find_model("unet").macs(benchmark.build_model(parse_job("unet:16"), {}), (32, 32))
    assert forward["flops"] == 2 * macs and step["flops"] == 3 * forward["flops"]
    assert step["memory_bytes"] > 3 * 4 * step["parameters"]  # parameters and two moments at least
    assert 0 < step["min_seconds"] <= step["median_seconds"] and step["compile_seconds"] > 0
    assert report["machine"]["versions"]["jax"] == jax.__version__ and "--train" in report["command"]
    benchmark._print(report)
    table = capsys.readouterr().out
    assert "unet:16@32" in table and "train step" in table


def test_the_step_learns_and_moves_the_statistics():
    (_, step) = benchmark.own_contenders(parse_job("unet:16@32"), 1, True, {})
    state = step.call.__closure__
    held = next(cell.cell_contents for cell in state if isinstance(cell.cell_contents, list))
    before = jax.device_get(held[0])
    step.call()
    step.wait()
    after = jax.device_get(held[0])
    for part in (0, 1):
        moved = jax.tree.map(lambda a, b: bool((a != b).any()), before[part], after[part])
        assert sum(jax.tree.leaves(moved)) > 0.9 * len(jax.tree.leaves(moved))


def test_models_of_other_inputs_than_images():
    """A channel upsampler takes three arrays of integers, and its counts are for all three channels."""
    (forward,) = benchmark.own_contenders(parse_job("coltran_color_upsampler:tiny@4x6"), 2, False, {})
    forward.call()
    forward.wait()
    model = benchmark.build_model(parse_job("coltran_color_upsampler:tiny@4x6"), {})
    assert forward.facts["flops"] == 4 * find_model("coltran_color_upsampler").macs(model, (4, 6))


def test_missing_peers_are_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"torch.*not installed.*\[peers\]"):
        benchmark.main(["--models", "unet:16@32", "--peers"])


def test_impossible_numbers_are_refused():
    with pytest.raises(UserError, match="at least 1"):
        benchmark.main(["--models", "unet:16@32", "--batch", "0"])
