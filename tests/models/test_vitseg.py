"""ViTSeg: the published count, the whole forward pass against NumPy, the two ways to put patches together."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import erf

from jax_densevit.errors import UserError
from jax_densevit.models import create_model
from jax_densevit.models.counts import count_parameters
from jax_densevit.models.registry import find_model
from jax_densevit.models.vitseg import UNPATCHIFY

TINY = {
    "image_size": (8, 12),
    "patch_size": 4,
    "projection_size": 10,
    "position_size": 3,
    "num_layers": 2,
    "num_heads": 2,
    "head_size": 6,
    "mlp_sizes": (7, 9),
    "feature_sizes": (11, 12),
    "token_features": 5,
    "decoder_projection": 6,
    "decoder_sizes": (8, 7),
}
X = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)


def build(images=X, **options):
    """A model and its parameters, all of them away from their start at zero or one."""
    model = create_model("vitseg", **{**TINY, **options})
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params)


@pytest.mark.parametrize("variant", ["grid", "rows"])
def test_published_parameter_count(variant):
    model = create_model("vitseg", variant)
    assert count_parameters(model, (256, 256)) == 60_927_264
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))["params"]
    count = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in shapes.items()}
    assert count["embedding"] == 98_432 and count["positions"] == 2_048 and count["norm"] == 272
    assert count["block_3"] == 1_295_664 and count["features"] == 54_537_216
    assert sum(count[name] for name in ("decoder_embedding", "decoder_positions", "decoder_norm")) == 100_816
    assert count["decoder"] + count["head"] == 1_106_640 - 100_816


def test_macs_are_those_the_compiler_counts():
    options = {"image_size": (32, 48), "num_heads": 4, "mlp_sizes": (256, 512), "feature_sizes": (256, 512)}
    model = create_model("vitseg", patch_size=8, num_classes=5, **options)
    images = jax.ShapeDtypeStruct((1, 32, 48, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    flops = jax.jit(model.apply).lower(variables, images).cost_analysis()["flops"]
    macs = find_model("vitseg").macs(model, (32, 48))
    assert 1.0 <= flops / (2 * macs) < 1.05  # the rest: norms, softmax, activations
    published = find_model("vitseg").macs(create_model("vitseg"), (256, 256))
    # 256 tokens through all matrices but those of the flattened MLP, which are used once, and the T x T products.
    matrices = 2 * 98_304 + 4 * (4 * 136 * 1024 + 136 * 512 + 512 * 1024 + 1024 * 136)
    matrices += 168 * 512 + 2 * 512**2 + 512 * 768
    flat = 34_816 * 1024 + 1024 * 2048 + 2048 * 8192
    assert published == 256 * matrices + flat + 4 * 2 * 256**2 * 1024


def slow(params, images, model):
    """The forward pass in NumPy float64, one patch, head and layer at a time."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, at):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * at["scale"] + at["bias"]

    def gelu(x):
        return x * (1 + erf(x / np.sqrt(2))) / 2

    def relu(x):
        return np.maximum(x, 0)

    def stack(x, layers, activation):
        for i in range(len(layers)):
            x = activation(x @ layers[f"fc_{i}"]["kernel"] + layers[f"fc_{i}"]["bias"])
        return x

    def attention(x, at):
        total = at["out"]["bias"]
        for head in range(model.num_heads):
            q, k, v = (x @ at["qkv"]["kernel"][:, i, head] + at["qkv"]["bias"][i, head] for i in range(3))
            weights = np.exp(q @ k.T / np.sqrt(model.head_size))
            total = total + weights / weights.sum(-1, keepdims=True) @ v @ at["out"]["kernel"][head]
        return total

    def tokens(patches, prefix):
        embedding = p[f"{prefix}embedding"]
        x = patches @ embedding["kernel"].reshape(patches.shape[1], -1) + embedding["bias"]
        return np.concatenate([x, p[f"{prefix}positions"]], 1)

    size, (rows, columns) = model.patch_size, model.grid
    answers = []
    for image in images:
        corners = [(i * size, j * size) for i in range(rows) for j in range(columns)]
        patches = np.stack([image[y : y + size, x : x + size].reshape(-1) for y, x in corners])
        x = tokens(patches, "")
        for i in range(model.num_layers):
            block = p[f"block_{i}"]
            x = x + attention(norm(x, block["norm1"]), block["attention"])
            x = x + stack(norm(x, block["norm2"]), block["mlp"], gelu)
        flat = stack(norm(x, p["norm"]).reshape(-1), p["features"], gelu)
        y = np.concatenate([tokens(patches, "decoder_"), flat.reshape(rows * columns, -1)], 1)
        y = stack(norm(y, p["decoder_norm"]), p["decoder"], relu) @ p["head"]["kernel"] + p["head"]["bias"]
        if model.unpatchify == "rows":
            answers.append(y.reshape(rows * size, columns * size, -1))
            continue
        answer = np.zeros((rows * size, columns * size, model.num_classes))
        for (top, left), token in zip(corners, y, strict=True):
            answer[top : top + size, left : left + size] = token.reshape(size, size, -1)
        answers.append(answer)
    return np.stack(answers)


@pytest.mark.parametrize("unpatchify", ["grid", "rows"])
def test_the_whole_forward_pass(unpatchify):
    model, params = build(unpatchify=unpatchify, num_classes=4)
    output = jax.jit(model.apply)({"params": params}, X)
    want = slow(params, X, model)
    assert output.logits.shape == (2, 8, 12, 4) and output.covers == (8, 12)
    assert output.features["tokens"].shape == (2, 2, 3, 13) and output.features["features"].shape == (2, 2, 3, 5)
    np.testing.assert_allclose(output.logits, want, atol=1e-5 * np.abs(want).max())


