import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from jax_densevit.errors import UserError
from jax_densevit.layers.embedding import (
    POSITION_RULES,
    PatchEmbedding,
    Tokens,
    native_grid,
    pad_to_multiple,
    patchify,
    resize_positions,
    torch_uniform,
    unpatchify,
)

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(1, 1 + 20, 3)).astype(np.float32)  # one class row and a 4 x 5 grid
GRID = TABLE[0, 1:].reshape(4, 5, 3)


def resized(rule, size):
    table = np.asarray(resize_positions(jnp.asarray(TABLE), (4, 5), size, rule, prefix=1))
    np.testing.assert_array_equal(table[:, 0], TABLE[:, 0])
    return table[0, 1:].reshape(*size, 3)


def test_patch_embedding_is_a_strided_convolution():
    x = RNG.normal(size=(2, 8, 12, 3)).astype(np.float32)
    layer = PatchEmbedding(hidden_size=5, patch_size=4)
    params = layer.init(jax.random.key(0), x)["params"]
    numbers = ("NHWC", "HWIO", "NHWC")
    want = jax.lax.conv_general_dilated(x, params["kernel"], (4, 4), "VALID", dimension_numbers=numbers)
    np.testing.assert_allclose(layer.apply({"params": params}, x), want + params["bias"], atol=1e-5)
    bound = (4 * 4 * 3) ** -0.5
    assert bound * 0.9 < np.abs(params["kernel"]).max() <= bound and np.any(params["bias"])


def test_torch_uniform_has_torchs_spread():
    draws = np.asarray(torch_uniform(25)(jax.random.key(0), (10_000,)))
    assert np.abs(draws).max() <= 0.2
    assert abs(draws.std() - 0.2 / np.sqrt(3)) < 2e-3


def test_padding_is_at_the_bottom_and_the_right():
    x = jnp.ones((1, 5, 8, 2))
    y = np.asarray(pad_to_multiple(x, 4))
    assert y.shape == (1, 8, 8, 2)
    np.testing.assert_array_equal(y[0, :, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0])


@pytest.mark.parametrize("size", [(8, 10), (3, 7), (2, 2), (9, 4)])
def test_rules_against_other_libraries(size):
    """Pillow's bicubic is the antialiased one of timm, SciPy's zoom the one of Google's code."""

    def pillow(channel):
        return np.asarray(Image.fromarray(channel).resize(size[::-1], Image.Resampling.BICUBIC))

    want = np.stack([pillow(np.ascontiguousarray(GRID[..., c])) for c in range(3)], -1)
    np.testing.assert_allclose(resized("timm", size), want, atol=1e-5)
    want = scipy.ndimage.zoom(GRID, (size[0] / 4, size[1] / 5, 1), order=1)
    np.testing.assert_allclose(resized("google", size), want, atol=1e-5)
    np.testing.assert_array_equal(resized("big_vision", size), resized("google", size))


def keys_cubic(x, size, stretch):
    """PyTorch's bicubic along axis 0, one output sample at a time: a = -0.75, borders clamped."""
    a, given, out = -0.75, len(x), []
    for i in range(size):
        position = (i + 0.5) * given / (size + stretch) - 0.5
        low, total = int(np.floor(position)), 0.0
        for tap in range(low - 1, low + 3):
            d = abs(position - tap)
            w = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            total = total + w * x[min(max(tap, 0), given - 1)].astype(np.float64)
        out.append(total)
    return np.stack(out)


@pytest.mark.parametrize("size", [(8, 10), (3, 7), (2, 2), (9, 4)])
@pytest.mark.parametrize("rule,stretch", [("mmseg", 0), ("hf", 0), ("dinov2", 0.1)])
def test_torch_bicubic(size, rule, stretch):
    want = keys_cubic(GRID, size[0], stretch)
    want = keys_cubic(want.swapaxes(0, 1), size[1], stretch).swapaxes(0, 1)
    np.testing.assert_allclose(resized(rule, size), want, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 10), (3, 7)])
def test_setr_is_bilinear_by_pixel_areas(size):
    def linear(x, length):
        position = np.clip((np.arange(length) + 0.5) * len(x) / length - 0.5, 0, len(x) - 1)
        flat = x.reshape(len(x), -1)
        columns = [np.interp(position, np.arange(len(x)), column) for column in flat.T]
        return np.stack(columns, -1).reshape(length, *x.shape[1:])

    want = linear(linear(GRID, size[0]).swapaxes(0, 1), size[1]).swapaxes(0, 1)
    np.testing.assert_allclose(resized("setr", size), want, atol=1e-5)


def test_native_size_is_left_alone_and_rules_are_named():
    table = jnp.asarray(TABLE)
    for rule in POSITION_RULES:
        assert resize_positions(table, (4, 5), (4, 5), rule, prefix=1) is table
    with pytest.raises(UserError, match="did you mean 'mmseg'"):
        resize_positions(table, (4, 5), (4, 5), "mmsegs", prefix=1)


@pytest.mark.parametrize(
    "options,rows,prefix",
    [
        ({}, 7, 1),
        ({"distilled": True}, 8, 2),
        ({"cls_token": False}, 6, 0),
        ({"cls_position": False}, 6, 1),
    ],
)
def test_tokens(options, rows, prefix):
    x = RNG.normal(size=(2, 2, 3, 4)).astype(np.float32)
    layer = Tokens((2, 3), **options)
    params = layer.init(jax.random.key(0), x)["params"]
    table = params["position_embedding"]
    assert table.shape == (1, rows, 4) and layer.prefix == prefix
    y = np.asarray(layer.apply({"params": params}, x))
    assert y.shape == (2, prefix + 6, 4)
    np.testing.assert_allclose(y[:, prefix:], x.reshape(2, 6, 4) + table[:, rows - 6 :], rtol=1e-6)
    for i, name in enumerate(["cls_token", "distillation_token"][:prefix]):
        want = params[name][0, 0] + (table[0, i] if rows > 6 else 0)
        np.testing.assert_allclose(y[:, i], np.broadcast_to(want, (2, 4)), rtol=1e-6)


def test_native_grid():
    assert native_grid(64, 16) == (4, 4)
    assert native_grid((32, 64), 16) == (2, 4)
    with pytest.raises(UserError, match="image_size=60x64.* not a multiple of patch_size=16"):
        native_grid((60, 64), 16)


def test_unpatchify_inverts_patchify():
    x = RNG.normal(size=(2, 8, 12, 3)).astype(np.float32)
    patches = patchify(x, 4)
    assert patches.shape == (2, 2, 3, 48)
    np.testing.assert_array_equal(patches[1, 1, 2].reshape(4, 4, 3), x[1, 4:8, 8:12])
    np.testing.assert_array_equal(unpatchify(patches, 4), x)
