"""Resizing of feature maps, logits and label maps `[..., height, width, channels]`.

:func:`resize_bilinear` gives the numbers of PyTorch's `F.interpolate(mode="bilinear")`, up and down, in both
conventions for the corners: what every published dense model was trained with. There is no antialiasing; the
photographs of the data pipeline are resized elsewhere.
"""

import jax
import jax.numpy as jnp
import numpy as np


def resize_bilinear(x: jax.Array, size: tuple[int, int], align_corners: bool = False) -> jax.Array:
    """Resizes the two axes before the last by linear interpolation between the two nearest samples.

    Args:
      x: `[..., h, w, C]`, a floating-point type. Half precision is interpolated in float32 and rounded once.
      size: (height, width) of the result.
      align_corners: False puts output sample i at `(i + 0.5) * h / height - 0.5` (clamped to the border), the pixel
        areas coincide; True puts it at `i * (h - 1) / (height - 1)`, the centres of the corner pixels coincide.

    Returns:
      `[..., height, width, C]` of the type of `x`.

    Raises:
      TypeError: `x` is not floating point (label maps are never interpolated).
      ValueError: `size` is not positive.
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"resize_bilinear needs floating-point values, not {x.dtype}")
    _check_size(size)
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = [(x.ndim - 3, size[0]), (x.ndim - 2, size[1])]
    # The axis that grows least goes first: less to carry into the second.
    axes.sort(key=lambda axis: axis[1] / x.shape[axis[0]])
    for axis, length in axes:
        y = _resize_axis(y, axis, length, align_corners)
    return y.astype(x.dtype)


def resize_area(x: np.ndarray | jax.Array, size: tuple[int, int]) -> np.ndarray | jax.Array:
    """Resizes an integer picture `[..., h, w, C]` by the mean over the area of each output pixel.

    Pixels on the edge of an area count by the part inside, and means are rounded to the nearest, halves to the even
    number: `tf.image.resize(method="area")` with its result rounded, in exact integer arithmetic. Down by a whole
    factor this is the mean of blocks, up by a whole factor every pixel is repeated.

    Args:
      x: integers of magnitude below 256; NumPy arrays are resized on the host, JAX arrays where they are.
      size: (height, width).

    Returns:
      int32 `[..., height, width, C]`, NumPy if `x` is.

    Raises:
      ValueError: `size` is not positive, or a JAX array's pictures have over 8 million pixels (sums are int32).
    """
    _check_size(size)
    given = x.shape[-3:-1]
    count = given[0] * given[1]
    if isinstance(x, np.ndarray):
        total = x.astype(np.int32 if count <= 2**23 else np.int64)
        for axis, want in zip((-3, -2), size, strict=True):
            total = _total_area_on_host(total, total.ndim + axis, want)
        return _round_half_even(total, count, np).astype(np.int32)
    if count > 2**23:
        raise ValueError(f"resize_area of a JAX array takes at most 8 million pixels, not {given[0]} x {given[1]}")
    x = x.astype(jnp.int32)
    for axis, (have, want) in zip((-3, -2), zip(given, size, strict=True), strict=True):
        x = _total_area(x, x.ndim + axis, have, want)
    return _round_half_even(x, count, jnp)


def _total_area(x: jax.Array, axis: int, have: int, want: int) -> jax.Array:
    """Sums over the areas along one axis, in units of 1 / want of a pixel."""
    if have % want == 0:
        x = x.reshape(*x.shape[:axis], want, have // want, *x.shape[axis + 1 :])
        return x.sum(axis + 1) * want
    if want % have == 0:
        return jnp.repeat(x, want // have, axis=axis) * have
    return jnp.moveaxis(jnp.tensordot(jnp.asarray(area_weights(have, want)), x, axes=((1,), (axis,))), 0, axis)


def _total_area_on_host(x: np.ndarray, axis: int, want: int) -> np.ndarray:
    """The same in NumPy, by the few pixels that each area touches: a product with the whole matrix takes longer."""
    have = x.shape[axis]
    start = np.arange(want) * have
    first, last = start // want, (start + have - 1) // want
    total = 0
    for further in range(int((last - first).max()) + 1):
        at = first + further
        part = np.clip(np.minimum(start + have, (at + 1) * want) - np.maximum(start, at * want), 0, None)
        shape = [-1 if i == axis else 1 for i in range(x.ndim)]
        total = total + np.take(x, np.minimum(at, have - 1), axis) * part.reshape(shape).astype(x.dtype)
    return total


def _round_half_even(total, count: int, numpy):
    mean, rest = numpy.divmod(total, count)
    return mean + ((2 * rest > count) | ((2 * rest == count) & (mean % 2 == 1)))


def area_weights(given: int, length: int) -> np.ndarray:
    """`[length, given]` int32: the part of each input pixel in each output pixel, in units of 1 / length of an input.

    Every row sums to `given`.
    """
    outputs, inputs = np.arange(length)[:, None], np.arange(given)
    end = np.minimum((outputs + 1) * given, (inputs + 1) * length)
    return np.maximum(end - np.maximum(outputs * given, inputs * length), 0).astype(np.int32)


def largest_window(size: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """The largest (height, width) within a picture of `size` that has the proportions of `shape`, rounded down.

    For a square shape that is the shorter side, twice.
    """
    (height, width), (rows, columns) = size, shape
    if height * columns >= width * rows:
        return max(1, width * rows // columns), width
    return height, max(1, height * columns // rows)


def center_square(x):
    """The middle square of a picture `[..., h, w, C]`; an odd row or column more is left out at the end."""
    side = min(x.shape[-3:-1])
    top, left = ((length - side) // 2 for length in x.shape[-3:-1])
    return x[..., top : top + side, left : left + side, :]


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be a positive (height, width), not {size}")


def _resize_axis(x: jax.Array, axis: int, length: int, align_corners: bool) -> jax.Array:
    given = x.shape[axis]
    if length == given:
        return x
    if length % given == 0 and not align_corners:
        return _enlarge_axis(x, axis, length // given)
    # A dense matrix of two entries per row: on matrix units it costs little, and its transpose (the gradient) is the
    # same kind of product, where the gradient of a gather would be a slow scatter in no fixed order of summation.
    weights = jnp.asarray(interpolation_matrix(given, length, align_corners), x.dtype)
    y = jnp.tensordot(weights, x, axes=((1,), (axis,)), precision=jax.lax.Precision.HIGHEST)
    return jnp.moveaxis(y, 0, axis)


def _enlarge_axis(x: jax.Array, axis: int, factor: int) -> jax.Array:
    """Whole factors, corners not aligned: `factor` phases, each a blend of the samples with their shifted selves."""
    given = x.shape[axis]
    first = jax.lax.slice_in_dim(x, 0, 1, axis=axis)
    last = jax.lax.slice_in_dim(x, given - 1, given, axis=axis)
    before = jnp.concatenate([first, jax.lax.slice_in_dim(x, 0, given - 1, axis=axis)], axis)
    after = jnp.concatenate([jax.lax.slice_in_dim(x, 1, given, axis=axis), last], axis)
    phases = []
    for phase in range(factor):
        offset = (phase + 0.5) / factor - 0.5
        neighbour = before if offset < 0 else after
        phases.append(x + (neighbour - x) * abs(offset) if offset else x)
    y = jnp.stack(phases, axis + 1)
    return y.reshape(*x.shape[:axis], given * factor, *x.shape[axis + 1 :])


def interpolation_matrix(given: int, length: int, align_corners: bool) -> np.ndarray:
    """`[length, given]` float64 weights of the samples; every row sums to one."""
    if align_corners:
        position = np.arange(length) * ((given - 1) / (length - 1) if length > 1 else 0.0)
    else:
        position = np.clip((np.arange(length) + 0.5) * given / length - 0.5, 0, given - 1)
    low = np.minimum(position.astype(np.int64), given - 1)
    high = np.minimum(low + 1, given - 1)
    rows = np.arange(length)
    weights = np.zeros((length, given))
    np.add.at(weights, (rows, low), 1 - (position - low))
    np.add.at(weights, (rows, high), position - low)
    return weights
