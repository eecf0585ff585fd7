"""SETR Hybrid-Base: a ResNet-50 before the transformer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.errors import UserError
from jax_densevit.layers.transformer import stack_blocks, unstack_blocks
from jax_densevit.models import create_model
from jax_densevit.models.counts import count_like_paper, count_parameters
from jax_densevit.models.registry import find_model
from jax_densevit.models.resnet import ResNet, resnet_macs
from jax_densevit.models.vit import Backbone

TINY = {
    "hidden_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "mlp_size": 12,
    "image_size": 64,
    "num_classes": 3,
    "head_channels": 8,
    "blocks": (1, 1, 1, 2),
    "stem_width": 2,
}
# 40 x 90 pixels: rectangular and no multiples; the model covers 48 x 96.
X = np.random.default_rng(0).normal(size=(2, 40, 90, 3)).astype(np.float32)


def draw(model):
    """Variables of a model: its shapes, filled by NumPy."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        near = float(path[-1].key in ("scale", "var"))
        return (near + (0.1 if near else 0.3) * rng.uniform(-1, 1, leaf.shape)).astype(leaf.dtype)

    shapes = jax.eval_shape(model.init, {"params": jax.random.key(0)}, X)
    return jax.tree_util.tree_map_with_path(fill, shapes)


def test_counts():
    """The sum of its parts. (The paper prints 112.59M, which no reading of its text gives.)"""
    model = create_model("setr_naive", "Hybrid-B/16", scan=True)
    base = create_model("setr_naive", "B/16", scan=True)
    resnet, patches, projection = 23_508_032, 590_592, 2048 * 768 + 768
    assert count_parameters(model, (512, 512)) == count_parameters(base, (512, 512)) - patches + resnet + projection
    assert count_like_paper(model, (512, 512)) == 112_181_744
    assert count_parameters(model, (512, 512)) == 112_181_744 - 4 * 513 * 150
    macs = find_model("setr_naive").macs
    more = resnet_macs(ResNet(output_stride=16), (512, 512)) + 32 * 32 * (2048 - 768) * 768
    assert macs(model, (500, 512)) == macs(base, (500, 512)) + more


@pytest.mark.parametrize("decoder", ["naive", "mla"])
def test_training_and_evaluation(decoder):
    """Every parameter learns, every statistic moves; scanned and rematerialised it is the same model."""
    model = create_model(f"setr_{decoder}", **TINY)
    variables = draw(model)

    def step(params, model):
        def loss(params):
            output, updates = model.apply({**variables, "params": params}, X, train=True, mutable="batch_stats")
            total = sum(jnp.sum(jnp.sin(3 * logits)) for logits in (output.logits, *output.auxiliary))
            return total, (output, updates["batch_stats"])

        return jax.value_and_grad(loss, has_aux=True)(params)

    jitted = jax.jit(step, static_argnums=1)
    (total, (output, statistics)), gradient = jitted(variables["params"], model)
    scale = {"naive": 1, "mla": 4}[decoder]
    assert output.covers == (48, 96) and output.logits.shape == (2, 3 * scale, 6 * scale, 3)
    for before, after in zip(*map(jax.tree.leaves, (variables["batch_stats"], statistics)), strict=True):
        assert not np.allclose(before, after)
    for name in ("stem", "backbone"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient[name]):
            assert np.all(np.isfinite(leaf)) and np.abs(leaf).max() > 1e-5, path
    if decoder == "mla":
        return
    other = create_model("setr_naive", **TINY, scan=True, remat="full")
    (other_total, _), other_gradient = jitted(stack_blocks(variables["params"], other.head_taps), other)
    np.testing.assert_allclose(other_total, total, rtol=1e-4)
    other_gradient = unstack_blocks(other_gradient)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    for got, want in zip(*map(jax.tree.leaves, (other_gradient, gradient)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * largest)


def test_is_its_parts_in_a_row():
    """ResNet with its last stage dilated, 1x1 projection to tokens with positions, transformer, head."""
    model = create_model("setr_naive", **TINY, auxiliary=False)
    variables = draw(model)
    part = lambda name: {kind: tree[name] for kind, tree in variables.items() if name in tree}  # noqa: E731
    images = np.pad(X, ((0, 0), (0, 8), (0, 6), (0, 0)))
    maps = ResNet(TINY["blocks"], "batch", 2, 16).apply(part("stem"), images)
    assert [m.shape[1:] for m in maps] == [(12, 24, 8), (6, 12, 16), (3, 6, 32), (3, 6, 64)]
    tokens = Backbone(8, 2, 2, 12, 1, (4, 4), pos_rule="setr").apply(part("backbone"), maps[-1])[2]
    head = model.stack_head(None, parent=None)
    want = head.apply(part("decode_head"), tokens[:, 1:].reshape(2, 3, 6, 8), False)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, X).logits, want, atol=1e-5)


def test_stride_of_the_stem_is_the_patch():
    model = create_model("setr_naive", **{**TINY, "patch_size": 8})
    assert jax.eval_shape(model.apply, draw(model), X).logits.shape == (2, 5, 12, 3)
    with pytest.raises(UserError, match="output_stride"):
        jax.eval_shape(create_model("setr_naive", **{**TINY, "patch_size": 2}).init, jax.random.key(0), X)
