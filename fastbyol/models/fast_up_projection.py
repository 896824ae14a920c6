"""The decoder of Laina et al. (2016) for depth: fast up-projections, which double the resolution without convolving zeros.

Source: FCRN's tensorflow/models/network.py and fcrn.py. Unpooling with zeros and convolving 5x5 touches the same few inputs at each of four
kinds of output position; the four small convolutions compute exactly those, and their outputs are interleaved.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class UpConvolution(nn.Module):
    """(N, C_in, H, W) -> (N, C_out, 2H, 2W) by interleaving a 3x3, a 2x3, a 3x2 and a 2x2 convolution.

    The 3x3 one gives the positions of even row and column, the 2x3 one the odd rows, the 3x2 one the odd columns, the 2x2 one both odd. Sides
    of length 2 are padded at the top or left, as in FCRN's code; no bias, because a batch norm follows.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(in_channels, out_channels, (3, 3), bias=False)
        self.conv_b = nn.Conv2d(in_channels, out_channels, (2, 3), bias=False)
        self.conv_c = nn.Conv2d(in_channels, out_channels, (3, 2), bias=False)
        self.conv_d = nn.Conv2d(in_channels, out_channels, (2, 2), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = self.conv_a(F.pad(x, (1, 1, 1, 1)))
        b = self.conv_b(F.pad(x, (1, 1, 1, 0)))
        c = self.conv_c(F.pad(x, (1, 0, 1, 1)))
        d = self.conv_d(F.pad(x, (1, 0, 1, 0)))
        # pixel_shuffle reads channel 4 c + 2 row + column.
        return F.pixel_shuffle(torch.stack((a, c, b, d), dim=2).flatten(1, 2), 2)


class FastUpProjection(nn.Module):
    """Residual up-convolution: relu(bn(conv3x3(relu(bn(up(x))))) + bn(up'(x))), of twice the size."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up1 = UpConvolution(in_channels, out_channels)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.up2 = UpConvolution(in_channels, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv(F.relu(self.bn1(self.up1(x)), inplace=True)))
        return F.relu(branch + self.bn3(self.up2(x)), inplace=True)


class UpProjectionDecoder(nn.Module):
    """1x1 convolution with batch norm, up-projections, 3x3 convolution to one channel: (N, C, H, W) -> (N, 1, 2^n H, 2^n W)."""

    def __init__(self, in_channels: int, *, first_channels: int, up_channels: tuple[int, ...]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, first_channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(first_channels)
        widths = (first_channels, *up_channels)
        self.up = nn.Sequential(*(FastUpProjection(a, b) for a, b in itertools.pairwise(widths)))
        self.predict = nn.Conv2d(widths[-1], 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.predict.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        # FCRN has no ReLU here: the up-projections begin with convolutions of the normalised map.
        return self.predict(self.up(self.bn(self.conv(x))))
