"""The input benchmark: what is counted, the arithmetic, a tiny run, and its errors."""

import itertools
import json
import threading
import time

import pytest

from jax_densevit import benchmark_data
from jax_densevit.errors import UserError


class Sleepy:
    """A set whose reading is sleeping: two threads read twice as fast, and no CPU is used."""

    def __init__(self, bad=None):
        self.bad, self.seen, self.threads = bad, [], set()

    def __len__(self):
        return 10

    def read(self, index):
        if index == self.bad:
            raise UserError("file.png: empty")
        time.sleep(0.005)
        self.seen.append(index)
        self.threads.add(threading.get_ident())


def test_bare_reading_takes_every_example_of_the_order_in_all_threads():
    source = Sleepy()
    wall, cpu = benchmark_data.read_bare(source, 20, threads=2, seed=3)
    assert sorted(source.seen) == sorted(2 * list(range(10))) and len(source.threads) == 2
    assert wall >= 0.05 and cpu < wall
    with pytest.raises(UserError, match="file.png"):
        benchmark_data.read_bare(Sleepy(bad=4), 20, threads=2, seed=3)


def test_what_was_read_in_advance_is_not_timed():
    taken = []
    stream = (taken.append(i) or {} for i in itertools.count())
    benchmark_data.read_stream(stream, 5, ahead=3)
    assert len(taken) == 8


def test_medians_and_ratios():
    rounds = [((2.0, 3.0), (4.0, 4.0)), ((1.0, 3.0), (1.0, 2.0)), ((8.0, 3.0), (16.0, 6.0))]
    numbers = benchmark_data.summary(rounds, 16)
    assert numbers["bare_per_wall_second"] == 8 and numbers["stream_per_wall_second"] == 4
    assert numbers["wall_ratio"] == 0.5 and numbers["cpu_ratio"] == 0.75
    assert numbers["bare_per_cpu_second"] == pytest.approx(16 / 3)


def test_a_tiny_run_says_what_it_measured(capsys):
    arguments = ["--config=configs/quickstart.py:quick", "--pictures=8", "--rounds=2"]
    assert benchmark_data.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["source"] == "digit_scenes" and report["threads"] >= 1
    assert report["bare_per_wall_second"] > 0 and report["wall_ratio"] > 0
    assert benchmark_data.main(arguments) == 0
    assert "training stream" in capsys.readouterr().out
    with pytest.raises(UserError, match="at least 1"):
        benchmark_data.main([*arguments, "--rounds=0"])
