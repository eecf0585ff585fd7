"""How the same numbers lie in their arrays and in ours: pairs of maps that undo each other, bit for bit."""

import dataclasses
from collections.abc import Callable, Sequence
from math import prod

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """One entry's maps. Both make views where they can.

    Attributes:
      ours: (their arrays, our shape) -> our array.
      theirs: our array -> their arrays.
      positions: whether the array is a position table, which may have another number of rows.
    """

    ours: Callable[[Sequence[np.ndarray], Shape], np.ndarray]
    theirs: Callable[[np.ndarray], Sequence[np.ndarray]]
    positions: bool = False


def _one(ours: Callable, theirs: Callable, **options) -> Layout:
    return Layout(lambda arrays, shape: ours(arrays[0]).reshape(shape), lambda array: [theirs(array)], **options)


def transposed(*axes: int) -> Layout:
    """Their axes in the order of ours."""
    back = tuple(int(axis) for axis in np.argsort(axes))
    return _one(lambda x: x.transpose(axes), lambda x: x.transpose(back))


def linear(inputs: int = 1) -> Layout:
    """PyTorch's `[out, in]`; ours has its first `inputs` axes for the input, the others for the output."""
    return _one(lambda x: x.T, lambda x: x.reshape(prod(x.shape[:inputs]), -1).T)


def split_linear(*parts: int) -> Layout:
    """Several `[out, in]` matrices, such as queries and keys with values, for our one `[in, sum(parts), ...]`."""
    stops = np.cumsum(parts)[:-1]

    def theirs(x):
        return [part.reshape(len(part), -1).T for part in np.split(x, stops, axis=1)]

    return Layout(lambda arrays, shape: np.concatenate(arrays).T.reshape(shape), theirs)


def split(*parts: int) -> Layout:
    """Several vectors, one after the other, for our one `[sum(parts), ...]`."""
    stops = np.cumsum(parts)[:-1]

    def theirs(x):
        return [part.reshape(-1) for part in np.split(x, stops)]

    return Layout(lambda arrays, shape: np.concatenate(arrays).reshape(shape), theirs)


def stacked(axis: int) -> Layout:
    """Several arrays as one with a further axis."""
    return Layout(
        lambda arrays, shape: np.stack(arrays, axis).reshape(shape),
        lambda x: [np.take(x, i, axis) for i in range(x.shape[axis])],
    )


SAME = _one(lambda x: x, lambda x: x)
FLAT = _one(lambda x: x, lambda x: x.reshape(-1))
POSITIONS = dataclasses.replace(SAME, positions=True)
LINEAR = linear()
CONV = transposed(2, 3, 1, 0)  # [out, in, h, w] -> [h, w, in, out]; depthwise [C, 1, h, w] -> [h, w, 1, C]
CONV_1X1 = _one(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])  # to a dense kernel [in, out]
UPSAMPLE = transposed(2, 3, 0, 1)  # a transposed convolution's [in, out, h, w] -> [h, w, in, out]
QKV = LINEAR  # [3 D, D] -> [D, 3, heads, d]
OUT = linear(2)  # [D, D] -> [heads, d, D]
QKV_APART, QKV_BIAS_APART = split_linear(1, 1, 1), split(1, 1, 1)
Q_KV_APART, Q_KV_BIAS_APART = split_linear(1, 2), split(1, 2)
