"""ResNet v1 encoders with torchvision's parameter names: (N, 3, H, W) -> (N, feature_dim).

Grill et al., section 3.3: depths 50 to 200, width multipliers that widen every convolution (torchvision's wide_resnet widens only the
inner one), no classifier. The stride of a bottleneck is on its 3x3 convolution, as in torchvision and the official code.
Differs from the paper: the official code puts a projection shortcut into the first block of ResNet-18/34's first group. We do so only
with `projection_in_group1=True`; without it, torchvision's state dicts load.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol.config.errors import UserError, require_at_least, require_choice
from fastbyol.models.norm_relu import norm_relu


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
        return super().forward(pad_same(input, kernel=self.kernel_size[0], stride=self.stride[0], dilation=self.dilation[0]))


class SameMaxPool2d(nn.MaxPool2d):
    """Max-pool with SAME padding; padded positions never win."""

    def forward(self, input: Tensor) -> Tensor:
        kernel, stride = int(self.kernel_size), int(self.stride)  # type: ignore[arg-type]
        return F.max_pool2d(pad_same(input, kernel=kernel, stride=stride, value=float("-inf")), kernel, stride)


BN_EPS = 1e-5
BN_MOMENTUM = 0.1
"""Weight of the new batch in the running statistics (torch's convention); the official decay rate is 0.9."""


_batch_norm = partial(nn.BatchNorm2d, eps=BN_EPS, momentum=BN_MOMENTUM)
Convolution = Callable[..., nn.Conv2d]
"""Constructor of bias-free k x k convolutions with the chosen padding."""


def _convolution(padding: str) -> Convolution:

    def build(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1) -> nn.Conv2d:
        if padding == "same":
            return SameConv2d(in_channels, out_channels, kernel, stride=stride, bias=False)
        return nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)

    return build


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, *, stride: int, conv: Convolution, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 3, stride=stride)
        self.bn1 = _batch_norm(channels)
        self.conv2 = conv(channels, channels, 3)
        self.bn2 = _batch_norm(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = norm_relu(self.bn1, self.conv1(x))
        return norm_relu(self.bn2, self.conv2(x), shortcut)


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 (with the stride) and 1x1 convolutions."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, *, stride: int, conv: Convolution, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, channels, 1)
        self.bn1 = _batch_norm(channels)
        # The stride is here and not in the first convolution, as in the official code (torchvision's ResNet v1.5).
        self.conv2 = conv(channels, channels, 3, stride=stride)
        self.bn2 = _batch_norm(channels)
        self.conv3 = conv(channels, channels * self.expansion, 1)
        self.bn3 = _batch_norm(channels * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = norm_relu(self.bn1, self.conv1(x))
        x = norm_relu(self.bn2, self.conv2(x))
        return norm_relu(self.bn3, self.conv3(x), shortcut)


Block = type[BasicBlock] | type[Bottleneck]
DEPTHS: dict[str, tuple[Block, tuple[int, ...]]] = {
    # Not from the paper: three groups for images of 32 px, for demos that train in minutes on a CPU.
    "resnet8": (BasicBlock, (1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
    "resnet200": (Bottleneck, (3, 24, 36, 3)),
}
STEM_CHANNELS = {"resnet8": 32}
STEM_STRIDES = {"imagenet": 4, "small": 1, "small2": 2}
"""Factor by which each stem reduces the image size, including the max-pool."""


class ResNet(nn.Module):
    """Stem, three or four groups of residual blocks, and a global mean.

    Args:
        block: BasicBlock or Bottleneck.
        blocks: number of blocks in each group; groups after the first halve the resolution.
        stem: imagenet (7x7 stride 2, max-pool), small (3x3), small2 (3x3 stride 2).
        padding: symmetric (PyTorch) or same (TensorFlow).
        stem_channels: channels of the stem and, before expansion, of the first group; each further group has twice as many.
        group_channels: channels of each group, if they do not double.
    """

    def __init__(
        self,
        block: Block,
        blocks: tuple[int, ...],
        *,
        stem: str = "imagenet",
        padding: str = "symmetric",
        stem_channels: int = 64,
        group_channels: tuple[int, ...] = (),
        projection_in_group1: bool = False,
    ) -> None:
        super().__init__()
        conv = _convolution(padding)
        kernel, stride = {"imagenet": (7, 2), "small": (3, 1), "small2": (3, 2)}[stem]
        self.conv1 = conv(3, stem_channels, kernel, stride=stride)
        self.bn1 = _batch_norm(stem_channels)
        self.maxpool: nn.Module = nn.Identity()
        if stem == "imagenet":
            self.maxpool = SameMaxPool2d(3, 2) if padding == "same" else nn.MaxPool2d(3, 2, padding=1)
        channels = group_channels or tuple(stem_channels * 2**g for g in range(len(blocks)))
        self.num_groups = len(blocks)
        in_channels = stem_channels
        for g, (count, width) in enumerate(zip(blocks, channels, strict=True)):
            force = projection_in_group1 and g == 0
            group = _group(block, in_channels, width, count, stride=1 if g == 0 else 2, conv=conv, force_projection=force)
            self.add_module(f"layer{g + 1}", group)
            in_channels = width * block.expansion
        self.feature_dim = in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Returns the representation (N, feature_dim) of normalised images (N, 3, H, W)."""
        x = self.maxpool(norm_relu(self.bn1, self.conv1(x)))
        for group in self.groups():
            x = group(x)
        return x.mean(dim=(2, 3))

    def groups(self) -> list[nn.Sequential]:
        """Returns the groups of residual blocks, in order."""
        return [cast(nn.Sequential, self.get_submodule(f"layer{g + 1}")) for g in range(self.num_groups)]

    def maps(self, x: Tensor) -> list[Tensor]:
        """Returns the output of each group, (N, C, H, W), for normalised images (N, 3, H, W)."""
        x = self.maxpool(norm_relu(self.bn1, self.conv1(x)))
        maps = []
        for group in self.groups():
            x = group(x)
            maps.append(x)
        return maps


def _group(
    block: Block, in_channels: int, channels: int, count: int, *, stride: int, conv: Convolution, force_projection: bool
) -> nn.Sequential:
    out_channels = channels * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels or force_projection:
        downsample = nn.Sequential(conv(in_channels, out_channels, 1, stride=stride), _batch_norm(out_channels))
    first = block(in_channels, channels, stride=stride, conv=conv, downsample=downsample)
    rest = [block(out_channels, channels, stride=1, conv=conv, downsample=None) for _ in range(count - 1)]
    return nn.Sequential(first, *rest)


def layers_of(name: str) -> tuple[Block, tuple[int, ...]]:
    """Returns the kind of block of an encoder and the number of blocks in each of its groups. Raises UserError for an unknown name."""
    if name not in DEPTHS:
        raise UserError(f"model.encoder = {name!r}: unknown; choose one of {', '.join(DEPTHS)}, or timm/NAME")
    return DEPTHS[name]


def build_encoder(
    name: str,
    *,
    width: int = 1,
    stem: str = "imagenet",
    padding: str = "symmetric",
    zero_init_last_gamma: bool = False,
    initialisation: str = "kaiming",
    projection_in_group1: bool = False,
) -> ResNet:
    """Builds an encoder by name, for example resnet50, freshly initialised from torch's global generator.

    Args:
        name: one of `DEPTHS`.
        width: multiplies the channels of every convolution.
        stem, padding, projection_in_group1: see `ResNet`.
        zero_init_last_gamma: initialise the last batch-norm scale of each residual branch to zero.
        initialisation: kaiming (torchvision's) or truncated_normal (the official code's).
    """
    block, blocks = layers_of(name)
    require_at_least("model.width", width, 1)
    require_choice("model.stem", stem, tuple(STEM_STRIDES))
    require_choice("model.padding", padding, ("symmetric", "same"))
    require_choice("model.initialisation", initialisation, ("kaiming", "truncated_normal"))
    channels = STEM_CHANNELS.get(name, 64) * width
    encoder = ResNet(block, blocks, stem=stem, padding=padding, stem_channels=channels, projection_in_group1=projection_in_group1)
    encoder.apply(partial(_initialise, how=initialisation))
    if zero_init_last_gamma:
        # Each block then begins as its shortcut. Haiku's default for bottlenecks, but the paper's results are with 1 (official README).
        for module in encoder.modules():
            if isinstance(module, BasicBlock | Bottleneck):
                nn.init.zeros_((module.bn3 if isinstance(module, Bottleneck) else module.bn2).weight)
    return encoder


def _initialise(module: nn.Module, *, how: str) -> None:
    if not isinstance(module, nn.Conv2d | nn.Linear):
        return
    if how == "kaiming":
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    else:
        truncated_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@torch.no_grad()
def truncated_normal_(weight: Tensor) -> None:
    """Haiku's default initialisation: a normal of standard deviation 1/sqrt(fan_in), cut at two standard deviations."""
    # Not rescaled after the cut, as in Haiku, so the actual standard deviation is 0.88 of that.
    # Fan-in: inputs of one output, which is everything but the first dimension of the weight.
    sigma = 1 / math.sqrt(weight[0].numel())
    nn.init.trunc_normal_(weight, std=sigma, a=-2 * sigma, b=2 * sigma)
