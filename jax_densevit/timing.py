"""What is timed, and how: contenders take turns, so that a slow moment of the machine hits them alike."""

import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_densevit.errors import UserError
from jax_densevit.models.registry import create_model, find_model

# A timed group of calls lasts at least this long: short calls are repeated, and waited for together.
GROUP_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Job:
    """One model to time: registered name, variant, image (height, width)."""

    name: str
    variant: str
    size: tuple[int, int]

    def __str__(self) -> str:
        height, width = self.size
        return f"{self.name}:{self.variant}@{height if height == width else f'{height}x{width}'}"


@dataclasses.dataclass
class Contender:
    """One thing to time in turn with others.

    Attributes:
      label: who it is, such as "jax_densevit" or "timm 1.0".
      kind: "forward" or "train step".
      call: runs it once, possibly asynchronously.
      wait: returns when everything that was called is done.
      same: whether it is the same architecture as the job's model.
      facts: further numbers for the report.
    """

    label: str
    kind: str
    call: Callable[[], Any]
    wait: Callable[[], Any]
    same: bool = True
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def parse_job(text: str) -> Job:
    """Reads `name[:variant][@size]`; `UserError` for what is not registered or not a size."""
    match = re.fullmatch(r"([^:@]+)(?::([^@]+))?(?:@(\d+)(?:x(\d+))?)?", text)
    if not match:
        raise UserError(f"{text!r} is no model to time; write name:variant@size, such as vit:B/16@224.")
    entry = find_model(match[1])
    variant = match[2] or entry.default_variant
    height = int(match[3] or entry.image_size[0])
    width = int(match[4] or match[3] or entry.image_size[1])
    create_model(entry.name, variant)  # says at once which variants there are
    return Job(entry.name, variant, (height, width))


def build_model(job: Job, options: Mapping[str, Any]) -> Any:
    """The Flax module of a job, with those of `options` that it has."""
    entry = find_model(job.name)
    options = {"image_size": job.size, **options}
    return create_model(job.name, job.variant, **{k: v for k, v in options.items() if k in entry.options})


def time_in_turn(
    contenders: Sequence[Contender],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[float]]:
    """Seconds per call of every contender in every round, after two unmeasured calls each.

    Returns:
      For each contender a list of `rounds` numbers. Calls shorter than `GROUP_SECONDS` are repeated in a group.
    """
    repeats = []
    for contender in contenders:
        contender.call()
        contender.wait()
        start = clock()
        contender.call()
        contender.wait()
        repeats.append(max(1, min(1000, math.ceil(GROUP_SECONDS / max(clock() - start, 1e-9)))))
    seconds = [[] for _ in contenders]
    for done in range(rounds):
        progress(done, rounds)
        for times, contender, repeat in zip(seconds, contenders, repeats, strict=True):
            start = clock()
            for _ in range(repeat):
                contender.call()
            contender.wait()
            times.append((clock() - start) / repeat)
    return seconds
