"""What a training would be, found without running it: parameters, where they lie, memory per device, operations.

`--dry_run` prints it. The step is compiled from shapes alone, so nothing of the model's size is ever allocated.
"""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from jax_densevit.training.collectives import Collective, find_collectives
from jax_densevit.training.forecast import CHIPS, UTILISATION, Forecast, forecast
from jax_densevit.training.paths import named_leaves
from jax_densevit.training.sharding import LARGE, large_replicated, size_in_bytes
from jax_densevit.training.state import TrainState
from jax_densevit.training.step import Step

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row of the table: shape and dtype, the mesh axes that divide it, bytes in all and on one device."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: str
    bytes: int
    bytes_per_device: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device while a step runs, as the compiler plans it."""

    arguments: int
    outputs: int
    reused: int  # outputs written over donated arguments
    temporaries: int
    program: int

    @property
    def peak(self) -> int:
        """Everything that exists at the same time."""
        return self.arguments + self.outputs - self.reused + self.temporaries + self.program


@dataclasses.dataclass(frozen=True)
class Overview:
    """The facts that :func:`print_overview` prints.

    Attributes:
      mesh: size by axis; platform: what the devices are.
      batch: (shape, dtype) of the global batch by name.
      parameters: one entry per parameter, in the order of the tree.
      state_bytes, state_bytes_per_device: parameters, average, statistics and optimizer together.
      large_replicated: bytes by path of large parameters that every device holds whole although the mesh could divide.
      memory: of the compiled step; None where the backend does not say.
      compile_seconds: tracing and compiling.
      counted_flops: the compiler's own count for a step over all devices, with the body of a loop counted once; None
        where the backend does not say.
      macs: multiply-accumulates of one forward pass of one example; None if unknown.
      collectives: what the devices send each other in a step.
    """

    mesh: dict[str, int]
    platform: str
    batch: dict[str, tuple[tuple[int, ...], str]]
    parameters: tuple[Parameter, ...]
    state_bytes: int
    state_bytes_per_device: int
    large_replicated: dict[str, int]
    memory: Memory | None
    compile_seconds: float
    counted_flops: float | None
    macs: int | None
    collectives: tuple[Collective, ...]

    @property
    def parameter_count(self) -> int:
        """The number of parameters."""
        return sum(math.prod(parameter.shape) for parameter in self.parameters)

    @property
    def batch_size(self) -> int:
        """Examples of one step."""
        return next(iter(self.batch.values()))[0][0]

    @property
    def step_flops(self) -> int | None:
        """Floating-point operations of a step: two per multiply-accumulate, forward once and backward twice.

        What rematerialisation computes again is not counted: this is the count for model FLOPs utilisation.
        """
        return None if self.macs is None else 2 * 3 * self.macs * self.batch_size

    @property
    def sent(self) -> dict[str, float]:
        """Bytes that each device sends in a step, by kind of collective."""
        total = Counter()
        for one in self.collectives:
            total[one.kind] += one.sent
        return dict(sorted(total.items()))

    @property
    def forecasts(self) -> tuple[Forecast, ...]:
        """The predicted times of a step on every chip whose figures are known; empty where a count is missing."""
        if self.memory is None or self.step_flops is None:
            return ()
        m = self.memory
        touched = m.arguments + m.outputs + 2 * m.temporaries
        flops = self.step_flops / math.prod(self.mesh.values())
        return tuple(forecast(chip, flops, touched, self.collectives) for chip in CHIPS)


def overview(
    step: Step,
    state: TrainState,
    shardings: TrainState,
    batch: Mapping[str, Any],
    *,
    macs: int | None = None,
    minimum_bytes: int = LARGE,
) -> Overview:
    """Compiles a step from shapes and collects what is to be known about it.

    Args:
      step: from `make_train_step`.
      state, shardings: from `abstract_state` and `state_shardings`.
      batch: shapes of a global batch.
      macs: multiply-accumulates of one forward pass of one example, from the model's registry entry.
      minimum_bytes: the size from which a parameter counts as large.
    """
    start = time.perf_counter()
    compiled = step.lower(state, dict(batch)).compile()
    seconds = time.perf_counter() - start
    mesh = shardings.step.mesh
    devices = mesh.devices.size
    costs = compiled.cost_analysis()
    costs = costs[0] if isinstance(costs, list) else costs
    flops = (costs or {}).get("flops")
    rows = zip(named_leaves(state.params).items(), jax.tree.leaves(shardings.params), strict=True)
    pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True))
    return Overview(
        mesh=dict(mesh.shape),
        platform=f"{devices} x {mesh.devices.flat[0].device_kind}",
        batch={name: (tuple(rows.shape), rows.dtype.name) for name, rows in batch.items()},
        parameters=tuple(
            Parameter(name, leaf.shape, leaf.dtype.name, _axes(s), size_in_bytes(leaf), _bytes_per_device(leaf, s))
            for (name, leaf), s in rows
        ),
        state_bytes=sum(size_in_bytes(leaf) for leaf, _ in pairs),
        state_bytes_per_device=sum(_bytes_per_device(leaf, sharding) for leaf, sharding in pairs),
        large_replicated=large_replicated(state.params, shardings.params, minimum_bytes),
        memory=_memory(compiled),
        compile_seconds=seconds,
        counted_flops=None if flops is None or flops < 0 else flops * devices,
        macs=macs,
        collectives=find_collectives(compiled.as_text(), devices) if devices > 1 else (),
    )


def print_overview(facts: Overview, config: str, console: Console | None = None) -> None:
    """Prints a resolved config and the overview of its training.

    Args:
      facts: from :func:`overview`.
      config: the resolved config, as text.
      console: where to print; None is standard output, wide enough for the table where it is no terminal.
    """
    console = console or Console(width=None if Console().is_terminal else 160, highlight=False)

    def say(text: str, **style: Any) -> None:
        console.print(text, markup=False, soft_wrap=True, **style)

    say("Config", style="bold")
    say(config.rstrip() + "\n")
    table = Table("Parameter", "Shape", "Type", "Divided over", box=None, pad_edge=False, title_justify="left")
    for title in ("MiB", "MiB/device"):
        table.add_column(title, justify="right")
    for row in facts.parameters:
        shape = " x ".join(map(str, row.shape)) or "scalar"
        table.add_row(row.path, shape, row.dtype, row.axes, _mib(row.bytes), _mib(row.bytes_per_device))
    console.print(table)
    say(f"\n{facts.parameter_count:,} parameters in {len(facts.parameters)} tensors")
    say(f"Mesh: {', '.join(f'{axis}={size}' for axis, size in facts.mesh.items())} ({facts.platform})")
    for name, (shape, dtype) in facts.batch.items():
        say(f"Batch: {name} {dtype} {list(shape)}")
    say(
        f"State (parameters, average, statistics, optimizer): {_mib(facts.state_bytes)} MiB, "
        f"{_mib(facts.state_bytes_per_device)} MiB on each device"
    )
    for path, size in facts.large_replicated.items():
        say(f"Every device holds all of {path} ({_mib(size)} MiB): no dimension could be divided over the mesh")
    if facts.memory is None:
        say("Memory of a step: this backend does not say")
    else:
        m = facts.memory
        say(
            f"Memory of a step on each device: {_mib(m.peak)} MiB = state and batch {_mib(m.arguments)} + temporaries "
            f"{_mib(m.temporaries)} + new outputs {_mib(m.outputs - m.reused)} + program {_mib(m.program)}"
        )
    if facts.step_flops is None:
        say("Operations: no analytic count for this model")
    else:
        say(
            f"Operations: {facts.macs / 1e9:,.2f} GMACs forward per example, {facts.step_flops / 1e9:,.1f} GFLOP per "
            "step (forward once, backward twice, nothing recomputed)"
        )
    if facts.counted_flops is not None:
        say(
            f"The compiler counts {facts.counted_flops / 1e9:,.1f} GFLOP per step; it counts the body of a loop once: "
            "scanned layers and microbatches make it too low, recomputation makes it higher"
        )
    say(f"Tracing and compiling took {facts.compile_seconds:.1f} s")
    print_network(facts, console)


def print_network(facts: Overview, console: Console) -> None:
    """Prints what a step sends over the network, and what it would take on chips that are not here."""
    times = Counter()
    for one in facts.collectives:
        times[one.kind] += one.times
    for kind, size in facts.sent.items():
        console.print(f"Network: each device sends {_mib(size)} MiB per step in {times[kind]} {kind}s", markup=False)
    if not facts.forecasts:
        return
    table = Table("Predicted step", box=None, pad_edge=False)
    for title in ("compute ms", "memory ms", "network ms", "step ms", "efficiency", "fits"):
        table.add_column(title, justify="right")
    for one in facts.forecasts:
        table.add_row(
            f"{math.prod(facts.mesh.values())} x {one.chip.name}",
            *(f"{1000 * seconds:,.1f}" for seconds in (one.compute, one.memory, one.network)),
            *step_and_efficiency(one),
            "yes" if facts.memory.peak <= one.chip.memory else "no",
        )
    console.print(table)
    console.print(
        f"Computing at {100 * UTILISATION:.0f} % of the peak; from full overlap with the network to none. The model "
        "and the sources of its figures: docs/scaling.md",
        markup=False,
    )


def step_and_efficiency(one: Forecast) -> tuple[str, str]:
    """ "12.3-15.0", "82-100 %": a step with and without overlap, and the share of it in which a chip works."""
    low, high = one.efficiency
    return f"{1000 * one.overlapped:,.1f}-{1000 * one.in_turn:,.1f}", f"{100 * low:.0f}-{100 * high:.0f} %"


def _memory(compiled: Any) -> Memory | None:
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return Memory(
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        reused=analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        program=analysis.generated_code_size_in_bytes,
    )


def _bytes_per_device(leaf: Any, sharding: jax.sharding.NamedSharding) -> int:
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _axes(sharding: jax.sharding.NamedSharding) -> str:
    """ "-, fsdp" for a matrix whose columns are divided; empty for a whole copy everywhere."""
    entries = ["-" if axes is None else axes if isinstance(axes, str) else "+".join(axes) for axes in sharding.spec]
    return ", ".join(entries)


def _mib(size: int) -> str:
    return f"{size / MIB:,.2f}"
