"""Scaled dot-product attention, once for every model, and the multi-head self-attention of a transformer block."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jax_densevit.errors import UserError, check_name
from jax_densevit.layers.product import flat_product


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """`softmax(q k^T / sqrt(d) + bias) v` for every head (Vaswani et al. 2017, section 3.2.1).

    Models that attend along rows or inside windows fold those into the batch.

    Args:
      q: queries `[B, T, heads, d]`.
      k: keys `[B, S, heads, d]`.
      v: values `[B, S, heads, d]`.
      bias: added to the scaled logits, broadcastable to `[B, heads, T, S]`.
      mask: bool, True where a query may look, broadcastable to `[B, heads, T, S]`. A query that may look nowhere gets
        the mean of the values.
      dropout: rate at which attention weights are zeroed (the others grow by 1 / (1 - rate)), where a key is given.
      key: random key of the dropout; None drops nothing.
      implementation: "xla" works everywhere. "cudnn" is the fused kernel of NVIDIA GPUs: it never stores the T x S
        weights, and serves fewer cases.

    Returns:
      `[B, T, heads, d]` in the type of `v`. Logits and softmax are computed in float32 whatever the inputs' type.

    Raises:
      UserError: an unknown implementation, or one that cannot serve this call.
    """
    check_name("attention implementation", implementation, IMPLEMENTATIONS)
    return IMPLEMENTATIONS[implementation](q, k, v, bias, mask, dropout if key is not None else 0.0, key)


def _attend_xla(q, k, v, bias, mask, dropout, key):
    # Heads next to the batch first: XLA's CPU products over a head axis in the middle take half as long again.
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return attend_by_head(q, k, v, bias=bias, mask=mask, dropout=dropout, key=key).swapaxes(1, 2)


def attend_by_head(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    dropout: float = 0.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """:func:`attend` ("xla") on `[..., T, d]`, heads and any other batch axes in front, where callers have them so.

    `bias` and `mask` broadcast to `[..., T, S]`; nothing is moved or copied before the products.
    """
    logits = jnp.einsum("...td,...sd->...ts", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    if not dropout:
        return softmax_product(logits, v)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    kept = jax.random.bernoulli(key, 1 - dropout, weights.shape)
    weights = jnp.where(kept, weights / jnp.asarray(1 - dropout, weights.dtype), jnp.zeros((), weights.dtype))
    return jnp.einsum("...ts,...sd->...td", weights, v)


@jax.custom_vjp
def softmax_product(logits: jax.Array, v: jax.Array) -> jax.Array:
    """`softmax(logits) v` with as few passes over the `T x S` weights as there can be.

    The weights are divided by their sum after the product, on `T x d` numbers; the gradient never sums a row of `T x S`
    (the sum over s of w dw is the sum over d of y dy: Dao et al. 2022, section 3.1).

    Args:
      logits: `[..., T, S]` float32; v: `[..., S, d]`.

    Returns:
      `[..., T, d]` in the type of `v`; the exponentials are float32 and enter the product in the type of `v`.
    """
    return _softmax_product_forward(logits, v)[0]


def _softmax_product_forward(logits, v):
    weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
    factor = 1 / weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    y = jnp.einsum("...ts,...sd->...td", weights, v, preferred_element_type=jnp.float32) * factor
    y = y.astype(v.dtype)
    return y, (weights, factor, v, y)


def _softmax_product_backward(kept, dy):
    weights, factor, v, y = kept
    scaled = dy.astype(jnp.float32) * factor
    mean = (scaled * y).sum(axis=-1, keepdims=True)
    scaled = scaled.astype(v.dtype)
    dv = jnp.einsum("...ts,...td->...sd", weights, scaled)
    dweights = jnp.einsum("...td,...sd->...ts", scaled, v, preferred_element_type=jnp.float32)
    return weights * (dweights - mean), dv


softmax_product.defvjp(_softmax_product_forward, _softmax_product_backward)


def _attend_cudnn(q, k, v, bias, mask, dropout, key):
    if dropout:
        raise UserError("attention='cudnn' has no dropout of attention weights; use attention='xla', or a rate of 0.")
    backend = jax.default_backend()
    reason = cudnn_refusal(
        q.shape,
        k.shape,
        (q.dtype, k.dtype, v.dtype),
        bias=None if bias is None else bias.shape,
        masked=mask is not None,
        backend=backend,
        compute_capability=getattr(jax.devices()[0], "compute_capability", None),
    )
    if reason:
        raise UserError(f"attention='cudnn' cannot serve this model: {reason}; use attention='xla'.")
    if bias is not None:
        bias = jnp.broadcast_to(bias, (1, q.shape[2], q.shape[1], k.shape[1])).astype(q.dtype)
    if mask is not None:
        # A mask shorter than the queries is read wrongly (jax-ml/jax#28974): always give the full T x S.
        mask = jnp.broadcast_to(mask, (*mask.shape[:-2], q.shape[1], k.shape[1]))
    return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask, implementation="cudnn")


IMPLEMENTATIONS = {"xla": _attend_xla, "cudnn": _attend_cudnn}


def cudnn_refusal(
    q: tuple[int, ...],
    k: tuple[int, ...],
    dtypes: tuple[Any, ...],
    *,
    bias: tuple[int, ...] | None = None,
    masked: bool = False,
    backend: str = "gpu",
    compute_capability: str | None = None,
) -> str:
    """Why cuDNN's fused attention cannot compute a call, or "" when it can.

    The limits are those of JAX 0.10's `jax.nn.dot_product_attention(implementation="cudnn")`, and two that it does not
    check: the gradient of a bias is right only when the bias has a batch axis of 1 (jax-ml/jax#30593), and a bias or
    mask with odd lengths works forward but not backward, so it is refused before hours of training are planned on it.

    Args:
      q: shape of the queries `[B, T, heads, d]`; k: shape of the keys `[B, S, heads, d]`.
      dtypes: types of queries, keys and values.
      bias: shape of the bias, if any; masked: whether there is a mask.
      backend: JAX's backend; compute_capability: that of the GPU, such as "9.0" (None when unknown).
    """
    if backend not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU and this program runs on {backend!r}"
    for dtype in dtypes:
        if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
            return f"it computes in bfloat16 or float16, not in {jnp.dtype(dtype).name} (dtype='bfloat16' of the model)"
    largest = 256 if compute_capability is not None and float(compute_capability) >= 9.0 else 128
    if q[-1] % 8 or q[-1] > largest:
        return f"the size of a head must be a multiple of 8 and at most {largest} on this GPU, not {q[-1]}"
    if bias is not None and len(bias) == 4 and bias[0] != 1:
        return f"the gradient of a bias with a batch axis of {bias[0]} would be wrong"
    if (bias is not None or masked) and (q[1] % 2 or k[1] % 2):
        return f"with a bias or a mask both lengths must be even, and they are {q[1]} and {k[1]}"
    return ""


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection of queries, keys and values.

    Parameters: `qkv/kernel [D, 3, heads, d]` (queries, keys, values in that order), `qkv/bias [3, heads, d]`,
    `out/kernel [heads, d, D]`, `out/bias [D]`. The head axis is apart so that it can be sharded.

    Attributes:
      num_heads: number of heads; must divide the width D where `head_size` is not given.
      implementation: of :func:`attend`.
      dtype: type of the computation; parameters are float32.
      head_size: d, channels per head; 0 divides the width among the heads.
      dropout: rate of the attention weights, in training; needs the rng stream "dropout".
    """

    num_heads: int
    implementation: str = "xla"
    dtype: Any = jnp.float32
    head_size: int = 0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """`[B, T, D]` -> `[B, T, D]`."""
        width = x.shape[-1]
        if width % self.num_heads and not self.head_size:
            raise UserError(f"num_heads={self.num_heads} does not divide hidden_size={width}; choose a divisor.")
        size = self.head_size or width // self.num_heads
        init = nn.initializers.normal(0.02)
        qkv = nn.DenseGeneral(
            (3, self.num_heads, size), dtype=self.dtype, kernel_init=init, dot_general=flat_product, name="qkv"
        )(x)
        q, k, v = (qkv[:, :, i] for i in range(3))
        dropped = {"dropout": self.dropout, "key": self.make_rng("dropout")} if train and self.dropout else {}
        y = attend(q, k, v, implementation=self.implementation, **dropped)
        return nn.DenseGeneral(
            width, axis=(-2, -1), dtype=self.dtype, kernel_init=init, dot_general=flat_product, name="out"
        )(y)


def attention_macs(tokens: int, width: int, keys: int | None = None, inner: int | None = None) -> int:
    """Multiply-accumulates of one self-attention over `tokens` tokens of `width` channels, projections included.

    Args:
      tokens: length of the sequence.
      width: D.
      keys: how many keys each query looks at; None means all tokens.
      inner: channels of all heads together; None means D.
    """
    keys = tokens if keys is None else keys
    inner = width if inner is None else inner
    return int(4 * tokens * width * inner + 2 * np.int64(tokens) * keys * inner)
