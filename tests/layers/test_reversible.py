"""Reversible layers: gradients are those of automatic differentiation, memory does not grow with depth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.layers.reversible import residual, reversible

WIDTH = 6


def first(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def second(params, x):
    return jnp.sin(x * params) * x.mean(0)


BLOCKS = ((first, second), (second, first))


def parameters(layers, width=WIDTH, seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32)

    def one():
        matrices = [{"a": draw(width, 9), "b": draw(9, width)} for _ in range(2)]
        return (matrices[0], draw(width)), (draw(width), matrices[1])

    return [one() for _ in range(layers)]


def stacked(layers):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def plain(blocks, layers, streams):
    """The formulas of the paper, left to automatic differentiation."""
    x1, x2 = streams
    for layer in layers:
        for (f, g), (f_params, g_params) in zip(blocks, layer, strict=True):
            x1 = x1 + f(f_params, x2)
            x2 = x2 + g(g_params, x1)
    return x1, x2


STREAMS = tuple(jnp.asarray(np.random.default_rng(i).normal(size=(4, WIDTH)), jnp.float32) for i in (1, 2))


def value_and_gradients(run):
    """Of a loss that weighs the two streams differently, to parameters and both inputs."""

    def loss(layers, streams):
        y1, y2 = run(layers, streams)
        return jnp.sum(jnp.sin(y1) * y1) + 3 * jnp.sum(jnp.cos(y2)), (y1, y2)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def assert_trees(got, want, tolerance=1e-5):
    """Equal to `tolerance` times the largest number of each leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max()), got, want)


def test_equals_automatic_differentiation():
    layers = parameters(3)
    want = value_and_gradients(functools.partial(plain, BLOCKS))(layers, STREAMS)
    unrolled = value_and_gradients(functools.partial(reversible, BLOCKS))(layers, STREAMS)
    assert_trees(unrolled, want)
    (value, streams), (d_layers, d_streams) = value_and_gradients(functools.partial(reversible, BLOCKS, scan=True))(
        stacked(layers), STREAMS
    )
    assert_trees(((value, streams), (d_layers, d_streams)), (want[0], (stacked(want[1][0]), want[1][1])))
    # Layers may come in a tuple too, and one block may be a layer.
    one = [layer[:1] for layer in layers]
    got = value_and_gradients(functools.partial(reversible, BLOCKS[:1]))(tuple(one), STREAMS)
    assert_trees(got, value_and_gradients(functools.partial(plain, BLOCKS[:1]))(tuple(one), STREAMS))


def test_equals_automatic_differentiation_to_the_last_digits():
    """In float64 nothing is left but roundings: the recomputation is exact, not an approximation."""
    with jax.enable_x64(True):
        layers, streams = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (parameters(3), STREAMS))
        got = value_and_gradients(functools.partial(reversible, BLOCKS))(layers, streams)
        assert_trees(got, value_and_gradients(functools.partial(plain, BLOCKS))(layers, streams), 1e-13)


def test_gradients_reach_one_stream_only():
    """A zero cotangent of the other stream is a gradient like any other."""
    layers = parameters(2)
    for i in range(2):
        got = jax.jit(jax.grad(lambda layers, i=i: jnp.sum(reversible(BLOCKS, layers, STREAMS)[i] ** 2)))(layers)
        want = jax.jit(jax.grad(lambda layers, i=i: jnp.sum(plain(BLOCKS, layers, STREAMS)[i] ** 2)))(layers)
        assert_trees(got, want)


def test_precision_survives_depth():
    """Thirty-two layers recover their inputs well enough for the gradient, by recomputation from the outputs alone."""
    layers = jax.tree.map(lambda leaf: 0.2 * leaf, parameters(32))
    (_, (_, got)) = value_and_gradients(functools.partial(reversible, BLOCKS, scan=True))(stacked(layers), STREAMS)
    (_, (_, want)) = value_and_gradients(functools.partial(plain, BLOCKS))(layers, STREAMS)
    assert_trees(got, want, 1e-4)


def test_half_precision_branches_between_float32_streams():
    def half(params, x):
        return first(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), x.astype(jnp.bfloat16))

    layers = [((layer[0][0], layer[1][1]),) for layer in parameters(2)]
    (_, streams), (d_layers, d_streams) = value_and_gradients(functools.partial(reversible, ((half, half),)))(
        layers, STREAMS
    )
    want = value_and_gradients(functools.partial(plain, ((first, first),)))(layers, STREAMS)
    assert {leaf.dtype for leaf in jax.tree.leaves((streams, d_layers, d_streams))} == {jnp.dtype("float32")}
    for a, b in zip(jax.tree.leaves(d_layers), jax.tree.leaves(want[1][0]), strict=True):
        assert 0 < np.abs(a - b).max() < 0.1 * np.abs(b).max()
    with pytest.raises(TypeError, match="cannot be recovered"):
        reversible(BLOCKS, layers, tuple(x.astype(jnp.bfloat16) for x in STREAMS))
    with pytest.raises(TypeError, match="differ"):
        reversible(BLOCKS, layers, (STREAMS[0], STREAMS[1][:2]))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_residual_form(remat):
    layers = parameters(3)

    def want(layers, streams):
        x = streams[0]
        for (f, g), (h, k) in layers:
            x = x + first(f, x)
            x = x + second(g, x)
            x = x + second(h, x)
            x = x + first(k, x)
        return x, streams[1]

    def got(layers, streams, scan=False):
        return residual(BLOCKS, layers, streams[0], scan=scan, remat=remat), streams[1]

    expected = value_and_gradients(want)(layers, STREAMS)
    assert_trees(value_and_gradients(got)(layers, STREAMS), expected)
    (value, streams), (d_layers, d_streams) = value_and_gradients(functools.partial(got, scan=True))(
        stacked(layers), STREAMS
    )
    expected = (expected[0], (stacked(expected[1][0]), expected[1][1]))
    assert_trees(((value, streams), (d_layers, d_streams)), expected)


def working_memory(run, depth, scan=False):
    """Bytes of temporaries of the compiled gradient: what is neither parameter nor result."""
    layers = jax.eval_shape(lambda: parameters(depth, width=16))
    layers = jax.eval_shape(stacked, layers) if scan else layers
    streams = (jax.ShapeDtypeStruct((512, 16), jnp.float32),) * 2
    return value_and_gradients(run).lower(layers, streams).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_depth():
    """The plain form keeps more than four streams per layer; the reversible one nothing."""
    stream = 512 * 16 * 4
    shallow, deep = 2, 6

    def growth(run, scan=False):
        return working_memory(run, deep, scan) - working_memory(run, shallow, scan)

    assert growth(functools.partial(plain, BLOCKS)) > 4 * stream * (deep - shallow)
    assert growth(functools.partial(reversible, BLOCKS)) < stream
    assert growth(functools.partial(reversible, BLOCKS, scan=True), scan=True) == 0
