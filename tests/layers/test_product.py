"""The product of dense layers equals that of `lax.dot_general`, gradients too."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jax_densevit.layers.product import flat_product


@pytest.mark.parametrize(
    "features, axis, shape",
    [(5, -1, (2, 3, 4)), ((3, 2, 5), -1, (2, 3, 4)), (5, (-2, -1), (2, 3, 4, 2)), (5, -1, (4,))],
)
def test_dense_layers_with_it_are_the_same(features, axis, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    plain = nn.DenseGeneral(features, axis=axis)
    flat = nn.DenseGeneral(features, axis=axis, dot_general=flat_product)
    params = plain.init(jax.random.key(1), x)

    def loss(layer):
        return lambda params, x: jnp.sin(layer.apply(params, x)).sum()

    chex.assert_trees_all_close(
        jax.value_and_grad(loss(flat), (0, 1))(params, x),
        jax.value_and_grad(loss(plain), (0, 1))(params, x),
        rtol=1e-5,
        atol=1e-5,
    )


def test_other_contractions_are_refused():
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match="last axes with first ones"):
        flat_product(x, x, (((0,), (0,)), ((), ())))
