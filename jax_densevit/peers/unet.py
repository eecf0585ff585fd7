"""The U-Net of `models/unet.py` in PyTorch layers, for multiples of 16 pixels."""

import torch
from torch import nn


def double_conv(channels: int, middle: int, features: int) -> nn.Sequential:
    """Twice a 3x3 convolution, batch norm and ReLU."""
    layers = []
    for given, made in ((channels, middle), (middle, features)):
        layers += [nn.Conv2d(given, made, 3, padding=1, bias=False), nn.BatchNorm2d(made), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """`[B, 3, H, W]` -> `[B, K, H, W]`; sizes and the way to enlarge are those of ours (`models.unet.UNet`)."""

    def __init__(self, model):
        super().__init__()
        base, bilinear = model.base, model.bilinear
        widths = [base * 2**i for i in range(5)]
        if bilinear:
            widths[-1] //= 2
        self.encoder = nn.ModuleList(double_conv(a, b, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        channels = widths[-1]
        for i in (3, 2, 1, 0):
            if bilinear:
                self.up.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True))
                middle, features = widths[i], widths[i] // 2 if i else base
                self.decoder.append(double_conv(widths[i] + channels, middle, features))
            else:
                features = widths[i]
                self.up.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
                self.decoder.append(double_conv(widths[i] + channels // 2, features, features))
            channels = features
        self.head = nn.Conv2d(base, model.num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for i, stage in enumerate(self.encoder):
            if i:
                skips.append(x)
                x = nn.functional.max_pool2d(x, 2)
            x = stage(x)
        for up, stage in zip(self.up, self.decoder, strict=True):
            x = stage(torch.cat([skips.pop(), up(x)], dim=1))
        return self.head(x)
