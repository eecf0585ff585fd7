"""Features of every picture, spread over the devices of a mesh; the distances of two sets of them."""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_densevit.data.images import read_image
from jax_densevit.data.order import host_rows
from jax_densevit.data.pipeline import default_threads
from jax_densevit.data.resize_modes import resize_picture
from jax_densevit.distances.networks import FeatureNetwork
from jax_densevit.distances.protocols import PictureSet, Protocol
from jax_densevit.errors import UserError
from jax_densevit.metrics.frechet import SIDES, FrechetDistance, caution
from jax_densevit.metrics.image import colorfulness
from jax_densevit.metrics.kernel_distance import KernelDistance
from jax_densevit.metrics.metric import State
from jax_densevit.metrics.sums import exact_mean
from jax_densevit.training.mesh import batch_shards, put_batch, replicated

PICTURES, REFERENCE = SIDES


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is known of one side: of pictures that were looked at, or out of a file of statistics.

    Attributes:
      frechet, kernel: the side's states of `FrechetDistance` and `KernelDistance`.
      colorfulness: float32 `[n]` of every picture as compared; not a number where it could not be read.
      names: of the pictures, in the same order.
      facts: where they come from. JSON-ready.
      unreadable: why this host could not read some; a sentence each.
    """

    frechet: State
    kernel: State
    colorfulness: np.ndarray
    names: tuple[str, ...]
    facts: dict[str, Any]
    unreadable: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Pictures that were measured."""
        return int(np.isfinite(self.colorfulness).sum())