def test_rows_send_token_i_to_row_i_and_grid_to_block_i():
    size, side = 4, 16  # as 16 and 256: a token has as many pixels as the picture is wide
    tokens = np.broadcast_to(np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1), (1, 4, 4, size**2 * 3))
    rows, grid = (np.asarray(UNPATCHIFY[name](tokens, size)) for name in ("rows", "grid"))
    assert rows.shape == grid.shape == (1, side, side, 3)
    for i in range(16):
        assert (rows[0, i] == i).all()
        assert (grid[0, i // 4 * 4 : i // 4 * 4 + 4, i % 4 * 4 : i % 4 * 4 + 4] == i).all()
    # In a picture half as wide, as 128 is for patches of 16, a token fills two rows.
    narrow = np.asarray(UNPATCHIFY["rows"](tokens[:, :, :2], size))
    assert [set(row.ravel()) for row in narrow[0]] == [
        {t} for t in (0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13)
    ]


def test_the_shortcut_of_a_patch_paints_its_own_block_only_in_the_grid():
    """With the features held still, what changes where one patch of the picture changes."""
    changed = X[:1].copy()
    changed[:, 4:, 8:] += 1  # the last of six patches
    for unpatchify, rows, columns in (("grid", range(4, 8), range(8, 12)), ("rows", (6, 7), range(12))):
        model, params = build(unpatchify=unpatchify)
        params["features"] = jax.tree.map(jnp.zeros_like, params["features"])
        difference = [np.asarray(model.apply({"params": params}, x).logits[0]) for x in (X[:1], changed)]
        moved = np.abs(difference[1] - difference[0]).max(-1) > 0
        if unpatchify == "rows":  # 6 tokens of 16 pixels in rows of 12: the last one ends row 6 and fills row 7
            assert not moved[:6].any() and not moved[6, :8].any() and moved[7].any()
        else:
            want = np.zeros((8, 12), bool)
            want[np.ix_(rows, columns)] = True
            assert (moved <= want).all() and moved[want].mean() > 0.9


def test_one_size_only():
    with pytest.raises(UserError, match=r"takes images of 8x12 only .* not of 16x12: .* --fixed_size=8,12"):
        build(images=np.zeros((1, 16, 12, 3), np.float32))
    with pytest.raises(UserError, match="images of 256x256 only"):
        find_model("vitseg").macs(create_model("vitseg"), (256, 512))
    with pytest.raises(UserError, match="multiple of patch_size=16"):
        create_model("vitseg", image_size=250).init(jax.random.key(0), jnp.zeros((1, 250, 250, 3)))
    with pytest.raises(UserError, match="did you mean 'rows'"):
        build(unpatchify="row")


def test_bfloat16():
    model, params = build(dtype="bfloat16")
    output = jax.jit(model.apply)({"params": params}, X)
    assert output.logits.dtype == jnp.float32 and output.features["tokens"].dtype == jnp.bfloat16
    full = create_model("vitseg", **TINY).apply({"params": params}, X).logits
    assert 0 < np.abs(output.logits - full).max() < 0.1 * np.abs(full).max()


def test_every_parameter_learns_and_dropout_drops():
    model, params = build()

    def loss(params, key):
        output = model.apply({"params": params}, X, train=True, rngs={"dropout": key})
        return jnp.sum(jnp.sin(output.logits))

    value = jax.jit(jax.value_and_grad(loss))
    (first, gradient), (second, _) = value(params, jax.random.key(3)), value(params, jax.random.key(4))
    assert first != second
    gradients = [gradient] + [value(params, jax.random.key(k))[1] for k in range(3)]  # what one drops another keeps
    largest = jax.tree.map(lambda *leaves: np.max(np.abs(leaves)), *gradients)
    for path, leaf in jax.tree_util.tree_leaves_with_path(largest):
        assert np.isfinite(leaf) and leaf > 0, jax.tree_util.keystr(path)
    assert model.apply({"params": params}, X).logits.shape == X.shape  # no key, no dropout, in evaluation


def test_the_grid_learns_what_rows_cannot():
    """To paint what one sees: a block's own pixels are all a token needs, if it paints that block."""

    def error_after_training(unpatchify):
        sizes = {**TINY, "image_size": (8, 8), "decoder_projection": 48, "decoder_sizes": (128,), "num_layers": 1}
        model = create_model("vitseg", **sizes, unpatchify=unpatchify, mlp_dropout=0.0, decoder_dropout=0.0)
        params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
        optimizer = optax.adam(3e-3)

        def step(state, key):
            params, moments = state
            images = jax.random.normal(key, (32, 8, 8, 3))

            def loss(params):
                output = model.apply({"params": params}, images, train=True, rngs={"dropout": key})
                return jnp.abs(output.logits - images).mean()

            error, gradient = jax.value_and_grad(loss)(params)
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(params, updates), moments), error

        start = params, optimizer.init(params)
        errors = jax.jit(lambda keys: jax.lax.scan(step, start, keys)[1])(jax.random.split(jax.random.key(1), 200))
        return float(errors[-10:].mean())

    grid, rows = error_after_training("grid"), error_after_training("rows")
    # Where token i paints two rows of this small picture, half of them lie in its own block; of the others it sees
    # nothing, and the best is gray, which costs the mean of |x|, 0.798.
    assert grid < 0.1 and rows > 0.798 / 2
