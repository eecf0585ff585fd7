"""The two ways to run a training stream: plain threads, and tf.data, which also resizes. Both give the same batches.

Each takes a reader (see `pipeline.Reader`), a number of threads and the step to start at, and returns an endless
iterator of this host's batches and a function that stops it.
"""

import collections
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_densevit.data.crops import resample

if TYPE_CHECKING:
    from jax_densevit.data.pipeline import Reader

CALL_SIZE = 8  # most examples that a thread reads in one go


def threads_feed(reader: "Reader", threads: int, start_step: int):
    """Batches by a pool of threads, in order; a few batches are read ahead."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="jax_densevit_read")
    at_once = _at_once(reader.local_batch)
    ahead = 2 + -(-2 * threads // (reader.local_batch // at_once))  # batches

    def read(place, batch, first):
        for row in range(first, first + at_once):
            reader(place + row, {name: array[row, ...] for name, array in batch.items()})

    def batches():
        pending: collections.deque = collections.deque()
        for step in itertools.count(start_step):
            batch = reader.empty(reader.local_batch)
            place = step * reader.local_batch
            rows = range(0, reader.local_batch, at_once)
            pending.append((batch, [pool.submit(read, place, batch, row) for row in rows]))
            if len(pending) == ahead:
                batch, futures = pending.popleft()
                for future in futures:
                    future.result()
                yield batch

    return batches(), lambda: pool.shutdown(wait=False, cancel_futures=True)


def tensorflow_feed(reader: "Reader", threads: int, start_step: int):
    """The same batches by tf.data, which also resizes."""
    tf = _tensorflow()
    # Examples that are resized are read one by one, since their images differ in size until then.
    at_once = 1 if reader.resizes else _at_once(reader.local_batch)
    specs = {name: (array.shape, tf.as_dtype(array.dtype)) for name, array in reader.empty(at_once).items()}
    if reader.resizes:
        specs["image"] = ((1, None, None, 3), tf.float32)

    def read(group):
        arrays = reader.empty(at_once)
        for row in range(at_once):
            example = {name: array[row, ...] for name, array in arrays.items()}
            reader(int(group) * at_once + row, example)
        if reader.resizes:
            arrays["image"] = example["image"][None]
        return [arrays[name] for name in specs]

    def load(group):
        tensors = tf.numpy_function(read, [group], [dtype for _, dtype in specs.values()], stateful=False)
        examples = {
            name: tf.ensure_shape(tensor, shape)
            for tensor, (name, (shape, _)) in zip(tensors, specs.items(), strict=True)
        }
        if reader.resizes:
            box = examples.pop("box")[0]
            crop = reader.crop
            examples["image"] = resample(examples["image"][0], box, examples["size"][0], crop.crop, crop.fill)[None]
        return examples

    groups = reader.local_batch // at_once  # in a batch
    dataset = tf.data.Dataset.range(start_step * groups, np.iinfo(np.int64).max)
    dataset = dataset.map(load, num_parallel_calls=threads, deterministic=True)
    if groups > 1:
        dataset = dataset.batch(groups, drop_remainder=True)
    options = tf.data.Options()
    options.autotune.enabled = False
    options.deterministic = True
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    # NumPy's view of a tensor: `tensor.numpy()` would be a copy.
    held = [dataset.prefetch(2).with_options(options).as_numpy_iterator()]

    def batches():
        while held:
            batch = next(held[0])
            yield {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items()} if groups > 1 else batch

    return batches(), held.clear


def _at_once(local_batch: int) -> int:
    """The examples that one call reads: a call into Python costs a tenth of a small image's decoding."""
    return max(k for k in range(1, CALL_SIZE + 1) if local_batch % k == 0)


def _tensorflow() -> Any:
    """TensorFlow, imported when it is first needed and kept away from the accelerators."""
    # No lines about CPU features on a newcomer's screen (nothing here gains from oneDNN).
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import tensorflow as tf

    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:  # someone else has started it already, and decided about its devices
        pass
    return tf