def measure(
    pictures: PictureSet,
    side: str,
    network: FeatureNetwork,
    protocol: Protocol,
    *,
    mesh: Mesh,
    batch_size: int = 32,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Features of every picture of a set; every host calls it and gets the same.

    Args:
      pictures: the files.
      side: "pictures" or "reference", of the metrics' states.
      network, protocol: whose features, of what of the pictures.
      mesh: batches are laid over it.
      batch_size: of all devices together, rounded up to a multiple of their number.
      progress: called with (pictures done, pictures in all) after every batch.

    Raises:
      UserError: no picture could be read, or some where the protocol needs all.
    """
    shards = batch_shards(mesh)
    batch_size = -(-batch_size // shards) * shards
    metrics = _METRICS
    forward = _forward(network.model, network.scale, mesh)
    variables = jax.device_put(network.variables, replicated(mesh))
    states = {name: metric.empty() for name, metric in metrics.items()}
    color = np.full(len(pictures.names), np.nan, np.float32)
    unreadable: list[str] = []
    done, pending = 0, None

    def take(measured: dict[str, Any]) -> None:
        nonlocal done, states
        measured = jax.device_get(measured)
        states = {
            name: metric.merge(states[name], {side: measured[name][PICTURES]}) for name, metric in metrics.items()
        }
        seen = measured["seen"]
        color[seen["place"][seen["mask"]]] = seen["colorfulness"][seen["mask"]]
        done = min(done + batch_size, len(color))
        progress(done, len(color))

    for batch in _batches(pictures, network, protocol, batch_size, unreadable):
        measured = forward(variables, put_batch(batch, mesh))
        if pending is not None:  # read one batch late: the devices never wait for the host
            take(pending)
        pending = measured
    take(pending)
    found = Measured(
        states["frechet"][side],
        states["kernel"][side],
        color,
        pictures.names,
        {**pictures.facts(), "protocol": protocol.name},
        tuple(unreadable),
    )
    lost = len(color) - found.count
    if lost == len(color) or (lost and protocol.complete):
        first = f"; the first: {unreadable[0]}" if unreadable else ""
        need = "" if lost == len(color) else f", and {protocol.name} needs all"
        raise UserError(f"{lost:,} of {len(color):,} pictures in {pictures.where} cannot be read{need}{first}")
    return found


def compare(pictures: Measured, reference: Measured, network: FeatureNetwork, protocol: Protocol) -> dict[str, Any]:
    """The distances under the names they may have, what they are comparable with, and colorfulness. JSON-ready.

    `delta_colorfulness` is the mean of the pictures less that of the references (negative: too pale); of pairs there is
    `abs_delta_colorfulness` too, the mean over pairs of the difference without its sign.
    """
    sides = (pictures, reference)
    frechet, kernel = (
        metric.compute({side: getattr(it, name) for side, it in zip(SIDES, sides, strict=True)})
        for name, metric in _METRICS.items()
    )
    means = [exact_mean(it.colorfulness[np.isfinite(it.colorfulness)].astype(np.float64)) for it in sides]
    result = {
        network.frechet: frechet["frechet_distance"],
        network.kernel: kernel["kernel_distance"],
        f"{network.kernel}_std": kernel["kernel_distance_std"],
        f"{network.kernel}_subsets": [kernel["subsets"], kernel["subset_size"]],
        "colorfulness": means[0],
        "reference_colorfulness": means[1],
        "delta_colorfulness": means[0] - means[1],
    }
    if protocol.paired:
        theirs = dict(zip(reference.names, reference.colorfulness, strict=True))
        pairs = [abs(float(mine) - float(theirs[name])) for name, mine in _items(pictures)]
        result["abs_delta_colorfulness"] = exact_mean(np.array(pairs))
    counts = (frechet["pictures"], frechet["reference"])
    return {
        **result,
        "caution": " ".join(filter(None, (caution(*counts, frechet["features"]), *_cautions(pictures, reference)))),
        "pictures": {"count": counts[0], **pictures.facts},
        "reference": {"count": counts[1], **reference.facts},
        "protocol": protocol.name,
        "features": {**network.facts(), "features": frechet["features"]},
    }


def _cautions(pictures: Measured, reference: Measured) -> Iterator[str]:
    """What the files themselves do to the distance."""
    if jpegs := pictures.facts.get("jpegs"):
        yield f"{jpegs:,} of the pictures are JPEGs, whose compression alone moves the distance: save them as PNG."
    both = set(pictures.names) & set(reference.names)
    if both and pictures.facts["where"] == reference.facts["where"]:
        yield f"{len(both):,} pictures are on both sides: the distance is too small."


_METRICS = {"frechet": FrechetDistance(), "kernel": KernelDistance()}


def _items(measured: Measured) -> Iterator[tuple[str, float]]:
    return zip(measured.names, measured.colorfulness, strict=True)


@functools.lru_cache(maxsize=4)
def _forward(model: Any, scale: tuple[float, float], mesh: Mesh) -> Callable:
    """The jitted program of a batch, kept for the other side: features, measured; results whole on every host."""

    def forward(variables, batch):
        features = model.apply(variables, (batch.pop("image") - scale[0]) / scale[1]).features["pool"]
        mask, place = batch["mask"], batch["place"]
        return {
            "frechet": _METRICS["frechet"].measure(features, mask=mask),
            "kernel": _METRICS["kernel"].measure(features, mask=mask, place=place),
            "seen": batch,
        }

    return jax.jit(forward, out_shardings=replicated(mesh))


def _batches(
    pictures: PictureSet, network: FeatureNetwork, protocol: Protocol, batch_size: int, unreadable: list[str]
) -> Iterator[dict[str, np.ndarray]]:
    """This host's rows of every batch: "image" float32 0..255 at the network's size, "mask", "place", "colorfulness".

    Reasons why pictures could not be read are added to `unreadable`; their rows are masked.
    """
    rows = host_rows(batch_size, jax.process_index(), jax.process_count())

    def read(place: int) -> tuple[np.ndarray, bool, int, float]:
        if place < len(pictures.paths):
            try:
                image = protocol.prepare(read_image(pictures.paths[place]))
            except UserError as error:
                unreadable.append(str(error))
            else:
                return resize_picture(image, network.size, network.resize), True, place, colorfulness(image)
        return np.zeros((*network.size, 3), np.float32), False, place, 0.0

    threads = default_threads()
    with ThreadPoolExecutor(threads, thread_name_prefix="jax_densevit_read") as pool:
        waiting: collections.deque = collections.deque()
        starts = iter(range(0, len(pictures.paths), batch_size))
        try:
            while True:
                while len(waiting) * (rows.stop - rows.start) < 2 * threads + rows.stop - rows.start:
                    start = next(starts, None)
                    if start is None:
                        break
                    places = range(start + rows.start, start + rows.stop)
                    waiting.append([pool.submit(read, place) for place in places])
                if not waiting:
                    return
                yield _stacked([future.result() for future in waiting.popleft()])
        finally:
            pool.shutdown(cancel_futures=True)


def _stacked(examples: Sequence[tuple[np.ndarray, bool, int, float]]) -> dict[str, np.ndarray]:
    types = {"image": np.float32, "mask": bool, "place": np.int32, "colorfulness": np.float32}
    columns = zip(*examples, strict=True)
    return {name: np.asarray(values, dtype) for (name, dtype), values in zip(types.items(), columns, strict=True)}
