import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_densevit.errors import UserError
from jax_densevit.layers.attention import SelfAttention, attend, attention_macs, cudnn_refusal


def reference(q, k, v, bias=0.0, mask=None):
    """Attention in float64, one head of one example at a time."""
    batch, length, heads, size = q.shape
    bias = np.broadcast_to(bias, (batch, heads, length, k.shape[1]))
    out = np.zeros((batch, length, heads, size))
    for b in range(batch):
        for h in range(heads):
            logits = q[b, :, h].astype(np.float64) @ k[b, :, h].T / np.sqrt(size) + bias[b, h]
            if mask is not None:
                logits = np.where(np.broadcast_to(mask, bias.shape)[b, h], logits, -np.inf)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ v[b, :, h]
    return out


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 99), st.booleans(), st.booleans())
def test_attend_equals_the_formula(seed, biased, masked):
    q, k, v = draw(seed, 2, 5, 3, 8), draw(seed + 1, 2, 7, 3, 8), draw(seed + 2, 2, 7, 3, 8)
    bias = draw(seed + 3, 1, 3, 5, 7) if biased else None
    mask = draw(seed + 4, 2, 1, 1, 7) > -0.5 if masked else None
    if masked:
        mask[..., 0] = True
    got = attend(q, k, v, bias=None if bias is None else jnp.asarray(bias), mask=mask)
    np.testing.assert_allclose(got, reference(q, k, v, bias if biased else 0.0, mask), atol=2e-6)


def test_gradient_is_that_of_softmax_and_product():
    q, k, v = draw(0, 2, 5, 3, 8), draw(1, 2, 7, 3, 8), draw(2, 2, 7, 3, 8)
    bias, mask = draw(3, 1, 3, 5, 7), draw(4, 2, 1, 1, 7) > -0.5

    def plain(q, k, v, bias):
        logits = jnp.where(mask, jnp.einsum("bthd,bshd->bhts", q, k) / 8**0.5 + bias, -1e30)
        return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits), v)

    def gradient(function):
        return jax.grad(lambda *given: jnp.sin(3 * function(*given)).sum(), (0, 1, 2, 3))(q, k, v, bias)

    chex.assert_trees_all_close(
        gradient(lambda q, k, v, bias: attend(q, k, v, bias=bias, mask=mask)), gradient(plain), atol=1e-5
    )


def test_attend_keeps_softmax_in_float32():
    """Weights of a long row are far below bfloat16's steps: sums in bfloat16 would stall."""
    q = jnp.zeros((1, 1, 1, 8), jnp.bfloat16)
    v = jnp.ones((1, 4096, 1, 8), jnp.bfloat16)
    got = attend(q, v, v)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(got, np.float32), 1.0)


def test_attend_where_a_query_may_look_nowhere():
    q, v = draw(0, 1, 2, 1, 8), draw(1, 1, 4, 1, 8)
    got = attend(q, v, v, mask=np.zeros((1, 1, 2, 4), bool))
    np.testing.assert_allclose(got[0, 0, 0], v[0, :, 0].mean(0), atol=1e-6)


def test_dropout_of_weights():
    """Uniform weights over as many values as channels, which are unit vectors: the result shows the weights."""
    q, k, v = jnp.zeros((1, 400, 1, 50)), jnp.zeros((1, 50, 1, 50)), jnp.eye(50)[None, :, None]
    np.testing.assert_array_equal(attend(q, k, v, dropout=0.2), attend(q, k, v))  # without a key
    weights = np.asarray(attend(q, k, v, dropout=0.2, key=jax.random.key(0)))[0, :, 0] * 50
    dropped = weights == 0
    np.testing.assert_allclose(weights[~dropped], 1 / 0.8, rtol=1e-5)
    assert dropped.mean() == pytest.approx(0.2, abs=0.01)


def test_unknown_implementation_is_named():
    with pytest.raises(UserError, match="did you mean 'cudnn'"):
        attend(*[draw(0, 1, 2, 1, 8)] * 3, implementation="cudn")


def test_cudnn_is_refused_here():
    x = jnp.zeros((1, 2, 1, 8), jnp.bfloat16)
    with pytest.raises(UserError, match="needs an NVIDIA GPU and this program runs on 'cpu'; use attention='xla'"):
        attend(x, x, x, implementation="cudnn")


