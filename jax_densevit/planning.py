"""What a training would be on machines that are not here: `--dry_run`, and `--dry_run --devices=8,64,256`.

For devices that are not here the step is compiled for as many virtual ones, which a CPU plays; nothing is computed on
them. That takes a process of its own, because their number is fixed when JAX starts.
"""

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Sequence

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from jax_densevit.errors import UserError
from jax_densevit.experiment import build, stream_of
from jax_densevit.layers.kernel_gradient import as_on_accelerators
from jax_densevit.training.overview import Overview, overview, print_overview, step_and_efficiency
from jax_densevit.training.parts import prepare

_FLAG = "--xla_force_host_platform_device_count"


def device_counts(text: str | None) -> tuple[int, ...]:
    """The numbers of `--devices=8,64,256`; `UserError` for what is none."""
    counts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if not all(count.isdecimal() and int(count) > 0 for count in counts) or (text is not None and not counts):
        raise UserError(f"--devices={text} must be a number of devices, or several with commas, such as 8,64,256.")
    return tuple(map(int, counts))


def virtual_devices(count: int, argv: Sequence[str]) -> int | None:
    """Runs the training command again in a process with `count` virtual devices and returns its exit code.

    None where this process has enough of them already.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    given = re.search(rf"{_FLAG}=(\d+)", flags)
    if given and int(given[1]) >= count and os.environ.get("JAX_PLATFORMS") == "cpu":
        return None
    flags = " ".join([*(flag for flag in flags.split() if not flag.startswith(_FLAG)), f"{_FLAG}={count}"])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.run([sys.executable, "-m", "jax_densevit.train", *argv], env=environment).returncode


def dry_run(config: ConfigDict, counts: Sequence[int] = ()) -> None:
    """Prints the resolved config, parameters, shardings, memory per device, FLOPs, network and predicted step times.

    Args:
      config: of the experiment.
      counts: numbers of devices to plan for; none: the devices that are here. With several the batch of the config is
        that of the first number and grows with the devices, and a table compares them.
    """
    if len(counts) < 2:
        facts = plan(config, counts[0] if counts else None)
        if jax.process_index() == 0:
            print_overview(facts, str(config))
        return
    found = []
    for count in counts:
        scaled = config.copy_and_resolve_references()
        if config.batch_size * count % counts[0]:
            raise UserError(
                f"batch_size {config.batch_size} on {counts[0]} devices cannot be scaled to {count} devices."
            )
        scaled.batch_size = config.batch_size * count // counts[0]
        found.append(plan(scaled, count))
        print(f"{count} devices: compiled in {found[-1].compile_seconds:.0f} s", file=sys.stderr, flush=True)
    print_scaling(found)


def plan(config: ConfigDict, devices: int | None = None) -> Overview:
    """The facts of a training on the first `devices` devices (all of them by default), compiled but not run."""
    experiment = build(config, None if devices is None else jax.devices()[:devices])
    # One example says what all of a batch look like.
    one = config.copy_and_resolve_references()
    one.batch_size = jax.process_count()
    stream = stream_of(one, experiment.source)
    try:
        rows = next(iter(stream))
    finally:
        stream.close()
    batch = {
        name: jax.ShapeDtypeStruct((config.batch_size, *value.shape[1:]), value.dtype) for name, value in rows.items()
    }
    with contextlib.nullcontext() if devices is None else as_on_accelerators():
        parts = prepare(experiment, batch)
        return overview(parts.step, parts.abstract, parts.shardings, batch, macs=experiment.macs())


def print_scaling(found: Sequence[Overview], console: Console | None = None) -> None:
    """Prints plans for several numbers of devices side by side: memory and network, then predicted steps."""
    console = console or Console(width=None if Console().is_terminal else 160, highlight=False)
    kinds = sorted({kind for facts in found for kind in facts.sent})
    table = Table("Devices", "data x fsdp x tensor", box=None, pad_edge=False, title_justify="left")
    for title in ("batch", "GiB/device", *(f"{kind} MiB" for kind in kinds)):
        table.add_column(title, justify="right")
    for facts in found:
        memory = "?" if facts.memory is None else f"{facts.memory.peak / 2**30:.2f}"
        sent = (f"{facts.sent.get(kind, 0) / 2**20:,.0f}" for kind in kinds)
        sizes = facts.mesh.values()
        table.add_row(f"{_devices(facts)}", " x ".join(map(str, sizes)), str(facts.batch_size), memory, *sent)
    console.print(f"{found[0].parameter_count:,} parameters. Memory of a step; sent by each device per step:")
    console.print(table)
    console.print("\nPredicted step in ms, and efficiency; each from full overlap with the network to none:")
    table = Table("Devices", box=None, pad_edge=False)
    for one in found[0].forecasts:
        table.add_column(one.chip.name, justify="right")
    for facts in found:
        cells = ("  ".join(step_and_efficiency(one)) for one in facts.forecasts)
        table.add_row(str(_devices(facts)), *cells)
    console.print(table)


def _devices(facts: Overview) -> int:
    data, fsdp, tensor = facts.mesh.values()
    return data * fsdp * tensor
