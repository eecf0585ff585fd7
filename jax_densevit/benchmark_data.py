"""`python -m jax_densevit.benchmark_data`: how fast a config's training data come, against reading the same files bare.

    python -m jax_densevit.benchmark_data --config=configs/own_folder.py [--config.data.resize_box=0,0] [--json]

Bare reading is a loop over the examples in as many threads, which decodes them and throws them away. Both take turns,
and what is reported are medians, so that a slow moment of the machine hits them alike. CPU time counts all threads of
the process; on a machine that does other work it says more than wall time.
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table

from jax_densevit.configuration import read_config, split_overrides
from jax_densevit.console import progress_bar, run_command
from jax_densevit.data.order import examples_at
from jax_densevit.data.pipeline import default_threads
from jax_densevit.data.source import Source
from jax_densevit.data.sources import create_source
from jax_densevit.errors import UserError
from jax_densevit.experiment import stream_of

Times = tuple[float, float]  # seconds of wall time, seconds of CPU time


def main(argv: list[str]) -> int:
    """Runs the command with its arguments (without the program's name); returns the exit code."""
    parser = argparse.ArgumentParser(prog="jax_densevit.benchmark_data", description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARG]", help="the config that names the data")
    parser.add_argument("--pictures", type=int, default=400, help="read by each in a round (rounded up to batches)")
    parser.add_argument("--rounds", type=int, default=7, help="how often they take turns")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    overrides, rest = split_overrides(argv)
    options = parser.parse_args(rest)
    if min(options.pictures, options.rounds) < 1:
        raise UserError("--pictures and --rounds must be at least 1.")
    config = read_config(options.config, overrides)
    threads = config.data.threads or default_threads()
    source = create_source(**config.data.train.to_dict())
    batches = -(-options.pictures // config.batch_size)
    stream = stream_of(config, source)
    try:
        next(stream)  # imports, buffers
        with progress_bar("rounds") as progress:
            rounds = []
            for number in range(options.rounds):
                bare = read_bare(source, batches * config.batch_size, threads, config.seed)
                rounds.append((bare, read_stream(stream, batches, ahead=2 * threads + 4)))
                progress(number + 1, options.rounds)
    finally:
        stream.close()
    report = {"source": source.info.name, "threads": threads, "batch_size": config.batch_size}
    report |= {"crop": list(config.data.crop), "resize_box": list(config.data.resize_box)}
    report |= summary(rounds, batches * config.batch_size)
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        _show(report)
    return 0


def read_bare(source: Source, count: int, threads: int, seed: int) -> Times:
    """Reads the first `count` examples of the training order and throws them away."""
    indices = [int(index) for index in examples_at(range(count), seed, len(source))[0]]
    failures: list[Exception] = []

    def read(own: list[int]) -> None:
        try:
            for index in own:
                source.read(index)
        except Exception as error:  # raised again in the thread that waits
            failures.append(error)

    def all_threads() -> None:
        readers = [threading.Thread(target=read, args=(indices[k::threads],)) for k in range(threads)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()

    times = _timed(all_threads)
    if failures:
        raise failures[0]
    return times


def read_stream(stream: Iterator, batches: int, ahead: int) -> Times:
    """Takes `batches` from a stream after `ahead` others, which empty what it has read in advance.

    Returns when it has read in advance again, so that nothing runs behind what is measured next.
    """
    for _ in range(ahead):
        next(stream)
    times = _timed(lambda: [next(stream) and None for _ in range(batches)])
    while True:
        before = time.process_time()
        time.sleep(0.1)
        if time.process_time() - before < 0.005:
            return times


def _timed(work: Callable[[], object]) -> Times:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def summary(rounds: list[tuple[Times, Times]], count: int) -> dict[str, float]:
    """Medians over rounds of (bare, stream), `count` pictures each: pictures a second, and the stream's share of it."""
    numbers = {}
    for place, kind in enumerate(("wall", "cpu")):
        numbers[f"bare_per_{kind}_second"] = statistics.median(count / bare[place] for bare, _ in rounds)
        numbers[f"stream_per_{kind}_second"] = statistics.median(count / stream[place] for _, stream in rounds)
        numbers[f"{kind}_ratio"] = statistics.median(bare[place] / stream[place] for bare, stream in rounds)
    return numbers


def _show(report: dict) -> None:
    title = f"{report['source']}, batches of {report['batch_size']}, {report['threads']} threads"
    table = Table("time", "bare reading", "training stream", "share", title=title)
    for kind, name in (("wall", "wall"), ("cpu", "CPU, all threads")):
        bare, stream = (f"{report[f'{which}_per_{kind}_second']:.0f} pictures/s" for which in ("bare", "stream"))
        table.add_row(name, bare, stream, f"{report[f'{kind}_ratio']:.2f}")
    Console().print(table)


def run() -> None:
    """The console entry point."""
    run_command(main)


if __name__ == "__main__":
    run()
