import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.errors import UserError
from jax_densevit.layers.transformer import (
    REMAT_POLICIES,
    Encoder,
    EncoderBlock,
    drop_path,
    gelu,
    segments,
    stack_blocks,
    unstack_blocks,
)

SIZES = {"num_layers": 4, "num_heads": 2, "mlp_size": 12}
X = np.random.default_rng(0).normal(size=(3, 4, 8)).astype(np.float32)
RNGS = {"dropout": jax.random.key(7)}


def assert_trees(got, want, atol=0.0):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for path, leaf in jax.tree_util.tree_leaves_with_path(got):
        other = dict(jax.tree_util.tree_leaves_with_path(want))[path]
        np.testing.assert_allclose(leaf, other, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_gelu_flavours():
    x = np.linspace(-4, 4, 41)
    exact = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]
    tanh = x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32), "erf"), exact, atol=1e-6)
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32), "tanh"), tanh, atol=1e-6)
    assert np.abs(exact - tanh).max() > 1e-4
    with pytest.raises(UserError, match="GELU flavour"):
        gelu(jnp.zeros(1), "exact")


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 3))
    y = np.asarray(jax.jit(drop_path)(x, jnp.float32(0.25), jax.random.key(0)))
    values = y[:, 0, 0]
    np.testing.assert_array_equal(y, np.broadcast_to(values[:, None, None], y.shape))
    np.testing.assert_allclose(np.unique(values), [0, 1 / 0.75], rtol=1e-6)
    assert abs(values.mean() - 1) < 0.05
    assert drop_path(x.astype(jnp.bfloat16), 0.25, jax.random.key(0)).dtype == jnp.bfloat16


@pytest.mark.parametrize("norm_style", ["pre", "post"])
def test_block_equals_the_formula(norm_style):
    block = EncoderBlock(num_heads=2, mlp_size=12, norm_epsilon=1e-3, norm_style=norm_style)
    params = block.init(jax.random.key(0), X)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda p: (p + 0.3 * rng.normal(size=p.shape)).astype(np.float32), params)

    def norm(x, p):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3) * p["scale"] + p["bias"]

    def attention(y):
        q, k, v = np.einsum("btd,dphe->pbthe", y, params["attention"]["qkv"]["kernel"]) + np.asarray(
            params["attention"]["qkv"]["bias"]
        ).reshape(3, 1, 1, 2, 4)
        weights = np.exp(np.einsum("bthe,bshe->bhts", q, k) / 2)
        weights /= weights.sum(-1, keepdims=True)
        out = params["attention"]["out"]
        return np.einsum("bhts,bshe,hed->btd", weights, v, out["kernel"]) + out["bias"]

    def mlp(y):
        y = y @ params["mlp"]["fc1"]["kernel"] + params["mlp"]["fc1"]["bias"]
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        return y @ params["mlp"]["fc2"]["kernel"] + params["mlp"]["fc2"]["bias"]

    want = X.astype(np.float64)
    if norm_style == "pre":
        want = want + attention(norm(want, params["norm1"]))
        want = want + mlp(norm(want, params["norm2"]))
    else:
        want = norm(want + attention(want), params["norm1"])
        want = norm(want + mlp(want), params["norm2"])
    np.testing.assert_allclose(block.apply({"params": params}, X), want, atol=1e-5)


def test_unknown_norm_style_is_named():
    with pytest.raises(UserError, match="norm_style"):
        EncoderBlock(num_heads=2, mlp_size=12, norm_style="sandwich").init(jax.random.key(0), X)


def test_segments():
    assert segments(24, (10, 15, 20, 24)) == [(0, 10), (10, 15), (15, 20), (20, 24)]
    assert segments(5) == [(0, 5)]
    assert segments(5, (2, 2)) == [(0, 2), (2, 5)]
    with pytest.raises(UserError, match="no block 6 to tap"):
        segments(5, (6,))


@pytest.fixture(scope="module")
def unrolled():
    """An unrolled encoder with every kind of randomness: its parameters, taps, and gradient of their sum."""
    encoder = Encoder(**SIZES, taps=(2, 3), dropout=0.1, drop_path=0.5)
    params = jax.jit(encoder.init)(jax.random.key(0), X)["params"]
    return params, *taps_and_gradient(encoder, params)


def taps_and_gradient(encoder, params):
    def loss(params):
        taps = encoder.apply({"params": params}, X, train=True, rngs=RNGS)
        return sum(jnp.sum(jnp.sin(tap)) for tap in taps.values()), taps

    (_, taps), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return taps, gradient


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_scanned_equals_unrolled(unrolled, remat):
    """The same start from the same key, the same dropped elements, the same outputs and gradients."""
    params, taps, gradient = unrolled
    encoder = Encoder(**SIZES, taps=(2, 3), dropout=0.1, drop_path=0.5, scan=True, remat=remat)
    stacked = stack_blocks(params, (2, 3))
    assert sorted(stacked) == ["blocks_0_2", "blocks_2_3", "blocks_3_4"]
    if remat == "none":
        assert_trees(jax.jit(encoder.init)(jax.random.key(0), X)["params"], stacked)
    other_taps, other_gradient = taps_and_gradient(encoder, stacked)
    assert sorted(other_taps) == [2, 3, 4]
    assert_trees(other_taps, taps, atol=1e-5)
    assert_trees(unstack_blocks(other_gradient), gradient, atol=1e-5)


