"""Means of an interval that survive a restart; times by a clock that the test moves."""

import json

import numpy as np
import pytest

from jax_densevit.training import meter
from jax_densevit.training.hardware import peak_flops
from jax_densevit.training.meter import Meter


def test_means_do_not_depend_on_where_a_run_was_cut():
    rng = np.random.default_rng(0)
    rows = [{"loss": float(np.float32(rng.random())), "lr": 1.0 / (i + 1)} for i in range(7)]
    whole = Meter(step=0, steps=7, batch_size=1)
    for row in rows:
        whole.add(row)
    first = Meter(step=0, steps=7, batch_size=1)
    for row in rows[:4]:
        first.add(row)
    second = Meter(step=4, steps=7, batch_size=1, state=json.loads(json.dumps(first.state())))
    for row in rows[4:]:
        second.add(row)
    expected = whole.numbers()
    assert second.numbers() == expected
    assert expected["loss"] == pytest.approx(np.mean([row["loss"] for row in rows]), rel=1e-12)
    assert expected["lr"] == rows[-1]["lr"]
    whole.add(rows[0])
    assert whole.numbers() == rows[0]


def test_timing(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    measured = Meter(step=10, steps=110, batch_size=8, flops=6e9, peak=1e12)
    measured.wait(0.5)
    measured.work(1.5)
    now[0] += 2.0
    assert measured.timing(20) == {
        "images_per_second": 40.0,
        "step_seconds": 0.2,
        "input_wait": 0.25,
        "mfu": pytest.approx(0.03),
        "goodput": 0.75,
        "seconds_left": pytest.approx(18.0),
    }
    now[0] += 50.0  # an evaluation
    measured.restart_clock(20)
    now[0] += 1.0
    measured.work(1.0)
    again = measured.timing(30)
    assert again["images_per_second"] == 80.0
    assert again["goodput"] == pytest.approx(2.5 / 53)  # the evaluation counts against it
    assert measured.timing(30) == {}
    assert Meter(step=0, steps=1, batch_size=1, flops=1.0).timing(0) == {}


PEAKS = {"TPU v5 lite": 197, "TPU v5": 459, "TPU v6 lite": 918, "NVIDIA H200": 989.4, "NVIDIA A100-SXM4-40GB": 312}
PEAKS |= {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA L40S": 362, "cpu": None}


@pytest.mark.parametrize(("kind", "tera"), PEAKS.items())
def test_peak(kind, tera):
    class Device:
        device_kind = kind

    assert peak_flops(Device()) == (None if tera is None else tera * 1e12)
