"""The FID network against its published description written out by the published names; its published size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_densevit.errors import UserError
from jax_densevit.models import create_model
from jax_densevit.models.counts import count_parameters
from jax_densevit.models.inception import Inception, inception_macs, unit_names
from jax_densevit.models.registry import find_model
from jax_densevit.pretrained import restore_names

TINY = Inception(divide=16, num_classes=5)


def noise(size):
    rng = np.random.default_rng(0)
    ranges = {"scale": (0.7, 1.3), "bias": (-0.2, 0.3), "mean": (-0.3, 0.3), "var": (0.01, 1)}

    def fill(path, leaf):
        bound = (6 / np.prod(leaf.shape[:-1])) ** 0.5 if leaf.ndim > 1 else 1
        return rng.uniform(*ranges.get(path[-1].key, (-bound, bound)), leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(TINY.init, jax.random.key(0), jnp.zeros((1, *size, 3)))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def written_out(w, x):
    """From arrays under their published names and images [B, H, W, 3] to the maps, the pool and the logits."""

    def unit(x, name, stride=1, pad=(0, 0)):
        kernel = w[f"{name}.conv.weight"].transpose(2, 3, 1, 0)
        y = lax.conv_general_dilated(
            x, kernel, (stride, stride), [(p, p) for p in pad], dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = (y - w[f"{name}.bn.running_mean"]) / jnp.sqrt(w[f"{name}.bn.running_var"] + 0.001)
        return jnp.maximum(y * w[f"{name}.bn.weight"] + w[f"{name}.bn.bias"], 0)

    def window(x, start, function, stride, pad):
        return lax.reduce_window(x, start, function, (1, 3, 3, 1), (1, stride, stride, 1), [(0, 0), pad, pad, (0, 0)])

    def average(x):
        ones = jnp.ones((1, *x.shape[1:3], 1))
        return window(x, 0.0, lax.add, 1, (1, 1)) / window(ones, 0.0, lax.add, 1, (1, 1))

    def maximum(x, stride=2, pad=(0, 0)):
        return window(x, -jnp.inf, lax.max, stride, pad)

    def side_by_side(*ends):
        return jnp.concatenate(ends, -1)

    def a(x, n):
        five = unit(unit(x, f"{n}.branch5x5_1"), f"{n}.branch5x5_2", pad=(2, 2))
        three = unit(unit(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2", pad=(1, 1))
        three = unit(three, f"{n}.branch3x3dbl_3", pad=(1, 1))
        return side_by_side(unit(x, f"{n}.branch1x1"), five, three, unit(average(x), f"{n}.branch_pool"))

    def b(x, n):
        three = unit(unit(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2", pad=(1, 1))
        return side_by_side(unit(x, f"{n}.branch3x3", 2), unit(three, f"{n}.branch3x3dbl_3", 2), maximum(x))

    def c(x, n):
        row, column = (0, 3), (3, 0)
        seven = unit(unit(x, f"{n}.branch7x7_1"), f"{n}.branch7x7_2", pad=row)
        seven = unit(seven, f"{n}.branch7x7_3", pad=column)
        double = unit(x, f"{n}.branch7x7dbl_1")
        for i, pad in ((2, column), (3, row), (4, column), (5, row)):
            double = unit(double, f"{n}.branch7x7dbl_{i}", pad=pad)
        return side_by_side(unit(x, f"{n}.branch1x1"), seven, double, unit(average(x), f"{n}.branch_pool"))

    def d(x, n):
        seven = unit(unit(x, f"{n}.branch7x7x3_1"), f"{n}.branch7x7x3_2", pad=(0, 3))
        seven = unit(unit(seven, f"{n}.branch7x7x3_3", pad=(3, 0)), f"{n}.branch7x7x3_4", 2)
        return side_by_side(unit(unit(x, f"{n}.branch3x3_1"), f"{n}.branch3x3_2", 2), seven, maximum(x))

    def e(x, n, pool):
        three = unit(x, f"{n}.branch3x3_1")
        double = unit(unit(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2", pad=(1, 1))
        return side_by_side(
            unit(x, f"{n}.branch1x1"),
            unit(three, f"{n}.branch3x3_2a", pad=(0, 1)),
            unit(three, f"{n}.branch3x3_2b", pad=(1, 0)),
            unit(double, f"{n}.branch3x3dbl_3a", pad=(0, 1)),
            unit(double, f"{n}.branch3x3dbl_3b", pad=(1, 0)),
            unit(pool(x), f"{n}.branch_pool"),
        )

    maps = {}
    x = unit(unit(unit(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3"), "Conv2d_2b_3x3", pad=(1, 1))
    maps["maps_64"] = x = maximum(x)
    maps["maps_192"] = x = maximum(unit(unit(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"))
    for n in ("5b", "5c", "5d"):
        x = a(x, f"Mixed_{n}")
    x = b(x, "Mixed_6a")
    for n in ("6b", "6c", "6d", "6e"):
        x = c(x, f"Mixed_{n}")
    maps["maps_768"] = x
    x = e(d(x, "Mixed_7a"), "Mixed_7b", average)
    x = e(x, "Mixed_7c", lambda x: maximum(x, 1, (1, 1)))
    maps["pool"] = x.mean((1, 2))
    return maps, maps["pool"] @ w["fc.weight"].T + w["fc.bias"]


def test_network_written_out():
    size = (139, 107)  # the last maps are 3 x 2: most of their windows reach over the border
    x = np.random.default_rng(1).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    variables = noise(size)
    found = jax.jit(TINY.apply)(variables, x)
    maps, logits = jax.jit(written_out)(restore_names(variables, "inception_fid", TINY), x)
    assert maps.keys() == found.features.keys() and maps["pool"].shape == (2, 128)
    for name, want in {**maps, "logits": logits}.items():
        got = found.logits if name == "logits" else found.features[name]
        scale = float(jnp.abs(want).max())
        assert scale > 0.1 and want.std() > 0.01 * scale
        np.testing.assert_allclose(got, want, atol=2e-5 * scale, err_msg=name)


def test_published_size():
    """Parameters and names of the published file; 5.7 GMACs at 299 x 299, as every table of Inception-v3 has it."""
    model = create_model("inception_fid")
    assert count_parameters(model, (299, 299)) == 23_850_960
    assert len(unit_names()) == 94
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 75, 75, 3)))
    assert len(jax.tree.leaves(shapes)) == 566 - 94  # the file has a counter of batches per norm
    assert round(find_model("inception_fid").macs(model, (299, 299)) / 1e9, 2) == 5.71


def test_macs_against_the_compiler():
    size = (299, 171)
    x = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    variables = jax.eval_shape(TINY.init, jax.random.key(0), x)
    flops = jax.jit(TINY.apply).lower(variables, x).cost_analysis()["flops"]
    # XLA leaves out products with the zeros of the borders; it counts norms and averages, of account at this width.
    assert 0.9 < flops / 2 / inception_macs(TINY, size) < 1.3


def test_small_images_are_refused():
    jax.eval_shape(TINY.init, jax.random.key(0), jnp.zeros((1, 75, 75, 3)))
    with pytest.raises(UserError, match="at least 75 x 75 pixels, not 80 x 74"):
        jax.eval_shape(TINY.init, jax.random.key(0), jnp.zeros((1, 80, 74, 3)))
