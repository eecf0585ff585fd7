"""How long a step would take on chips that are not here: a simple model of compute, memory and network.

For every chip three times per step are computed from figures that its maker publishes:

* compute: the model's operations (forward once, backward twice) at `UTILISATION` of the peak of 16-bit matrix products;
* memory: state and batch read, new state written, every temporary written and read once, at the HBM's bandwidth;
* network: every collective of the compiled step by ring algorithms, first among the chips of a group that share a fast
  network, then between such domains, over which each chip sends its share.

A chip is busy for the larger of compute and memory. With perfect overlap a step takes the larger of that and network,
with none their sum. Latencies, the input pipeline and imbalance are left out: they make small steps slower than this.
"""

import dataclasses
from collections.abc import Iterable

from jax_densevit.training.collectives import Collective
from jax_densevit.training.hardware import peak_of

# Share of the peak that a model's own operations reach while a chip computes, recomputed layers not counted: an
# assumption. Published for large, tuned transformers: PaLM 0.46, ViT-22B 0.55.
UTILISATION = 0.4

_TPU = "docs.cloud.google.com/tpu/docs/{} (peak, HBM, chips per pod); jax-ml.github.io/scaling-book/tpus (links, DCN)"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip; rates in bytes per second.

    Attributes:
      name: as in `jax_densevit.training.hardware`, which knows the peak.
      memory: bytes of HBM; memory_rate: how fast they are read.
      domain: chips that share the fast network: a TPU pod's torus, the GPUs of one NVLink node.
      fast: what a chip sends within the domain: along one axis of the torus in both directions, or NVLink one way.
      slow: what a chip sends beyond it.
      source: where the figures are published.
    """

    name: str
    memory: float
    memory_rate: float
    domain: int
    fast: float
    slow: float
    source: str

    @property
    def peak(self) -> float:
        """FLOP/s in 16-bit matrix products."""
        return peak_of(self.name)


CHIPS = (
    Chip("TPU v4", 32e9, 1200e9, 4096, 90e9, 6.25e9, _TPU.format("v4")),
    Chip("TPU v5e", 16e9, 819e9, 256, 90e9, 3.125e9, _TPU.format("v5e")),
    Chip("TPU v5p", 95e9, 2765e9, 8960, 180e9, 6.25e9, _TPU.format("v5p")),
    Chip("TPU v6e", 32e9, 1600e9, 256, 180e9, 12.5e9, _TPU.format("v6e")),
    Chip("A100", 80e9, 2039e9, 8, 300e9, 25e9, "NVIDIA A100 80GB SXM data sheet; DGX A100: 8 x 200 Gb/s"),
    Chip("H100", 80e9, 3350e9, 8, 450e9, 50e9, "NVIDIA H100 SXM data sheet; DGX H100: 8 x 400 Gb/s"),
)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Seconds per step on one chip: see the text of this module."""

    chip: Chip
    compute: float
    memory: float
    network: float

    @property
    def busy(self) -> float:
        """How long a chip works, were the network infinitely fast."""
        return max(self.compute, self.memory)

    @property
    def overlapped(self) -> float:
        """A step whose collectives run beside the computation."""
        return max(self.busy, self.network)

    @property
    def in_turn(self) -> float:
        """A step whose collectives wait for the computation, and it for them."""
        return self.busy + self.network

    @property
    def efficiency(self) -> tuple[float, float]:
        """Share of a step in which the chip works, (without, with) overlap: the speed per chip against one alone."""
        return self.busy / self.in_turn, self.busy / self.overlapped


def forecast(chip: Chip, flops: float, touched: float, collectives: Iterable[Collective]) -> Forecast:
    """The times of one step.

    Args:
      chip: one of `CHIPS`.
      flops: of one step on one chip.
      touched: bytes that one chip reads and writes in its memory.
      collectives: of the compiled step.
    """
    network = sum(one.times * network_seconds(one, chip) for one in collectives)
    return Forecast(chip, flops / (UTILISATION * chip.peak), touched / chip.memory_rate, network)


def network_seconds(one: Collective, chip: Chip) -> float:
    """Seconds of a collective, once: within the fast network, then between its domains with each chip's share."""
    near = sum(device // chip.domain == one.group[0] // chip.domain for device in one.group)
    far = len({device // chip.domain for device in one.group})
    if one.kind in ("collective-permute", "collective-broadcast"):
        return one.bytes / (chip.fast if far == 1 else chip.slow)
    seconds = one.bytes * ((near - 1) / near / chip.fast + (far - 1) / far / near / chip.slow)
    return 2 * seconds if one.kind == "all-reduce" else seconds
