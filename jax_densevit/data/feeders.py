"""The two ways to run a training stream: plain threads, and tf.data, which also resizes. Both give the same batches.

Each takes a reader (see `pipeline.Reader`), a number of threads and the step to start at, and returns an endless
iterator of this host's batches and a function that stops it.
"""

import collections
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_densevit.data.crops import resample

if TYPE_CHECKING:
    from jax_densevit.data.pipeline import Reader

CALL_SIZE = 8  # most examples that one call of tf.data into Python reads


def threads_feed(reader: "Reader", threads: int, start_step: int):
    """Batches by a pool of threads, in order; a few batches are read ahead."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="jax_densevit_read")
    ahead = 2 * reader.local_batch + 2 * threads

    def batches():
        place = start_step * reader.local_batch
        pending: collections.deque = collections.deque()
        while True:
            while len(pending) < ahead:
                pending.append(pool.submit(reader, place))
                place += 1
            examples = [pending.popleft().result() for _ in range(reader.local_batch)]
            names = [*reader.names, *(("size",) if reader.crop else ()), "index"]
            yield {name: np.stack([example[name] for example in examples]) for name in names}

    return batches(), lambda: pool.shutdown(wait=False, cancel_futures=True)


def tensorflow_feed(reader: "Reader", threads: int, start_step: int):
    """The same batches by tf.data, which also resizes."""
    tf = _tensorflow()
    resizes = reader.crop is not None and reader.crop.box != (0, 0)
    extra = (["size"] if reader.crop else []) + (["box"] if resizes else [])
    names = [*reader.names, *extra, "index"]
    types = {"image": tf.uint8, "labels": tf.uint8, "instances": tf.uint16, "box": tf.float32}
    height, width = reader.crop.crop if reader.crop else reader.first_size
    shapes = {"image": (None, None, 3) if resizes else (height, width, 3), "size": (2,), "box": (4,), "index": ()}
    # A call into Python costs a tenth of a small image's decoding: several examples share one where sizes are equal.
    at_once = 1 if resizes else max(k for k in range(1, CALL_SIZE + 1) if reader.local_batch % k == 0)

    def read(group):
        examples = [reader(int(group) * at_once + i) for i in range(at_once)]
        return [np.stack([example[name] for example in examples]) for name in names]

    def load(group):
        tensors = tf.numpy_function(read, [group], [types.get(name, tf.int32) for name in names], stateful=False)
        examples = dict(zip(names, tensors, strict=True))
        for name, tensor in examples.items():
            tensor.set_shape((at_once, *shapes.get(name, (height, width))))
        if resizes:
            image, box, size = (examples[name][0] for name in ("image", "box", "size"))
            examples["image"] = resample(image, box, size, reader.crop.crop, reader.crop.fill)[None]
            del examples["box"]
        return examples

    groups = reader.local_batch // at_once  # in a batch
    dataset = tf.data.Dataset.range(start_step * groups, np.iinfo(np.int64).max)
    dataset = dataset.map(load, num_parallel_calls=threads, deterministic=True)
    dataset = dataset.batch(groups, drop_remainder=True).prefetch(2)
    options = tf.data.Options()
    options.autotune.enabled = False
    options.deterministic = True
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    held = [iter(dataset.with_options(options))]

    def batches():
        while held:
            grouped = {name: tensor.numpy() for name, tensor in next(held[0]).items()}
            yield {name: x.reshape(reader.local_batch, *x.shape[2:]) for name, x in grouped.items()}

    return batches(), held.clear


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