HALF = (jnp.bfloat16,) * 3


@pytest.mark.parametrize(
    "shape,dtypes,options,reason",
    [
        ((2, 1025, 16, 64), HALF, {}, ""),
        ((2, 1025, 16, 64), (jnp.float16,) * 3, {}, ""),
        ((2, 1024, 16, 64), HALF, {"bias": (1, 16, 1024, 1024)}, ""),
        ((2, 1024, 16, 64), HALF, {"masked": True}, ""),
        ((2, 8, 2, 256), HALF, {"compute_capability": "9.0"}, ""),
        ((2, 8, 2, 256), HALF, {"compute_capability": "8.0"}, "at most 128"),
        ((2, 8, 2, 20), HALF, {}, "multiple of 8"),
        ((2, 8, 2, 64), (jnp.float32,) * 3, {}, "not in float32"),
        ((2, 8, 2, 64), HALF, {"backend": "tpu"}, "runs on 'tpu'"),
        ((2, 1025, 16, 64), HALF, {"bias": (1, 16, 1025, 1025)}, "both lengths must be even, and they are 1025"),
        ((2, 1025, 16, 64), HALF, {"masked": True}, "both lengths must be even"),
        ((2, 1024, 16, 64), HALF, {"bias": (2, 16, 1024, 1024)}, "batch axis of 2"),
    ],
)
def test_what_cudnn_cannot_do(shape, dtypes, options, reason):
    got = cudnn_refusal(shape, shape, dtypes, **options)
    assert reason in got and bool(got) == bool(reason)


def test_self_attention_layout():
    """`qkv` holds queries, keys, values in that order, head by head; `out` joins the heads."""
    x = draw(0, 2, 5, 12)
    layer = SelfAttention(num_heads=3)
    params = layer.init(jax.random.key(0), x)["params"]
    assert {k: v.shape for k, v in params["qkv"].items()} == {"kernel": (12, 3, 3, 4), "bias": (3, 3, 4)}
    params["qkv"]["bias"] = jnp.asarray(draw(1, 3, 3, 4))
    params["out"]["bias"] = jnp.asarray(draw(2, 12))
    projected = np.einsum("btd,dphe->pbthe", x, params["qkv"]["kernel"]) + params["qkv"]["bias"][:, None, None]
    q, k, v = np.asarray(projected)
    want = np.einsum("bthe,hed->btd", reference(q, k, v), params["out"]["kernel"]) + params["out"]["bias"]
    np.testing.assert_allclose(layer.apply({"params": params}, x), want, atol=1e-6)


def test_heads_of_a_size_of_their_own_and_dropout_in_training():
    x = draw(0, 2, 5, 7)
    layer = SelfAttention(num_heads=2, head_size=8, dropout=0.5)
    params = layer.init(jax.random.key(0), x)["params"]
    assert params["qkv"]["kernel"].shape == (7, 3, 2, 8) and params["out"]["kernel"].shape == (2, 8, 7)
    q, k, v = np.asarray(np.einsum("btd,dphe->pbthe", x, params["qkv"]["kernel"]))
    want = np.einsum("bthe,hed->btd", reference(q, k, v), params["out"]["kernel"])
    np.testing.assert_allclose(layer.apply({"params": params}, x), want, atol=1e-6)
    dropped = layer.apply({"params": params}, x, train=True, rngs={"dropout": jax.random.key(1)})
    assert np.abs(dropped - want).max() > 1e-4 * np.abs(want).max()


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="num_heads=5 does not divide hidden_size=12"):
        SelfAttention(num_heads=5).init(jax.random.key(0), draw(0, 1, 2, 12))


def test_macs():
    tokens, width = 5, 12
    assert attention_macs(tokens, width) == tokens * width * 4 * width + 2 * tokens * tokens * width
    assert attention_macs(tokens, width, keys=2) == tokens * width * 4 * width + 2 * tokens * 2 * width
    assert attention_macs(tokens, width, inner=8) == tokens * width * 4 * 8 + 2 * tokens * tokens * 8
    assert attention_macs(200_000, 4096) == 4 * 200_000 * 4096**2 + 2 * 200_000**2 * 4096  # no overflow
