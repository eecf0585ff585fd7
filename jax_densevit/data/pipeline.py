"""Streams of batches: training forever along the order of the seed, evaluation once over every example.

A training stream is a pure function of (source, seed, step): to resume, start it at the step. tf.data runs it where
images are resized. Where none is, plain threads give the identical stream with less work beside the reading, and
without TensorFlow.
"""

import collections
import dataclasses
import importlib.util
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jax_densevit.data import order
from jax_densevit.data.crops import RandomCrop, aligned_empty
from jax_densevit.data.feeders import tensorflow_feed, threads_feed
from jax_densevit.data.largest_crop import LargestRandomCrop
from jax_densevit.data.source import MAPS, Example, Source, padding_of
from jax_densevit.errors import UserError

Batch = dict[str, np.ndarray]
MAX_BAD_SHARE = 0.05  # of a set's files; a set with more unreadable ones is broken, whatever `on_bad` says
_LOG = logging.getLogger(__name__)


def train_stream(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    crop: tuple[int, int] = (0, 0),
    resize_box: tuple[int, int] = (0, 0),
    resize_ratio: tuple[float, float] = (1.0, 1.0),
    largest_crop: bool = False,
    max_class_ratio: float = 1.0,
    on_bad: str = "fail",
    threads: int = 0,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    feeder: str = "auto",
) -> "TrainStream":
    """This host's rows of every global batch, from `start_step` on, forever.

    Args:
      source: the training set.
      batch_size: the global batch size, a multiple of `process_count`.
      seed: the seed of the order and of every augmentation.
      crop: (height, width) of the training images; (0, 0) when all images have one size and are taken whole.
      resize_box, resize_ratio, max_class_ratio: as in :class:`~jax_densevit.data.crops.RandomCrop`.
      largest_crop: take as much of a picture as the crop's proportions allow and average it to `crop`, see
        :class:`~jax_densevit.data.largest_crop.LargestRandomCrop`.
      on_bad: what an unreadable example does: "fail" raises its error, "skip" takes the next readable one of the same
        epoch in its place (with the augmentation of the place), counts and logs it, and gives up when more than 5 % of
        the set are unreadable.
      threads: how many threads read and decode; 0 = one per core.
      start_step: the first global batch; the stream is the tail of the one that starts at 0.
      process_index, process_count: which host this is of how many.
      feeder: "tensorflow", "threads", or "auto": TensorFlow where images are resized. Both give the same batches; only
        TensorFlow resizes, and threads cost less.

    Returns:
      An iterator of dicts of NumPy arrays: "image" uint8 [b, h, w, 3]; "labels" uint8 [b, h, w] and the
      other `source.MAPS` that the source has; "size" int32 [b, 2], the height and width before padding, if `crop` is
      given; "seed" uint32 [b, 2]; "index" int32 [b]. It has `close()` and `bad`, the number of files skipped so far.

    Raises:
      UserError: from here or from the iterator, in one sentence, whatever thread found the reason.
    """
    crop, resize_box = tuple(crop), tuple(resize_box)
    installed = importlib.util.find_spec("tensorflow") is not None
    if feeder not in ("auto", "tensorflow", "threads"):
        raise UserError(f"feeder is {feeder!r}; it must be 'auto', 'tensorflow' or 'threads'.")
    if on_bad not in ("fail", "skip"):
        raise UserError(f"data.on_bad is {on_bad!r}; it must be 'fail' or 'skip'.")
    if resize_box != (0, 0) and (feeder == "threads" or not installed):
        raise UserError(
            "data.resize_box asks for random resizing, which needs TensorFlow: install tensorflow-cpu, or prepare the "
            "data at a fixed size with `python -m jax_densevit.prepare` and set resize_box to (0, 0)."
        )
    if min(*crop, *resize_box) < 0 or (crop != (0, 0) and min(crop) < 1):
        raise UserError(f"data.crop is {crop} and data.resize_box is {resize_box}; give two positive sizes, or (0, 0).")
    if resize_box != (0, 0) and (crop == (0, 0) or min(resize_box) < 1 or not 0 < resize_ratio[0] <= resize_ratio[1]):
        raise UserError(
            f"data.resize_box {resize_box} with ratio {tuple(resize_ratio)} and crop {crop} is no recipe: "
            "give two positive sides, 0 < low <= high, and a crop."
        )
    if largest_crop and (crop == (0, 0) or resize_box != (0, 0) or max_class_ratio < 1):
        raise UserError("data.largest_crop needs data.crop, and neither data.resize_box nor data.max_class_ratio.")
    reader = Reader(source, batch_size, seed, on_bad, order.host_rows(batch_size, process_index, process_count))
    if largest_crop:
        reader.crop = LargestRandomCrop(crop)
    elif crop != (0, 0):
        fill = tuple(int(255 * m + 0.5) for m in source.info.mean)
        reader.crop = RandomCrop(crop, resize_box, tuple(resize_ratio), max_class_ratio, fill, source.info.ignore)
    if max_class_ratio < 1 and (reader.crop is None or "labels" not in reader.names):
        raise UserError("data.max_class_ratio needs data.crop and a source with labels; set it to 1.")
    feed = tensorflow_feed if reader.resizes or (feeder == "tensorflow" and installed) else threads_feed
    return TrainStream(reader, feed, threads or default_threads(), start_step)


