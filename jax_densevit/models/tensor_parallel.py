"""Which dimension of a layer's parameters the devices of the mesh's "tensor" axis divide among themselves.

The first of two layers makes channels that only the second one reads (heads of attention, hidden channels of an MLP or
of two convolutions): each device makes its share of them and multiplies it with its part of the second kernel, and one
sum over devices gives what follows (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053). Layers are known by the
names that they have in every model here: a new model that uses them needs no rules of its own, and
`config.sharding_rules` go before these.
"""

import re
from collections.abc import Sequence

# (regular expression over "a/b/c", dimension); dimensions count from the end, so kernels of any number of axes are
# served, and the axis that stacks scanned layers does not matter.
RULES: tuple[tuple[str, int], ...] = (
    # Attention, by head: `layers.attention`, `layers.window`, `layers.causal`, `models.axial`.
    (r"/(qkv|pointwise|memory|cross_query)/(kernel|bias)$", -2),  # [..., heads, d]
    (r"/(cross_)?out/kernel$", -3),  # [heads, d, D]
    (r"/position_bias$", -1),  # [pairs, heads]
    # ColTran's: `models.coltran.conditional`.
    (r"_attention/(cond_)?[qkv]_kernel$", -2),  # [D, heads, d]
    (r"_attention/out_kernel$", -3),
    (r"_attention/relative_bias$", -2),  # [heads, 2 L]
    # MLPs, by hidden channel, with the depthwise convolution between them where there is one.
    (r"/fc(1|_0)/(kernel|bias)$", -1),
    (r"/feed_forward/depthwise/(kernel|bias)$", -1),
    (r"/fc(2|_1)/kernel$", -2),
    # Pairs of convolutions, by channel between them: the U-Nets', the axial transformer's, DPT's, those of SETR's
    # heads (first and second, third and fourth) and of its pyramid.
    (r"(^|/)(first|conv_[02]|branch_\d_0|project_\d)/(conv|norm)/(kernel|scale|bias)$", -1),
    (r"(^|/)(second|conv_[13]|branch_\d_1|extract_\d)/conv/kernel$", -2),
    (r"/conv1/(kernel|bias)$|/(skip|refine)/norm1/(scale|bias)$", -1),
    (r"/conv2/kernel$", -2),
    # Bottlenecks: `models.resnet`, and those turned inside out of `models.efficientnet_lite`.
    (r"/conv2/(conv|norm)/(kernel|scale|bias)$", -1),
    (r"/conv3/conv/kernel$", -2),
    (r"/block_\d+/(expand|depthwise)/(conv|norm)/(kernel|scale|bias)$", -1),
    (r"/block_\d+/project/conv/kernel$", -2),
)
_COMPILED = tuple((re.compile(pattern), dimension) for pattern, dimension in RULES)


def tensor_dimension(path: str, shape: Sequence[int]) -> int | None:
    """The dimension of the parameter of that path and shape (of one layer) that may be divided; None for most."""
    for pattern, dimension in _COMPILED:
        if pattern.search(path):
            return len(shape) + dimension if -dimension <= len(shape) else None
    return None