def test_post_norm_with_its_own_dropouts_scanned_equals_unrolled():
    """As in BERT: dropout of the attention weights, none after GELU."""
    options = {**SIZES, "norm_style": "post", "attention_dropout": 0.3, "mlp_dropout": 0.0}
    params = jax.jit(Encoder(**options).init)(jax.random.key(0), X)["params"]
    taps, gradient = taps_and_gradient(Encoder(**options, taps=(1, 2)), params)
    np.testing.assert_allclose(taps[4].mean(-1), 0, atol=1e-5)  # a layer norm comes last
    encoder = Encoder(**options, taps=(1, 2), scan=True, remat="full")
    other_taps, other_gradient = taps_and_gradient(encoder, stack_blocks(params, (1, 2)))
    assert_trees(other_taps, taps, atol=1e-5)
    assert_trees(unstack_blocks(other_gradient), gradient, atol=1e-5)
    # The weights are dropped although `dropout` is 0; and only they.
    still = Encoder(**options, taps=(1, 2)).apply({"params": params}, X)
    assert np.abs(still[4] - taps[4]).max() > 1e-3
    nothing = Encoder(**{**options, "attention_dropout": 0.0}, taps=(1, 2)).apply({"params": params}, X, train=True)
    assert_trees(nothing, still)


def test_dropout_after_gelu_is_apart():
    """With `mlp_dropout` 1 nothing passes the MLP but the bias of its second product."""
    block = EncoderBlock(num_heads=2, mlp_size=12, mlp_dropout=1.0)
    params = block.init(jax.random.key(0), X)["params"]
    params["mlp"]["fc2"]["bias"] = params["mlp"]["fc2"]["bias"] + 3.0
    out = block.apply({"params": params}, X, train=True, rngs=RNGS)
    params["mlp"]["fc2"]["kernel"] = 0 * params["mlp"]["fc2"]["kernel"]
    np.testing.assert_array_equal(out, block.apply({"params": params}, X))


def test_unrolled_rematerialised(unrolled):
    params, taps, gradient = unrolled
    encoder = Encoder(**SIZES, taps=(2, 3), dropout=0.1, drop_path=0.5, remat="full")
    other_taps, other_gradient = taps_and_gradient(encoder, params)
    assert_trees(other_taps, taps, atol=1e-5)
    assert_trees(other_gradient, gradient, atol=1e-5)


def test_blocks_differ_and_drop_differently(unrolled):
    """One key for all blocks would start them equal; one dropout key would drop the same elements in each."""
    params, _, _ = unrolled
    kernels = [params[f"block_{i}"]["mlp"]["fc1"]["kernel"] for i in range(4)]
    assert len({float(k[0, 0]) for k in kernels}) == 4
    same = {f"block_{i}": params["block_0"] for i in range(4)}
    encoder = Encoder(**SIZES, taps=(1, 2, 3), dropout=0.5)
    taps = encoder.apply({"params": same}, X, train=True, rngs=RNGS)
    patterns = {(np.asarray(taps[i + 1] - taps[i]) == 0).tobytes() for i in range(1, 4)}
    assert len(patterns) == 3


def test_stack_and_unstack_are_inverse_at_any_depth():
    rng = np.random.default_rng(0)
    blocks = {f"block_{i}": {"a": {"kernel": rng.normal(size=(2, 3))}, "b": rng.normal(size=4)} for i in range(12)}
    tree = {"backbone": {"encoder": blocks, "tokens": {"cls_token": np.ones(2)}}, "head": {"kernel": np.ones((2, 2))}}
    for taps in ((), (3, 6, 9), (5, 12)):
        stacked = stack_blocks(tree, taps)
        assert stacked["head"] is not tree["head"] and stacked["head"]["kernel"] is tree["head"]["kernel"]
        back = unstack_blocks(stacked)
        assert_trees(back, tree)
        assert_trees(unstack_blocks(back), tree)
    assert stack_blocks(tree)["backbone"]["encoder"]["blocks_0_12"]["a"]["kernel"].shape == (12, 2, 3)
    assert isinstance(stack_blocks(tree)["backbone"]["encoder"]["blocks_0_12"]["b"], np.ndarray)
    del blocks["block_4"]
    with pytest.raises(ValueError, match="without a gap"):
        stack_blocks(tree)


def test_the_wrong_form_of_a_tree_is_named(unrolled):
    params = unrolled[0]
    with pytest.raises(UserError, match="no 'blocks_0_4', which this scanned encoder .* convert them"):
        Encoder(**SIZES, scan=True).apply({"params": params}, X)
    with pytest.raises(UserError, match="no 'block_0', which this unrolled encoder"):
        Encoder(**SIZES).apply({"params": stack_blocks(params)}, X)


def test_unknown_policy_is_named():
    with pytest.raises(UserError, match="did you mean 'dots_no_batch'"):
        Encoder(**SIZES, remat="dots_nobatch").init(jax.random.key(0), X)


def test_no_randomness_in_evaluation(unrolled):
    encoder = Encoder(**SIZES, dropout=0.5, drop_path=0.5)
    first = encoder.apply({"params": unrolled[0]}, X)
    plain = Encoder(**SIZES).apply({"params": unrolled[0]}, X, train=True)  # needs no rng stream: nothing is drawn
    assert_trees(first, plain)
