"""ResNets against their definition written out in NumPy, and their published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_densevit.errors import UserError
from jax_densevit.layers.convolution import StandardizedConv
from jax_densevit.models.resnet import ResNet, resnet_macs, stages


def shapes(model, size=(64, 96)):
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return variables, jax.eval_shape(model.apply, variables, image)


RESNET_50 = {"blocks": (3, 4, 6, 3), "norm": "batch"}
STEM_OF_HYBRIDS = {"blocks": (3, 4, 9), "norm": "group"}


@pytest.mark.parametrize("options,count", [(RESNET_50, 23_508_032), (STEM_OF_HYBRIDS, 11_894_848)])
def test_published_counts(options, count):
    variables, _ = shapes(ResNet(**options, output_stride=16))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count


@pytest.mark.parametrize("stride", [32, 16, 8, 4])
def test_output_stride(stride):
    """Strides stop there; parameters stay; dilations follow torchvision's."""
    model = ResNet(output_stride=stride)
    variables, maps = shapes(model)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes(ResNet())[0])
    strides = [min(stride, 4 * 2**s) for s in range(4)]
    sizes = [(1, 64 // s, 96 // s, 256 * 2**i) for i, s in enumerate(strides)]
    assert [m.shape for m in maps] == sizes
    dilations = [[dilation for _, _, dilation in stage] for stage in stages(model)]
    last = {32: [1, 1, 1], 16: [1, 2, 2], 8: [2, 4, 4], 4: [4, 8, 8]}[stride]
    assert dilations[0] == [1, 1, 1] and dilations[3] == last


def test_macs():
    """4.09 GMACs at 224 without the classifier, as every table of ResNet-50 (v1.5) has it; and XLA's own count."""
    assert round(resnet_macs(ResNet(), (224, 224)) / 1e9, 2) == 4.09
    for model in (ResNet(output_stride=16), ResNet(**STEM_OF_HYBRIDS, output_stride=16)):
        variables, _ = shapes(model, (225, 320))
        image = jax.ShapeDtypeStruct((1, 225, 320, 3), jnp.float32)
        flops = jax.jit(model.apply).lower(variables, image).cost_analysis()["flops"]
        # XLA leaves out products with the zeros of the borders and counts norms and the standardisation.
        assert 0.95 < flops / 2 / resnet_macs(model, (225, 320)) < 1.05


def test_standardised_kernels():
    """Scale and offset of a kernel change nothing; SAME borders put the odd zero at the end."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 8, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 3, 5)).astype(np.float32)
    conv = StandardizedConv(5, stride=2)
    got = conv.apply({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(conv.apply({"params": {"kernel": 3 * kernel + 1}}, x), got, atol=1e-5)
    flat = kernel.reshape(-1, 5)
    standard = ((flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-8)).reshape(kernel.shape)
    np.testing.assert_allclose(got, convolve(np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0))), standard, 2), atol=1e-5)


def convolve(x, kernel, stride=1, dilation=1):
    """Without borders, one output pixel after the other."""
    reach = dilation * (kernel.shape[0] - 1) + 1
    rows, columns = ((side - reach) // stride + 1 for side in x.shape[1:3])
    out = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            top, left = i * stride, j * stride
            window = x[:, top : top + reach : dilation, left : left + reach : dilation]
            out[:, i, j] = np.einsum("bhwc,hwcf->bf", window, kernel)
    return out


def written_out(variables, x, blocks, strides, dilations, group):
    """The whole network, for sizes whose borders are the same on both sides or, with group norm, at the end."""
    params, statistics = variables["params"], variables.get("batch_stats", {})

    def norm(x, p, s):
        if group:
            groups = min(32, x.shape[-1])
            split = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
            mean, var = split.mean((1, 3), keepdims=True), split.var((1, 3), keepdims=True)
            x = ((split - mean) / np.sqrt(var + 1e-5)).reshape(x.shape)
        else:
            x = (x - s["norm"]["mean"]) / np.sqrt(s["norm"]["var"] + 1e-5)
        return x * p["norm"]["scale"] + p["norm"]["bias"]

    def border(x, size, stride, dilation=1):
        if not group:
            return ((0, 0), *[(dilation * (size // 2),) * 2] * 2, (0, 0))
        wanted = [max(0, (-(-side // stride) - 1) * stride + dilation * (size - 1) + 1 - side) for side in x.shape[1:3]]
        return ((0, 0), *[(w // 2, w - w // 2) for w in wanted], (0, 0))

    def step(x, path, stride=1, dilation=1):
        p, s = params, statistics
        for name in path:
            p, s = p[name], s.get(name, {})
        kernel = np.asarray(p["conv"]["kernel"], np.float64)
        if group:
            kernel = (kernel - kernel.mean((0, 1, 2))) / np.sqrt(kernel.var((0, 1, 2)) + 1e-8)
        return norm(convolve(np.pad(x, border(x, kernel.shape[0], stride, dilation)), kernel, stride, dilation), p, s)

    x = np.maximum(step(np.asarray(x, np.float64), ("stem",), 2), 0)
    padded = np.pad(x, border(x, 3, 2), constant_values=-np.inf)
    rows, columns = ((side - 3) // 2 + 1 for side in padded.shape[1:3])
    x = np.stack(
        [
            np.stack([padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2)) for j in range(columns)], 1)
            for i in range(rows)
        ],
        1,
    )
    maps = []
    for s, count in enumerate(blocks):
        for b in range(count):
            name, stride = f"stage_{s}_block_{b}", strides[s] if b == 0 else 1
            y = np.maximum(step(x, (name, "conv1")), 0)
            y = np.maximum(step(y, (name, "conv2"), stride, dilations[s][b]), 0)
            y = step(y, (name, "conv3"))
            x = np.maximum(y + (step(x, (name, "shortcut"), stride) if b == 0 else x), 0)
        maps.append(x)
    return maps


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_network_written_out(norm):
    blocks, model = (1, 1, 2), ResNet((1, 1, 2), norm, width=4, output_stride=8)
    x = np.random.default_rng(0).normal(size=(2, 30, 21, 3)).astype(np.float32)
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        near = float(path[-1].key in ("scale", "var"))
        return (near + (0.1 if near else 0.3) * rng.uniform(-1, 1, leaf.shape)).astype(leaf.dtype)

    variables = jax.tree_util.tree_map_with_path(fill, jax.eval_shape(model.init, jax.random.key(0), x))
    got = jax.jit(model.apply)(variables, x)
    want = written_out(variables, x, blocks, (1, 2, 1), ((1,), (1,), (1, 2)), norm == "group")
    for ours, theirs in zip(got, want, strict=True):
        assert ours.shape == theirs.shape and np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_refusals():
    x = jnp.zeros((1, 32, 32, 3))
    with pytest.raises(UserError, match=r"output_stride among \[4, 8, 16, 32\], not 12"):
        jax.eval_shape(ResNet(output_stride=12).init, jax.random.key(0), x)
    with pytest.raises(UserError, match="did you mean 'group'"):
        jax.eval_shape(ResNet(norm="groups").init, jax.random.key(0), x)
