"""Encoders as backbones: the maps of their groups instead of the global mean, for segmentation, detection and depth.

Parameters keep their names, so that the same weights load. The last group can be dilated: stride 1 and dilation 2 instead of stride 2
(Grill et al., appendix D.4), which doubles its resolution with the same weights.
"""

from __future__ import annotations

from typing import Any, Self

from torch import Tensor, nn

from fastbyol.config.errors import UserError, first_line
from fastbyol.models.resnet import ResNet, SameConv2d

_STEM_STRIDE = 2


class Backbone(nn.Module):
    """The maps of an encoder's groups, (N, 3, H, W) -> [(N, C, H / stride, W / stride), …], from fine to coarse.

    channels, strides: of each map.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    frozen = False

    def forward(self, x: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def freeze(self) -> None:
        """Keeps the parameters as they are, and the batch norms at their running statistics, in training too."""
        self.frozen = True
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(mode and not self.frozen)

    def last(self, x: Tensor) -> Tensor:
        """Returns the coarsest map."""
        return self(x)[-1]


class ResNetBackbone(Backbone):
    """The maps of one of our ResNets; it takes the encoder over, and may change its strides."""

    def __init__(self, encoder: ResNet, *, dilate_last: bool = False) -> None:
        super().__init__()
        if dilate_last:
            dilate_group(encoder.groups()[-1])
        self.encoder = encoder
        stride = encoder.conv1.stride[0] * (1 if isinstance(encoder.maxpool, nn.Identity) else _STEM_STRIDE)
        channels, strides = [], []
        for group in encoder.groups():
            convolutions = [module for module in group[-1].modules() if isinstance(module, nn.Conv2d)]
            channels.append(convolutions[-1].out_channels)
            stride *= group_stride(group)
            strides.append(stride)
        self.channels, self.strides = tuple(channels), tuple(strides)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.encoder.maps(x)

    def take_last_group(self) -> nn.Sequential:
        """Removes the last group from the backbone and returns it: Faster R-CNN's C4 uses it on each region."""
        group = self.encoder.groups()[-1]
        delattr(self.encoder, f"layer{self.encoder.num_groups}")
        self.encoder.num_groups -= 1
        self.channels, self.strides = self.channels[:-1], self.strides[:-1]
        return group


class TimmBackbone(Backbone):
    """The maps of a timm model, by timm's own `features_only`, with the encoder's weights."""

    def __init__(self, encoder: nn.Module, *, name: str, output_stride: int | None = None) -> None:
        super().__init__()
        self.encoder = _timm_features(name, output_stride=output_stride)
        info = self.encoder.feature_info
        self.channels, self.strides = tuple(info.channels()), tuple(info.reduction())
        _load_renamed(self.encoder, encoder.state_dict(), name=name)
        self.eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.encoder(x)
        # Swin and some others keep their channels last.
        return [x if x.shape[1] == width else x.movedim(-1, 1) for x, width in zip(maps, self.channels, strict=True)]


def backbone_of(encoder: nn.Module, *, dilate_last: bool = False) -> Backbone:
    """Returns the encoder as a `Backbone`. dilate_last: halve the stride of its last map.

    Raises:
        UserError: a timm model without maps, or of which the last group cannot be dilated.
    """
    if isinstance(encoder, ResNet):
        return ResNetBackbone(encoder, dilate_last=dilate_last)
    name = timm_name(encoder)
    if not name:
        raise UserError(f"model.encoder: {type(encoder).__name__} gives no feature maps; take one of our ResNets, or a timm model")
    plain = TimmBackbone(encoder, name=name)
    if not dilate_last or len(plain.strides) < 2 or plain.strides[-1] == plain.strides[-2]:
        return plain  # a vision transformer has one resolution
    return TimmBackbone(encoder, name=name, output_stride=plain.strides[-1] // 2)


def timm_name(encoder: nn.Module) -> str:
    """Returns the name under which timm builds this model; '' for other modules."""
    settings: Any = getattr(encoder, "pretrained_cfg", None)
    return str(settings.get("architecture", "")) if isinstance(settings, dict) else ""


def group_stride(group: nn.Sequential) -> int:
    """Returns the factor by which a group of residual blocks reduces the image."""
    return max(module.stride[0] for module in group[0].modules() if isinstance(module, nn.Conv2d))


def dilate_group(group: nn.Module, *, dilation: int = 2) -> None:
    """Gives all convolutions of the group stride 1, and its 3x3 ones this dilation with the padding that keeps the size."""
    # Appendix D.4 dilates all of them. torchvision's replace_stride_with_dilation leaves out the first one.
    for module in group.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = (dilation, dilation)
                if not isinstance(module, SameConv2d):
                    module.padding = (dilation, dilation)


def _timm_features(name: str, *, output_stride: int | None) -> Any:
    import timm

    wish: dict[str, Any] = {} if output_stride is None else {"output_stride": output_stride}
    try:
        features: Any = timm.create_model(name, pretrained=False, features_only=True, **wish)
        # Before 1.0.31 timm silently ignores output_stride for some models.
        if output_stride is not None and (stride := features.feature_info.reduction()[-1]) != output_stride:
            raise ValueError(f"it was built with stride {stride}")
        return features
    except Exception as error:  # timm raises whatever the model's constructor does: TypeError, RuntimeError, AttributeError, AssertionError
        what = "gives no feature maps" if output_stride is None else f"has no last group that can be dilated to stride {output_stride}"
        raise UserError(
            f"model.encoder = 'timm/{name}': {what} in timm {timm.__version__} ({first_line(error)}); take a ResNet for this task"
        ) from error


def _load_renamed(features: nn.Module, weights: dict[str, Tensor], *, name: str) -> None:
    """Loads a timm model's weights into its feature extractor, in which names may have a prefix, and underscores instead of dots."""
    flat = {key.replace(".", "_"): value for key, value in weights.items()}
    wanted = {key: flat.get(key.removeprefix("model.").replace(".", "_")) for key in features.state_dict()}
    missing = [key for key, value in wanted.items() if value is None]
    if missing:
        raise UserError(
            f"model.encoder = 'timm/{name}': {len(missing)} weights of its feature maps are not in the encoder, such as {missing[0]}; "
            "take a ResNet for this task"
        )
    features.load_state_dict(wanted)
