"""The matrix product of dense layers, in the form whose gradients are fast."""

import math
from typing import Any

import jax


def flat_product(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """What `nn.Dense` and `nn.DenseGeneral` ask of `lax.dot_general`, over one axis of rows.

    Same numbers, another gradient program: the gradient to the kernel of a product over `[B, T, D]` makes XLA's CPU
    compiler transpose a tensor of three axes, and fuse into that copy all it was added up from, in a residual network
    the gradients of all later blocks. The copies of twelve blocks took a third of a ViT's training step. One
    axis of rows needs no copy.

    Args:
      lhs: `[..., *contracted]`; its last axes are contracted.
      rhs: `[*contracted, ...]`, the kernel; its first axes are contracted.
      dimension_numbers: as of `lax.dot_general`, in this form and without batch axes.
      precision, preferred_element_type: as of `lax.dot_general`.
    """
    (last, first), batch = dimension_numbers
    count = len(first)
    if tuple(last) != tuple(range(lhs.ndim - count, lhs.ndim)) or tuple(first) != tuple(range(count)) or any(batch):
        raise ValueError(f"flat_product contracts last axes with first ones; got {dimension_numbers}")
    inner = math.prod(rhs.shape[:count])
    product = jax.lax.dot_general(
        lhs.reshape(-1, inner),
        # Its free axes stay apart: heads may be sharded.
        rhs.reshape(inner, *rhs.shape[count:]),
        (((1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=preferred_element_type,
    )
    return product.reshape(*lhs.shape[: lhs.ndim - count], *rhs.shape[count:])
