"""TensorFlow's SAME padding, which the official checkpoints were trained with."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def same_padding(size: int, *, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Returns the padding (before, after) for ceil(size / stride) output positions; an odd one goes after."""
    total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
    return total // 2, total - total // 2


def pad_same(x: Tensor, *, kernel: int, stride: int, dilation: int = 1, value: float = 0.0) -> Tensor:
    """Pads x (N, C, H, W) as SAME does."""
    top, bottom = same_padding(x.shape[2], kernel=kernel, stride=stride, dilation=dilation)
    left, right = same_padding(x.shape[3], kernel=kernel, stride=stride, dilation=dilation)
    return F.pad(x, (left, right, top, bottom), value=value)


class SameConv2d(nn.Conv2d):
    """Convolution that pads as TensorFlow does: a 3x3 one of stride 2 pads even inputs by (0, 1), where PyTorch pads by (1, 1)."""

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride, dilation = self.kernel_size[0], self.stride[0], self.dilation[0]
        return F.conv2d(
            pad_same(input, kernel=kernel, stride=stride, dilation=dilation),
            self.weight,
            self.bias,
            self.stride,
            0,
            self.dilation,
            self.groups,
        )


class SameMaxPool2d(nn.MaxPool2d):
    """Max-pool with SAME padding; padded positions never win."""

    def forward(self, input: Tensor) -> Tensor:
        padded = pad_same(input, kernel=int(self.kernel_size), stride=int(self.stride), value=float("-inf"))  # type: ignore[arg-type]
        return F.max_pool2d(padded, self.kernel_size, self.stride)
