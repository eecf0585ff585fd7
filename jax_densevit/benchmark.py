"""`python -m jax_densevit.benchmark`: times models forward and in training, alone or in turn with their peers.

    python -m jax_densevit.benchmark --models vit:B/16@224 unet:64@256 --batch 8 --train
    python -m jax_densevit.benchmark --models vit:B/16@224 --batch 8 --train --peers

A model is `name`, `name:variant`, `name@size` or `name:variant@HEIGHTxWIDTH`. Times are medians over rounds; in a round
every contender runs once, so that a slow moment of the machine hits them alike. Compile time is apart. The batch is
random and already on the device, and one device computes: this measures models, not input pipelines or meshes.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from jax_densevit.console import progress_bar, run_command
from jax_densevit.errors import UserError
from jax_densevit.models.registry import example_inputs, find_model
from jax_densevit.timing import Contender, Job, build_model, parse_job, time_in_turn
from jax_densevit.training.allocator import keep_freed_memory
from jax_densevit.training.hardware import peak_flops


def own_contenders(job: Job, batch: int, train: bool, options: Mapping[str, Any], seed: int = 0) -> list[Contender]:
    """Our model, compiled: its forward pass (evaluation) and, if asked, one AdamW step with a cross-entropy loss."""
    model = build_model(job, options)
    inputs = [_draw(shape, seed) for shape in example_inputs(model, job.size, batch)]
    variables = jax.jit(model.init)(jax.random.key(seed), *(x[:1] for x in inputs))
    params = variables.pop("params")
    macs = find_model(job.name).macs(model, job.size)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))

    def contender(kind, function, arguments, passes):
        start = time.perf_counter()
        lowered = function.lower(*arguments)
        traced = time.perf_counter()
        compiled = lowered.compile()
        done = time.perf_counter()
        facts = {
            "parameters": parameters,
            "flops": 2 * macs * batch * passes,
            "trace_seconds": traced - start,
            "compile_seconds": done - traced,
            "memory_bytes": _memory(compiled),
        }
        return compiled, facts

    def forward(params, rest, inputs):
        return model.apply({"params": params, **rest}, *inputs, train=False).logits

    compiled, facts = contender("forward", jax.jit(forward), (params, variables, inputs), 1)
    last = [None]

    def run_forward():
        last[0] = compiled(params, variables, inputs)

    contenders = [Contender("jax_densevit", "forward", run_forward, lambda: jax.block_until_ready(last), facts=facts)]
    if not train:
        return contenders

    optimizer = optax.adamw(1e-4, weight_decay=0.05)
    dropout = jax.random.key(seed + 1)

    def step(state, inputs):
        params, rest, moments = state

        def loss_of(params):
            out, updates = model.apply(
                {"params": params, **rest}, *inputs, train=True, rngs={"dropout": dropout}, mutable=list(rest)
            )
            # The heads are all that a model answers with in training, but for its intermediate maps.
            heads = out.replace(features={}) if hasattr(out, "features") else out
            return sum(map(_cross_entropy, jax.tree.leaves(heads))), updates

        (loss, updates), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        changes, moments = optimizer.update(gradients, moments, params)
        return (optax.apply_updates(params, changes), {**rest, **updates}, moments), loss

    # Donated, so the forward pass must not hold the same buffers.
    state = (jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, variables), jax.jit(optimizer.init)(params))
    compiled_step, facts = contender("train step", jax.jit(step, donate_argnums=0), (state, inputs), 3)
    held = [state]

    def run_step():
        held[0], _ = compiled_step(held[0], inputs)

    contenders.append(
        Contender("jax_densevit", "train step", run_step, lambda: jax.block_until_ready(held), facts=facts)
    )
    return contenders


def _draw(shape: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    """Standard normal numbers, or zeros where integers are wanted (what they may be is the model's own matter)."""
    if jnp.issubdtype(shape.dtype, jnp.floating):
        return jax.random.normal(jax.random.key(seed), shape.shape, shape.dtype)
    return jnp.zeros(shape.shape, shape.dtype)


def _cross_entropy(logits: jax.Array) -> jax.Array:
    """Mean cross-entropy against class 0 over all positions: the arithmetic of a real loss, without labels to feed."""
    return -jax.nn.log_softmax(logits.astype(jnp.float32))[..., 0].mean()


def _memory(compiled) -> int | None:
    """Bytes one execution holds at most: arguments, results and temporaries, donated buffers counted once."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return held - analysis.alias_size_in_bytes


def measured_peak(dtype: Any, rounds: int = 5) -> float:
    """FLOP/s of the best of `rounds` large square matrix products on the first device: a floor of its true peak."""
    side = 2048 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.dot)
    contender = Contender("peak", "product", lambda: product(x, x).block_until_ready(), lambda: None)
    (seconds,) = time_in_turn([contender], rounds)
    return 2 * side**3 / min(seconds)


def report_row(job: Job, contender: Contender, seconds: Sequence[float], batch: int, peak: float) -> dict[str, Any]:
    """The numbers of one contender: median and spread of its times, rates, share of `peak` FLOP/s."""
    median = statistics.median(seconds)
    row = {
        "model": str(job),
        "contender": contender.label,
        "same_architecture": contender.same,
        "kind": contender.kind,
        "batch": batch,
        "rounds": len(seconds),
        "median_seconds": median,
        "min_seconds": min(seconds),
        "max_seconds": max(seconds),
        "images_per_second": batch / median,
        **contender.facts,
    }
    if "flops" in contender.facts:
        row["tflops_per_second"] = contender.facts["flops"] / median / 1e12
        row["mfu"] = contender.facts["flops"] / median / peak
    return row


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Writes into every peer's row how many times faster ours was: `ratio`, of medians, and `ratio_of_minima`."""
    ours = {(row["model"], row["kind"]): row for row in rows if row["contender"] == "jax_densevit"}
    for row in rows:
        own = ours[row["model"], row["kind"]]
        if row is not own:
            row["ratio"] = row["median_seconds"] / own["median_seconds"]
            row["ratio_of_minima"] = row["min_seconds"] / own["min_seconds"]


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    device = jax.devices()[0]
    versions = {}
    for package in ("jax", "jaxlib", "flax", "optax"):
        versions[package] = metadata.version(package)
    return {
        "device": device.device_kind if device.platform != "cpu" else _processor(),
        "platform": device.platform,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(argv: Sequence[str]) -> None:
    """Parses the command line, times, prints the table or the JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_densevit.benchmark", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["vit:B/16@224", "unet:64@256"], help="name:variant@size ...")
    parser.add_argument("--batch", type=int, default=8, help="images per batch (default 8)")
    parser.add_argument("--train", action="store_true", help="time a training step (AdamW) too")
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds (default 10)")
    parser.add_argument("--dtype", default="float32", help="type of the computation (default float32)")
    parser.add_argument("--scan", action="store_true", help="scan over the layers of encoders")
    parser.add_argument("--attention", default="xla", help="attention implementation of encoders (default xla)")
    parser.add_argument("--peers", action="store_true", help="time timm, transformers, ... in the same rounds")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    if arguments.batch < 1 or arguments.rounds < 1:
        raise UserError("--batch and --rounds must be at least 1.")
    jobs = [parse_job(text) for text in arguments.models]
    keep_freed_memory()  # for ours and the peers alike; nothing has asked JAX for its devices yet
    peers = None
    if arguments.peers:
        from jax_densevit import benchmark_peers as peers  # PyTorch and its friends are an extra

        peers.check_installed(jax.default_backend(), arguments.dtype)
    options = {"dtype": arguments.dtype, "scan": arguments.scan, "attention": arguments.attention}
    peak = peak_flops(jax.devices()[0])
    peak_source = "data sheet"
    if peak is None:
        peak, peak_source = measured_peak(arguments.dtype), "best matrix product measured here"
    timed, notes = [], []
    for job in jobs:
        contenders = own_contenders(job, arguments.batch, arguments.train, options)
        if peers is not None:
            others, note = peers.contenders(job, arguments.batch, arguments.train, arguments.dtype)
            contenders += others
            notes += [note] if note else []
        with progress_bar(str(job)) as progress:
            seconds = time_in_turn(contenders, arguments.rounds, progress=progress)
        # Only the facts stay: the next model needs the memory of this one.
        results = [dataclasses.replace(contender, call=None, wait=None) for contender in contenders]
        timed += [(job, result, times) for result, times in zip(results, seconds, strict=True)]
    if peak_source != "data sheet":
        # Once more, so that other programs' load during the first measurement does not flatter the models.
        peak = max(peak, measured_peak(arguments.dtype))
    rows = [report_row(job, contender, times, arguments.batch, peak) for job, contender, times in timed]
    add_ratios(rows)
    where = machine()
    if peers is not None:
        where["versions"] |= peers.versions()
    report = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", "jax_densevit.benchmark", *argv]),
        "machine": where,
        "dtype": arguments.dtype,
        "peak_tflops": peak / 1e12,
        "peak_source": peak_source,
        "notes": notes,
        "results": rows,
    }
    if arguments.json:
        print(json.dumps(report, indent=1))
    else:
        _print(report)


def _print(report: dict[str, Any]) -> None:
    where = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    lines = [
        report["date"],
        f"{where['device']} ({where['platform']}), {where['cores']} cores; Python {where['python']}, {versions}",
        f"batch {report['results'][0]['batch']}, {report['dtype']}; "
        f"peak {report['peak_tflops']:.3g} TFLOP/s ({report['peak_source']})",
    ]
    table = Table(caption="ratio: how many times the time of jax_densevit, medians of alternating rounds (minima)")
    table.add_column("model")
    table.add_column("contender")
    table.add_column("what")
    for column in ("median ms", "min ms", "images/s", "TFLOP/s", "MFU", "compile s", "memory MB", "ratio"):
        table.add_column(column, justify="right")
    for row in report["results"]:
        ratio = f"{row['ratio']:.2f} ({row['ratio_of_minima']:.2f})" if "ratio" in row else ""
        memory = row.get("memory_bytes")
        table.add_row(
            row["model"],
            row["contender"] + ("" if row["same_architecture"] else " *"),
            row["kind"],
            f"{row['median_seconds'] * 1e3:.1f}",
            f"{row['min_seconds'] * 1e3:.1f}",
            f"{row['images_per_second']:.2f}",
            f"{row['tflops_per_second']:.3f}" if "mfu" in row else "",
            f"{row['mfu']:.0%}" if "mfu" in row else "",
            f"{row['trace_seconds'] + row['compile_seconds']:.1f}" if "compile_seconds" in row else "",
            f"{memory / 1e6:.0f}" if memory else "",
            ratio,
        )
    # Through a pipe there is no width to fit into: never cut a number.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    for line in lines:
        console.print(line, highlight=False)
    console.print(table)
    for note in report["notes"]:
        console.print(note, highlight=False)


def run() -> None:
    """The console entry point."""
    run_command(main)


if __name__ == "__main__":
    run()
