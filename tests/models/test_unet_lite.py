"""U-Net on EfficientNet-Lite0: its encoder is the classifier's, its skips are where they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.errors import UserError
from jax_densevit.models.efficientnet_lite import EfficientNetLite
from jax_densevit.models.registry import create_model, find_model


def shapes(model, size=(64, 64)):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))


def test_encoder_is_that_of_the_classifier():
    """Same names, shapes and statistics: `config.init` can take the published weights over."""
    ours, theirs = shapes(create_model("unet_lite")), shapes(EfficientNetLite())
    for collection in ("params", "batch_stats"):
        assert ours[collection]["encoder"] == theirs[collection]["encoder"]


def test_macs_are_those_the_compiler_counts():
    model = create_model("unet_lite", num_classes=5)
    lowered = jax.jit(lambda v, x: model.apply(v, x).logits).lower(shapes(model), jnp.zeros((1, 64, 96, 3)))
    counted = lowered.cost_analysis()["flops"] / 2
    assert 0.9 < counted / find_model("unet_lite").macs(model, (64, 96)) < 1.1


def test_any_size():
    model = create_model("unet_lite", num_classes=4, decoder=(8, 8, 8, 8, 8))
    output = jax.eval_shape(model.apply, shapes(model), jnp.zeros((2, 33, 70, 3)))
    assert output.logits.shape == (2, 64, 96, 4) and output.covers == (64, 96)
    assert output.logits.dtype == jnp.float32


def test_output_moves_with_the_picture():
    """A picture shifted by the largest stride gives the logits shifted, away from the borders: no skip is displaced."""
    model = create_model("unet_lite", num_classes=2, decoder=(8, 8, 8, 8, 8))
    images = jnp.zeros((1, 32, 480, 3)).at[:, 8:20, 220:236].set(1.0)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    logits = jax.jit(lambda x: model.apply(variables, x).logits)
    still, moved = logits(images), logits(jnp.roll(images, 32, axis=2))
    # The encoder sees 400 pixels to each side, nearly all of whose weight lies in the middle.
    middle = slice(208, 248)
    np.testing.assert_allclose(still[:, :, middle], moved[:, :, 32 + middle.start : 32 + middle.stop], atol=2e-3)
    assert jnp.ptp(still[:, :, middle]) > 0.02


def test_a_decoder_of_other_lengths_is_refused():
    with pytest.raises(UserError, match="5 widths"):
        shapes(create_model("unet_lite", decoder=(8, 8)))
