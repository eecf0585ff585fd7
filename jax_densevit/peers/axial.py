"""The axial transformer of the study (`models/axial.py`) in PyTorch layers, without positions.

State dicts have the names of lucidrains/axial-attention, as the study's have.
"""

import torch
from torch import nn
from torch.nn import functional as F


class AxialAttention(nn.Module):
    """Attention along one axis of `[B, C, H, W]`, 2 (columns) or 3 (rows), with a norm before it."""

    def __init__(self, channels: int, heads: int, axis: int):
        super().__init__()
        self.heads, self.axis = heads, axis
        inner = {
            "to_q": nn.Linear(channels, channels, bias=False),
            "to_kv": nn.Linear(channels, 2 * channels, bias=False),
            "to_out": nn.Linear(channels, channels),
        }
        self.fn = nn.ModuleDict({"norm": nn.LayerNorm(channels), "fn": nn.ModuleDict(inner)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = (0, 3, 2, 1) if self.axis == 2 else (0, 2, 3, 1)
        back = (0, 3, 2, 1) if self.axis == 2 else (0, 3, 1, 2)
        y = self.fn["norm"](x.permute(order))  # [B, lines, length, C]
        q = self.fn["fn"]["to_q"](y)
        k, v = self.fn["fn"]["to_kv"](y).chunk(2, -1)
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(2, 3) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(3)
        return self.fn["fn"]["to_out"](y).permute(back)


class ChannelNorm(nn.Module):
    """`(x - mean) / (std + epsilon) * g + b` over the channels of `[B, C, H, W]`."""

    def __init__(self, channels: int, epsilon: float = 1e-5):
        super().__init__()
        self.epsilon = epsilon
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.b = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(x, 1, unbiased=False, keepdim=True)
        return (x - mean) / (variance.sqrt() + self.epsilon) * self.g + self.b


def conv_mlp(channels: int, hidden: int) -> nn.Sequential:
    """Norm, 3x3 convolution, leaky ReLU, 3x3 convolution."""
    first, second = nn.Conv2d(channels, hidden, 3, padding=1), nn.Conv2d(hidden, channels, 3, padding=1)
    return nn.Sequential(ChannelNorm(channels), first, nn.LeakyReLU(0.01), second)


class ReversibleBlock(nn.Module):
    """`y1 = x1 + f(x2); y2 = x2 + g(y1)`."""

    def __init__(self, f: nn.Module, g: nn.Module):
        super().__init__()
        self.f, self.g = nn.ModuleDict({"net": f}), nn.ModuleDict({"net": g})

    def forward(self, x1: torch.Tensor, x2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y1 = x1 + self.f["net"](x2)
        return y1, x2 + self.g["net"](y1)

    def backward_pass(self, y1, y2, d1, d2):
        """Inputs and their gradients from outputs and theirs; adds the gradients of the parameters."""
        x2, d1 = _undo(self.g["net"], y1, y2, d1, d2)
        x1, d2 = _undo(self.f["net"], x2, y1, d2, d1)
        return x1, x2, d1, d2


def _undo(branch, x, y, dx, dy):
    """One half of a block, `y = before + branch(x)`: (before, the gradient to x)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = branch(x)
        out.backward(dy)
    return y - out.detach(), dx + x.grad


class _Reversible(torch.autograd.Function):
    """All blocks, without a kept activation: the backward pass goes back from the outputs of the last."""

    @staticmethod
    def forward(ctx, x, blocks):
        x1 = x2 = x
        for block in blocks:
            x1, x2 = block(x1, x2)
        ctx.blocks, ctx.streams = blocks, (x1.detach(), x2.detach())
        return x1 + x2

    @staticmethod
    def backward(ctx, dy):
        (y1, y2), d1, d2 = ctx.streams, dy, dy
        for block in reversed(ctx.blocks):
            y1, y2, d1, d2 = block.backward_pass(y1, y2, d1, d2)
        return d1 + d2, None


class Axial(nn.Module):
    """`[B, 3, H, W]` -> `[B, K, H, W]`.

    Args:
      model: ours (`models.axial.Axial`), reversible and without positions, whose sizes it takes.
    """

    def __init__(self, model):
        super().__init__()
        channels, heads = model.hidden_size, model.num_heads
        blocks = []
        for _ in range(model.num_layers):
            blocks.append(ReversibleBlock(AxialAttention(channels, heads, 2), AxialAttention(channels, heads, 3)))
            blocks.append(ReversibleBlock(conv_mlp(channels, model.mlp_size), conv_mlp(channels, model.mlp_size)))
        self.input_project = nn.Conv2d(3, channels, 1)
        self.layers = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.output_project = nn.Conv2d(channels, model.num_classes, model.head_kernel, padding=model.head_kernel // 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = _Reversible.apply(self.input_project(images), list(self.layers["blocks"]))
        return self.output_project(x / 2)
