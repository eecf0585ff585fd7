"""Reversible residual layers (Gomez et al. 2017, https://arxiv.org/abs/1707.04585): depth without stored activations.

Two streams pass through blocks of two branches,

    y1 = x1 + f(x2),    y2 = x2 + g(y1),

which can be undone: x2 = y2 - g(y1), x1 = y1 - f(x2). The backward pass starts from the outputs of the last block and
recomputes the inputs of one block after the other, so that what is kept between the passes does not grow with depth.
It costs one more forward pass, as much as full rematerialisation, which keeps the input of every block.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_densevit.layers.transformer import rematerialise

Branch = Callable[[Any, jax.Array], jax.Array]
Streams = tuple[jax.Array, jax.Array]


def reversible(
    blocks: Sequence[tuple[Branch, Branch]], layers: Any, streams: Streams, *, scan: bool = False
) -> Streams:
    """Runs two streams through layers of reversible blocks, with constant memory for the backward pass.

    Args:
      blocks: the blocks of one layer, in order, each a pair of branches f and g: `f(params, x)` -> an array
        of the shape of x. Branches are pure functions, deterministic: the backward pass calls them again.
      layers: the parameters, one entry per layer; an entry is a tuple of one `(parameters of f, parameters of g)` per
        block, whose leaves are floating point. With `scan` one such entry, its leaves stacked over the layers.
      streams: x1 and x2, of one shape and type. In float32 the inputs are recovered to a few roundings per block; in
        half precision they would not be, so the streams are float32 also where branches compute in less.
      scan: run the layers as one scanned layer: the program no longer grows with depth.

    Returns:
      The two streams after the last layer. Reverse-mode derivatives only.

    Raises:
      TypeError: streams in half precision or of different shapes.
    """
    first, second = streams
    if first.shape != second.shape or first.dtype != second.dtype:
        raise TypeError(f"the two streams differ: {first.shape} {first.dtype}, {second.shape} {second.dtype}")
    if jnp.finfo(first.dtype).bits < 32:
        raise TypeError(f"streams of type {first.dtype} cannot be recovered from the outputs; make them float32")
    return _reversible(tuple(blocks), scan, layers, (first, second))


def residual(
    blocks: Sequence[tuple[Branch, Branch]], layers: Any, x: jax.Array, *, scan: bool = False, remat: str = "none"
) -> jax.Array:
    """The plain residual form of the same branches on one stream: `x += f(x); x += g(x)` for every block.

    Args as in :func:`reversible`; `remat` is what the backward pass keeps of a layer, see `transformer.rematerialise`.
    """

    def layer(x, params):
        for (f, g), (f_params, g_params) in zip(blocks, params, strict=True):
            x = x + f(f_params, x).astype(x.dtype)
            x = x + g(g_params, x).astype(x.dtype)
        return x

    return _through(rematerialise(layer, remat, prevent_cse=not scan), layers, x, scan)


def _through(layer: Callable[[Any, Any], Any], layers: Any, x: Any, scan: bool) -> Any:
    """`layer(x, params)` for one layer after the other."""
    if scan:
        return jax.lax.scan(lambda x, params: (layer(x, params), None), x, layers)[0]
    for params in layers:
        x = layer(x, params)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _reversible(blocks, scan, layers, streams):
    def layer(streams, params):
        x1, x2 = streams
        for (f, g), (f_params, g_params) in zip(blocks, params, strict=True):
            x1 = x1 + f(f_params, x2).astype(x1.dtype)
            x2 = x2 + g(g_params, x1).astype(x2.dtype)
        return x1, x2

    return _through(layer, layers, streams, scan)


def _forward(blocks, scan, layers, streams):
    out = _reversible(blocks, scan, layers, streams)
    return out, (layers, out)


def _backward(blocks, scan, kept, gradients):
    layers, streams = kept

    def layer(carry, params):
        (y1, y2), (d1, d2) = carry
        d_params = []
        for (f, g), (f_params, g_params) in zip(reversed(blocks), reversed(params), strict=True):
            y2, d1, d_g = _undo(g, g_params, y1, y2, d1, d2)
            y1, d2, d_f = _undo(f, f_params, y2, y1, d2, d1)
            d_params.append((d_f, d_g))
        return ((y1, y2), (d1, d2)), tuple(reversed(d_params))

    if scan:
        (_, gradients), d_layers = jax.lax.scan(layer, (streams, gradients), layers, reverse=True)
        return d_layers, gradients
    d_layers = []
    for params in reversed(layers):
        if d_layers:
            streams, params = _after((gradients, d_layers[-1]), (streams, params))
        (streams, gradients), d_params = layer((streams, gradients), params)
        d_layers.append(d_params)
    return type(layers)(reversed(d_layers)), gradients


def _after(first: Any, then: Any) -> Any:
    """`then`, but not before `first` is there (trees of arrays).

    Nothing else makes a compiler go back layer by layer: undoing all of them first is as good a program to it, and
    holds every input at once. `optimization_barrier` would say so, but XLA drops it on CPUs before it orders anything.
    """
    values = [leaf[(0,) * leaf.ndim] for leaf in jax.tree.leaves(first) if leaf.size]
    never = functools.reduce(jnp.logical_or, (value > jnp.inf for value in values))
    return jax.tree.map(lambda x: jnp.where(never, 0, x), then)


def _undo(branch, params, x, y, dx, dy):
    """One half of a block, `y = before + branch(params, x)`: (before, the gradient to x, the gradient to params)."""
    out, pull = jax.vjp(branch, params, x)
    d_params, more = pull(dy.astype(out.dtype))
    return y - out.astype(y.dtype), dx + more.astype(dx.dtype), d_params


_reversible.defvjp(_forward, _backward)
