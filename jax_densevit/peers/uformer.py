"""Uformer (`models/uformer.py`) in PyTorch layers, in the published form: square images of multiples of 128 pixels.

State dicts have the authors' names, but for the index of relative positions, which is no weight.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from jax_densevit.models.uformer import LEVELS, WIDTHS


def windows_of(x: torch.Tensor, window: int) -> torch.Tensor:
    """`[B, H, W, C]` -> `[B * windows, window ** 2, C]`."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // window, window, width // window, window, channels)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, channels)


def map_of(windows: torch.Tensor, window: int, size: tuple[int, int]) -> torch.Tensor:
    """The inverse of :func:`windows_of`: -> `[B, *size, C]`."""
    height, width = size
    x = windows.view(-1, height // window, width // window, window, window, windows.shape[-1])
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, height, width, windows.shape[-1])


def shift_mask(size: tuple[int, int], window: int, shift: int) -> torch.Tensor:
    """What keeps strips apart that only the roll has brought together: `[windows, window ** 2, window ** 2]`."""
    strips = torch.zeros(1, *size, 1)
    cuts = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for i, rows in enumerate(cuts):
        for j, columns in enumerate(cuts):
            strips[:, rows, columns] = 3 * i + j
    numbers = windows_of(strips, window)[..., 0]
    return (numbers[:, None] != numbers[:, :, None]) * -100.0


class WindowAttention(nn.Module):
    """Attention inside windows with a bias per relative position: `[N, window ** 2, C]` -> the same."""

    def __init__(self, channels: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        table = torch.zeros((2 * window - 1) ** 2, heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        places = torch.stack(torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij")).flatten(1)
        rows, columns = places[:, :, None] - places[:, None] + window - 1
        self.register_buffer("index", (rows * (2 * window - 1) + columns).flatten(), persistent=False)
        self.qkv = nn.ModuleDict({"to_q": nn.Linear(channels, channels), "to_kv": nn.Linear(channels, 2 * channels)})
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        count, tokens, channels = x.shape
        q = self.qkv["to_q"](x).view(count, tokens, self.heads, -1).transpose(1, 2)
        k, v = self.qkv["to_kv"](x).view(count, tokens, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.index].view(tokens, tokens, -1).permute(2, 0, 1)[None]
        if mask is not None:
            bias = bias + mask[:, None].repeat(count // len(mask), 1, 1, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(y.transpose(1, 2).reshape(count, tokens, channels))


class LeFF(nn.Module):
    """Linear, GELU, depthwise 3x3, GELU, linear: `[B, H, W, C]` -> the same."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.linear1 = nn.Sequential(nn.Linear(channels, hidden), nn.GELU())
        self.dwconv = nn.Sequential(nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden), nn.GELU())
        self.linear2 = nn.Sequential(nn.Linear(hidden, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dwconv(self.linear1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.linear2(y)


class LeWinBlock(nn.Module):
    """Window attention and LeFF, with residuals under stochastic depth: `[B, H, W, C]` -> the same."""

    def __init__(self, channels: int, heads: int, window: int, shift: int, ratio: int, modulator: bool, rate: float):
        super().__init__()
        self.window, self.shift, self.rate = window, shift, rate
        self.modulator = nn.Embedding(window * window, channels) if modulator else None
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn, self.mlp = WindowAttention(channels, heads, window), LeFF(channels, ratio * channels)
        self.masks = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size, shift = tuple(x.shape[1:3]), self.shift
        y = self.norm1(x)
        mask = None
        if shift:
            key = (size, x.device)
            if key not in self.masks:
                with torch.inference_mode(False):  # it serves training too
                    self.masks[key] = shift_mask(size, self.window, shift).to(x.device)
            mask = self.masks[key]
            y = torch.roll(y, (-shift, -shift), (1, 2))
        y = windows_of(y, self.window)
        if self.modulator is not None:
            y = y + self.modulator.weight
        y = map_of(self.attn(y, mask), self.window, size)
        if shift:
            y = torch.roll(y, (shift, shift), (1, 2))
        x = x + self._drop(y)
        return x + self._drop(self.mlp(self.norm2(x)))

    def _drop(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.rate:
            return branch
        kept = torch.rand(len(branch), 1, 1, 1, device=branch.device) >= self.rate
        return branch * (kept / (1 - self.rate))


class Uformer(nn.Module):
    """`[B, 3, H, W]` -> `[B, K, H, W]`, H = W a multiple of 16 windows.

    Args:
      model: ours (`models.uformer.Uformer`), whose sizes it takes; with LeFF, linear projections, and no options that
        the published form has not.
    """

    def __init__(self, model):
        super().__init__()
        base, (windows, shifts) = model.base, model.windows_and_shifts()
        encoder = np.linspace(0, model.drop_path, sum(model.depths[:4])).tolist()
        decoder = np.linspace(0, model.drop_path, sum(model.depths[5:])).tolist()[::-1]
        rates = iter([*encoder, *[model.drop_path] * model.depths[4], *decoder])
        self.adds_image = model.residual == "study" and model.num_classes == 3
        self.input_proj = nn.ModuleDict({"proj": nn.Sequential(nn.Conv2d(3, base, 3, padding=1), nn.LeakyReLU(0.01))})
        self.output_proj = nn.ModuleDict({"proj": nn.Sequential(nn.Conv2d(2 * base, model.num_classes, 3, padding=1))})
        for i, (level, width) in enumerate(zip(LEVELS, WIDTHS, strict=True)):
            sizes = (width * base, model.heads[i], windows[i])
            blocks = [
                LeWinBlock(*sizes, shifts[i] if n % 2 else 0, model.mlp_ratio, model.modulator and i > 4, next(rates))
                for n in range(model.depths[i])
            ]
            stage = nn.ModuleDict({"blocks": nn.Sequential(*blocks)})
            channels = base << level
            if i < 4:
                setattr(self, f"encoderlayer_{i}", stage)
                down = nn.Conv2d(channels, 2 * channels, 4, 2, 1)
                setattr(self, f"dowsample_{i}", nn.ModuleDict({"conv": nn.Sequential(down)}))  # spelt so
            elif i == 4:
                self.conv = stage
            else:
                up = nn.ConvTranspose2d(WIDTHS[i - 1] * base, channels, 2, 2)
                setattr(self, f"upsample_{i - 5}", nn.ModuleDict({"deconv": nn.Sequential(up)}))
                setattr(self, f"decoderlayer_{i - 5}", stage)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x, maps = self.input_proj["proj"](images), []
        for i in range(4):
            x = self._stage(f"encoderlayer_{i}", x)
            maps.append(x)
            x = getattr(self, f"dowsample_{i}")["conv"](x)
        x = self._stage("conv", x)
        for i in range(4):
            x = getattr(self, f"upsample_{i}")["deconv"](x)
            x = self._stage(f"decoderlayer_{i}", torch.cat([x, maps.pop()], 1))
        x = self.output_proj["proj"](x)
        return x + images if self.adds_image else x

    def _stage(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Stages have channels last, convolutions first."""
        return getattr(self, name)["blocks"](x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
