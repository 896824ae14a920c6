"""The first convolution with a fourth input channel of zeros: the same results, and a pixel of 8 bytes instead of 6 in 16 bits.

Tensor cores read channels-last pixels in pieces of 4, 8 or 16 channels; with 3 of them cuDNN either pads a copy itself or takes a slower
kernel. Which is faster depends on the card, so it is a switch (`precision.pad_stem`) that `python -m fastbyol tune` measures. Parameters
keep their shapes: checkpoints, exports and the optimizer know nothing of it.
"""

from __future__ import annotations

from types import MethodType

import torch.nn.functional as F
from torch import Tensor, nn

_ONE_CHANNEL_MORE = (0, 0, 0, 0, 0, 1)
"""For F.pad of (N, C, H, W), which counts from the last dimension on."""


def pad_stem(module: nn.Module) -> None:
    """Makes every convolution over three channels in the module read four, the last of them zero, in place."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3 and layer.groups == 1:
            layer._conv_forward = MethodType(_with_fourth_channel, layer)  # type: ignore[method-assign]


def _with_fourth_channel(layer: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padded = F.pad(input, _ONE_CHANNEL_MORE), F.pad(weight, _ONE_CHANNEL_MORE)
    return type(layer)._conv_forward(layer, *padded, bias)