def check_fit(example: Example, names: Sequence[str], size: tuple[int, int]) -> None:
    """Raises a UserError unless the example has all the arrays `names`, each of (height, width) `size`."""
    for name in names:
        if name not in example:
            raise UserError(f"{example['id']} has no {name}, as other examples of its set do.")
        if example[name].shape[:2] != size:
            raise UserError(
                f"{example['id']}: the {name} have (height, width) {example[name].shape[:2]} where {size} is expected; "
                "run `python -m jax_densevit.check_data` to see all such pairs."
            )


def default_threads() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class TrainStream:
    """The iterator that :func:`train_stream` returns."""

    def __init__(self, reader: "Reader", feed: Callable[..., tuple[Iterator, Callable]], threads: int, start_step: int):
        self._reader = reader
        self._step = start_step
        self._bad: set[int] = set()
        self._batches, close = feed(reader, threads, start_step)
        # Before the interpreter goes, or threads of TensorFlow would call into what is no longer there.
        self._finalizer = weakref.finalize(self, close)

    @property
    def bad(self) -> int:
        """How many unreadable files have been skipped in the batches given out so far."""
        return len(self._bad)

    def __iter__(self) -> "TrainStream":
        return self

    def __next__(self) -> Batch:
        if not self._finalizer.alive:
            raise StopIteration
        batch = next(self._batches)
        reader = self._reader
        failed = np.flatnonzero(batch["index"] < 0)
        if failed.size:
            error = reader.failures[self._step * len(batch["index"]) + int(failed[0])]
            self.close()
            raise error
        index, epoch = reader.planned(self._step)
        if (index != batch["index"]).any():
            self._count_bad(index, epoch, batch["index"])
        batch["seed"] = order.augmentation_seeds(reader.seed, epoch, index)
        self._step += 1
        return batch

    def _count_bad(self, planned: np.ndarray, epochs: np.ndarray, taken: np.ndarray) -> None:
        n = len(self._reader.source)
        for index, epoch, instead in zip(planned, epochs, taken, strict=True):
            permutation = order.epoch_order(self._reader.seed, int(epoch), n)
            place = int(np.flatnonzero(permutation == index)[0])
            while permutation[place % n] != instead:
                self._bad.add(int(permutation[place % n]))
                place += 1
        if len(self._bad) > MAX_BAD_SHARE * n:
            self.close()
            raise UserError(
                f"{len(self._bad)} of the {n} training files are unreadable, more than {MAX_BAD_SHARE:.0%}, "
                "the latest being named in the log; run `python -m jax_densevit.check_data` and mend the set."
            )

    def close(self) -> None:
        """Stops reading. The iterator ends; closing twice is harmless."""
        self._finalizer()


