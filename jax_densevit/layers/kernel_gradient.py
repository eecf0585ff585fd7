"""A convolution whose gradient to its kernel is fast on a CPU.

XLA makes that gradient a convolution by a kernel as large as the map. On a CPU it then takes two to four times as long
as the matrix products that it consists of, and up to ten times as long as the forward pass.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

Padding = tuple[tuple[int, int], tuple[int, int]]

# Fewer channels than this are one product with all shifts side by side; products so narrow waste most of a vector.
_NARROW = 16
# Products as small as this one, 64 channels to 64, are no faster than XLA's own gradient.
_SMALL = 64 * 64


_FOR_OTHERS = contextvars.ContextVar("for_others", default=False)


@contextlib.contextmanager
def as_on_accelerators() -> Iterator[None]:
    """Within it convolutions are traced as TPUs and GPUs compute them, though a CPU compiles the program: for plans."""
    token = _FOR_OTHERS.set(True)
    try:
        yield
    finally:
        _FOR_OTHERS.reset(token)


def wants_products(channels: int, features: int) -> bool:
    """Whether products are the faster gradient, by what 3x3 kernels took on maps of 14 to 256 pixels."""
    return not _FOR_OTHERS.get() and (min(channels, features) < _NARROW or channels * features > _SMALL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolution(x: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """A convolution of stride 1, the same numbers as `lax.conv_general_dilated`; no forward-mode derivative.

    Args:
      x: `[B, h, w, C]`.
      kernel: `[kh, kw, C, features]`, in the type of `x`.
      padding: zeros before and behind the rows and the columns, fewer than the kernel has.

    Returns:
      `[B, h', w', features]`.
    """
    return _plain(x, kernel, padding)


def _plain(x, kernel, padding):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _forward(x, kernel, padding):
    return _plain(x, kernel, padding), (x, kernel)


def _backward(padding, saved, g):
    x, kernel = saved

    def own(x, g):
        return jax.linear_transpose(lambda kernel: _plain(x, kernel, padding), kernel)(g)[0]

    products = functools.partial(_products, size=kernel.shape[:2], padding=padding)
    (dx,) = jax.linear_transpose(lambda x: _plain(x, kernel, padding), x)(g)
    return dx, jax.lax.platform_dependent(x, g, cpu=products, default=own)


convolution.defvjp(_forward, _backward)


def _products(x: jax.Array, g: jax.Array, size: Sequence[int], padding: Padding) -> jax.Array:
    """The gradient to the kernel, `[*size, C, features]`: a product of shifted maps for each of its places.

    Place (i, j) of the kernel met pixel (y + i, x + j) of the padded input where it made pixel (y, x) of the output. It
    is the narrower of the two maps that is shifted, because every shift is a copy.
    """
    channels, features = x.shape[-1], g.shape[-1]
    shifts = [(i, j) for i in range(size[0]) for j in range(size[1])]
    if channels <= features:
        fixed, moved = g, jnp.pad(x, ((0, 0), *padding, (0, 0)))
    else:
        # The other way round: pixel (u, v) of the input met pixel (u + low - i, v + low - j) of the output.
        ends = [
            (k - 1 - low, side + low - made)
            for k, (low, _), side, made in zip(size, padding, x.shape[1:3], g.shape[1:3], strict=True)
        ]
        fixed, moved = x, jnp.pad(g, ((0, 0), *ends, (0, 0)))
        shifts = [(size[0] - 1 - i, size[1] - 1 - j) for i, j in shifts]
    height, width = fixed.shape[1:3]
    views = [moved[:, i : i + height, j : j + width] for i, j in shifts]
    if min(channels, features) < _NARROW:
        views = [jnp.concatenate(views, -1)]
    rows = fixed.reshape(-1, fixed.shape[-1])
    wide = jnp.promote_types(x.dtype, jnp.float32)
    sums = [
        jax.lax.dot_general(
            view.reshape(-1, view.shape[-1]), rows, (((0,), (0,)), ((), ())), preferred_element_type=wide
        )
        for view in views
    ]
    sums = jnp.concatenate(sums).reshape(*size, moved.shape[-1], -1).astype(x.dtype)
    return sums if channels <= features else sums.swapaxes(2, 3)
