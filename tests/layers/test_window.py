"""Windows against their definition, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_densevit.errors import UserError
from jax_densevit.layers.window import WindowAttention, merge, original_bias, partition, relative_bias, window_groups


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 13), st.integers(1, 13), st.integers(1, 5), st.integers(0, 4))
def test_merge_inverts_partition(height, width, window, shift):
    x = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)
    shift %= window
    windows = partition(jnp.asarray(x), window, shift)
    assert windows.shape == (2, -(-height // window), -(-width // window), window, window, 3)
    np.testing.assert_array_equal(merge(windows, (height, width), shift), x)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(0, 4), st.booleans())
def test_groups_are_the_windows_that_begin_at_the_shift(height, width, window, shift, told):
    """Two tokens look at each other exactly when a grid laid from (shift, shift) has no line between them."""
    shift %= window
    valid = np.random.default_rng(1).random((1, height, width)) < 0.8 if told else np.ones((1, height, width), bool)
    groups = window_groups((height, width), window, shift, jnp.asarray(valid) if told else None)
    rows, columns = -(-height // window), -(-width // window)
    numbers = np.arange(1, height * width + 1).reshape(1, height, width)
    tokens = np.asarray(partition(jnp.asarray(numbers), window, shift)).reshape(rows * columns, -1)
    if groups is None:
        assert not shift and not height % window and not width % window
        groups = np.zeros((1, *tokens.shape), int)
    seen = set()
    for ids, inside in zip(tokens, np.asarray(groups)[0], strict=True):
        for a, group in zip(ids, inside, strict=True):
            seen |= {(a, b) for b, other in zip(ids, inside, strict=True) if group == other}
    cell = {
        row * width + column + 1: ((row - shift) // window, (column - shift) // window)
        for row in range(height)
        for column in range(width)
        if valid[0, row, column]
    }
    expected = {(a, b) for a in cell for b in cell if cell[a] == cell[b]}
    assert {(a, b) for a, b in seen if a in cell or b in cell} == expected


def test_original_masks_pairs_of_padding_only():
    valid = jnp.asarray(np.arange(8) < 5)[None, None, :].repeat(8, 1)
    assert original_bias((8, 8), 4, 0) is None
    bias = np.asarray(original_bias((8, 8), 4, 0, valid)).reshape(2, 2, 4, 4, 4, 4)
    assert not bias[:, 0].any()  # columns 0 to 3 are valid
    expected = np.where((np.arange(4)[:, None] >= 1) & (np.arange(4) >= 1), -100.0, 0.0)
    np.testing.assert_array_equal(bias[0, 1, 2, :, 3, :], expected)  # of columns 4 to 7 the last three are padding
    # The nine regions of Swin: the last window of a shifted map has four, none of which sees another.
    shifted = np.asarray(original_bias((8, 8), 4, 2)).reshape(2, 2, 16, 16)
    assert not shifted[0, 0].any()
    region = (np.arange(4)[:, None] // 2 * 2 + np.arange(4) // 2).reshape(-1)
    np.testing.assert_array_equal(shifted[1, 1], np.where(region[:, None] == region, 0.0, -100.0))
    both = np.asarray(original_bias((8, 8), 4, 2, valid)).reshape(2, 2, 16, 16)
    np.testing.assert_array_equal(both, shifted + bias.reshape(2, 2, 16, 16))


@pytest.mark.parametrize("window", [1, 2, 5])
def test_relative_bias_is_the_table_by_offsets(window):
    side = 2 * window - 1
    table = np.random.default_rng(0).normal(size=(side**2, 3)).astype(np.float32)
    places = [(y, x) for y in range(window) for x in range(window)]
    rows = np.array([[(a - c + window - 1) * side + b - d + window - 1 for c, d in places] for a, b in places])
    np.testing.assert_array_equal(relative_bias(jnp.asarray(table), window), table[rows].transpose(2, 0, 1))


def reference(params, x, window, shift, heads):
    """Every token against every other, in float64, by the definition of a window that begins at the shift."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    _, height, width, channels = x.shape
    q, k, v = np.moveaxis(np.einsum("bhwc,cned->bhwned", x, params["qkv"]["kernel"]) + params["qkv"]["bias"], 3, 0)
    y = np.zeros((*x.shape[:3], heads, channels // heads))
    side = 2 * window - 1
    for row in range(height):
        for column in range(width):
            cell = ((row - shift) // window, (column - shift) // window)
            others = [
                (i, j)
                for i in range(height)
                for j in range(width)
                if ((i - shift) // window, (j - shift) // window) == cell
            ]
            places = [(row - i + window - 1) * side + column - j + window - 1 for i, j in others]
            keys, values = (np.stack([z[:, i, j] for i, j in others], 1) for z in (k, v))
            logits = np.einsum("bed,bsed->bse", q[:, row, column], keys) / np.sqrt(channels // heads)
            weights = np.exp(logits + params["position_bias"][places])
            weights /= weights.sum(1, keepdims=True)
            y[:, row, column] = np.einsum("bse,bsed->bed", weights, values)
    return np.einsum("bhwed,edc->bhwc", y, params["out"]["kernel"]) + params["out"]["bias"]


@pytest.mark.parametrize("size,shift", [((8, 4), 0), ((7, 9), 0), ((7, 9), 2), ((3, 8), 3)])
def test_window_attention_is_its_definition(size, shift):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *size, 6)).astype(np.float32)
    layer = WindowAttention(2, 4, shift)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.asarray(x))
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    got = jax.jit(layer.apply)(variables, jnp.asarray(x))
    np.testing.assert_allclose(got, reference(variables["params"], x, 4, shift, 2), atol=2e-5)


def test_refusals():
    x = jnp.zeros((1, 4, 4, 6))
    for layer, cause in (
        (WindowAttention(4, 4), "do not divide 6"),
        (WindowAttention(2, 4, 4), "not within a window"),
        (WindowAttention(2, 4, projection="linea"), "did you mean 'linear'"),
        (WindowAttention(2, 4, padding="maskd"), "did you mean 'masked'"),
    ):
        with pytest.raises(UserError, match=cause):
            jax.eval_shape(layer.init, jax.random.key(0), x)
