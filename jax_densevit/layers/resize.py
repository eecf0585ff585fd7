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
      TypeError: `x` is not floating point (label maps go through :func:`resize_nearest`).
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


def resize_nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Resizes the two axes before the last by taking sample `floor(i * h / height)`, PyTorch's `mode="nearest"`.

    Args:
      x: `[..., h, w, C]` of any type.
      size: (height, width) of the result.

    Returns:
      `[..., height, width, C]` of the type of `x`; every value occurs in `x`.
    """
    _check_size(size)
    for axis, length in ((x.ndim - 3, size[0]), (x.ndim - 2, size[1])):
        given = x.shape[axis]
        if length % given == 0:
            x = jnp.repeat(x, length // given, axis=axis)
        else:
            x = jnp.take(x, np.arange(length) * given // length, axis=axis)
    return x


def resize_area(x: np.ndarray | jax.Array, size: tuple[int, int]) -> np.ndarray | jax.Array:
    """Resizes an integer picture `[..., h, w, C]` by the mean over the area of each output pixel.

    Pixels on the edge of an area count by the part inside, and means are rounded to the nearest, halves to the even
    number: `tf.image.resize(method="area")` with its result rounded. Down by a whole factor this is the mean of blocks,
    up by a whole factor every pixel is repeated.

    Args:
      x: integers; a NumPy array is resized on the host (in float64), a JAX array where it is.
      size: (height, width).

    Returns:
      int32 `[..., height, width, C]`, NumPy if `x` is.
    """
    _check_size(size)
    if not isinstance(x, np.ndarray):
        return _resize_area_device(x, size)
    rows, columns = (area_matrix(given, length) for given, length in zip(x.shape[-3:-1], size, strict=True))
    y = np.einsum("yh,...hwc,xw->...yxc", rows, x.astype(np.float64), columns, optimize=True)
    # Means of integers that are a half exactly, or would be but for the last digits, are recognised as such.
    return np.rint(np.round(y, 9)).astype(np.int32)


def _resize_area_device(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    for axis, length in ((x.ndim - 3, size[0]), (x.ndim - 2, size[1])):
        if length % x.shape[axis] == 0:
            x = jnp.repeat(x, length // x.shape[axis], axis=axis)
    given = x.shape[-3:-1]
    if any(have % want for have, want in zip(given, size, strict=True)):
        rows, columns = (jnp.asarray(area_matrix(*lengths), jnp.float32) for lengths in zip(given, size, strict=True))
        y = jnp.einsum("yh,...hwc,xw->...yxc", rows, x.astype(jnp.float32), columns, precision="highest")
        return jnp.rint(y).astype(jnp.int32)
    down = [have // want for have, want in zip(given, size, strict=True)]
    blocks = x.astype(jnp.int32).reshape(*x.shape[:-3], size[0], down[0], size[1], down[1], x.shape[-1])
    total, count = blocks.sum((-4, -2)), down[0] * down[1]
    mean, rest = total // count, total % count
    up = (2 * rest > count) | ((2 * rest == count) & (mean % 2 == 1))
    return mean + up.astype(jnp.int32)


def area_matrix(given: int, length: int) -> np.ndarray:
    """`[length, given]` float64 weights: the part of every output pixel that each input pixel covers."""
    edges = np.arange(length + 1) * given / length
    starts = np.arange(given)
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    return np.maximum(overlap, 0) * (length / given)


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