class Reader:
    """Reads the example at a place of this host's stream; called from many threads.

    Attributes:
      names: which arrays every example has, "image" first.
      failures: the error of every place that could not be read; its index is -1 in the batch.
    """

    def __init__(self, source: Source, batch_size: int, seed: int, on_bad: str, rows: slice):
        self.source, self.seed = source, int(seed)
        self.batch_size, self.rows = batch_size, rows
        self.skip = on_bad == "skip"
        self.crop: RandomCrop | LargestRandomCrop | None = None
        self.failures: dict[int, Exception] = {}
        first = self._first_example()
        self.names = [name for name in ("image", *MAPS) if name in first]
        self.first_id, self.first_size = first["id"], first["image"].shape[:2]
        self._logged: set[int] = set()

    def _first_example(self) -> Example:
        n = len(self.source)
        order.examples_at(0, 0, n)  # refuses an empty set
        for index in range(n):
            try:
                return self.source.read(index)
            except UserError as error:
                if not self.skip or index >= MAX_BAD_SHARE * n:
                    raise
                _LOG.warning("skipped: %s", error)
        raise AssertionError("unreachable: the loop returns or raises")

    @property
    def local_batch(self) -> int:
        return self.rows.stop - self.rows.start

    @property
    def resizes(self) -> bool:
        return self.crop is not None and self.crop.box != (0, 0)

    def planned(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(index, epoch) of this host's rows of a global batch, were all files readable."""
        positions = step * self.batch_size + np.arange(self.rows.start, self.rows.stop)
        return order.examples_at(positions, self.seed, len(self.source))

    def empty(self, count: int) -> Batch:
        """Room for `count` examples, uninitialised: the arrays that :meth:`__call__` writes, by name.

        When examples are to be resized, "image" is not among them: its size is known only when it is read.
        """
        height, width = self.crop.crop if self.crop else self.first_size
        shapes = {"image": ((height, width, 3), np.uint8), "size": ((2,), np.int32), "box": ((4,), np.float32)}
        shapes |= {name: ((height, width), dtype) for name, dtype in MAPS.items()}
        names = [name for name in self.names if not (self.resizes and name == "image")]
        extra = ["size", "box"] if self.resizes else ["size"] if self.crop else []
        batch = {name: aligned_empty((count, *shapes[name][0]), shapes[name][1]) for name in [*names, *extra]}
        return batch | {"index": np.empty(count, np.int32)}

    def __call__(self, place: int, example: Batch) -> None:
        """Reads the example at `place` = step * local batch + row into a row of :meth:`empty`'s arrays.

        When examples are to be resized, "image" is entered into `example`. A failure is kept in `failures` and gives
        index -1.
        """
        try:
            self._read(place, example)
        except Exception as error:  # raised again by the consumer, in its own thread
            self.failures[place] = error
            example["index"][...] = -1
            if self.resizes:
                example["image"] = np.zeros((1, 1, 3), np.float32)
                example["size"][...] = self.crop.crop
                example["box"][...] = 0

    def _read(self, place: int, out: Batch) -> None:
        n = len(self.source)
        step, row = divmod(place, self.local_batch)
        epoch, at = divmod(step * self.batch_size + self.rows.start + row, n)
        permutation = order.epoch_order(self.seed, epoch, n)
        index, example = self._readable(permutation, at)
        image = example["image"]
        check_fit(example, self.names, image.shape[:2])
        if self.crop:
            self.crop(example, order.augmentation_seed(self.seed, epoch, int(permutation[at])), out)
        elif image.shape[:2] != self.first_size:
            raise UserError(
                f"{example['id']} has size {image.shape[:2]} and {self.first_id} has size {self.first_size}: "
                "set data.crop to (height, width) to train on crops of one size."
            )
        else:
            for name in self.names:
                out[name][...] = example[name]
        out["index"][...] = index

    def _readable(self, permutation: np.ndarray, at: int) -> tuple[int, Example]:
        """The example at a place of an epoch's permutation, or the next one after it that can be read."""
        n = len(permutation)
        for further in range(int(MAX_BAD_SHARE * n) + 2 if self.skip else 1):
            index = int(permutation[(at + further) % n])
            try:
                return index, self.source.read(index)
            except UserError as error:
                last = error
                if self.skip and index not in self._logged:
                    self._logged.add(index)
                    _LOG.warning("skipped: %s", error)
        raise last


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """One batch of an evaluation: images of one size.

    Attributes:
      size: (height, width) of its images.
      indices: the examples; -1 where the batch is only filled up.
    """

    size: tuple[int, int]
    indices: tuple[int, ...]


def evaluation_plan(source: Source, batch_size: int, limit: int = 0) -> list[PlannedBatch]:
    """Groups examples by exact size into batches, the last one of each size filled up: every example exactly once.

    Args:
      source: what is evaluated; sizes come from `source.size`, nothing is decoded.
      batch_size: the global batch size.
      limit: take only the first so many examples; 0 = all.

    Returns:
      The batches, the same on every host. Sizes come in ascending order and examples in theirs.

    Raises:
      UserError: nothing to evaluate, a batch size below 1, or a file without a readable header.
    """
    if batch_size < 1:
        raise UserError(f"The evaluation batch size is {batch_size}; it must be at least 1.")
    n = min(limit, len(source)) if limit else len(source)
    if n < 1:
        raise UserError(f"There is nothing to evaluate: {source.info.name!r} has no examples.")
    groups = collections.defaultdict(list)
    with ThreadPoolExecutor(default_threads()) as pool:
        for index, size in enumerate(pool.map(source.size, range(n))):
            groups[tuple(int(side) for side in size)].append(index)
    plan = []
    for size in sorted(groups):
        for start in range(0, len(groups[size]), batch_size):
            indices = groups[size][start : start + batch_size]
            plan.append(PlannedBatch(size, tuple(indices + [-1] * (batch_size - len(indices)))))
    return plan


def evaluation_stream(
    source: Source,
    plan: Sequence[PlannedBatch],
    *,
    threads: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """This host's rows of every planned batch, once.

    Yields:
      "image" uint8 [b, H, W, 3], "labels" uint8 [b, H, W] and other maps (`source.MAPS`) if the source has them,
      "mask" bool [b], False where the batch is only filled up (black, all ignored), "index" int32 [b], -1 there.

    Raises:
      UserError: an unreadable file (evaluation never leaves one out), or a batch size that the hosts cannot share.
    """
    threads = threads or default_threads()
    if not plan:
        return
    rows = order.host_rows(len(plan[0].indices), process_index, process_count)
    first = source.read(plan[0].indices[0])
    names = [name for name in ("image", *MAPS) if name in first]

    def read(index: int, size: tuple[int, int]) -> Example:
        if index < 0:
            return {
                name: np.full_like(
                    first[name], padding_of(name, source.info.ignore), shape=(*size, *first[name].shape[2:])
                )
                for name in names
            }
        example = source.read(index)
        check_fit(example, names, size)
        return example

    pool = ThreadPoolExecutor(threads, thread_name_prefix="jax_densevit_read")
    try:
        pending: collections.deque = collections.deque()
        todo = iter(plan)
        while True:
            while sum(len(futures) for _, futures in pending) < 2 * threads + rows.stop - rows.start:
                planned = next(todo, None)
                if planned is None:
                    break
                indices = planned.indices[rows]
                pending.append((indices, [pool.submit(read, index, planned.size) for index in indices]))
            if not pending:
                return
            indices, futures = pending.popleft()
            examples = [future.result() for future in futures]
            batch = {name: np.stack([example[name] for example in examples]) for name in names}
            batch["index"] = np.array(indices, np.int32)
            batch["mask"] = batch["index"] >= 0
            yield batch
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
