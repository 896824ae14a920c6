"""Faster R-CNN on a ResNet, from torchvision's parts: C4, where the last group of the encoder is the box head, or a feature pyramid.

Grill et al., section 4, and MoCo's detection code (detectron2's R50-C4): the backbone ends with conv4 at stride 16, each region is pooled to
14 x 14, conv5 and a mean make its feature.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbyol.config.errors import UserError
from fastbyol.models.backbone import Backbone, ResNetBackbone

PYRAMID_CHANNELS, BOX_FEATURES = 256, 1024


class InFloat32(nn.Module):
    """The module's output in float32, in tuples and lists too: boxes decoded in bfloat16 would be whole pixels off (steps of 4 px at 800)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return _in_float32(self.module(*inputs))


def _in_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float()
    return type(value)(_in_float32(item) for item in value)


class LastMap(nn.Module):
    """The coarsest map of a backbone, in float32: C4."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.out_channels = backbone.channels[-1]

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.last(images).float()


class PyramidMaps(nn.Module):
    """The maps of torchvision's feature pyramid over a backbone, and one coarser by max-pooling, by name, in float32."""

    def __init__(self, backbone: Backbone) -> None:
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        super().__init__()
        self.backbone = backbone
        # From stride 4 on, as usual; timm's models may begin at 2.
        self.used = [at for at, stride in enumerate(backbone.strides) if stride >= min(4, backbone.strides[-1])]
        channels = [backbone.channels[at] for at in self.used]
        self.pyramid = FeaturePyramidNetwork(channels, PYRAMID_CHANNELS, extra_blocks=LastLevelMaxPool())
        self.out_channels = PYRAMID_CHANNELS

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(images)
        fused = self.pyramid(OrderedDict((str(number), maps[at]) for number, at in enumerate(self.used)))
        return OrderedDict((name, value.float()) for name, value in fused.items())


class GroupBoxHead(nn.Module):
    """The encoder's last group on each pooled region, and the mean: (R, C, 14, 14) -> (R, features)."""

    def __init__(self, group: nn.Sequential, *, features: int, extra_norm: bool) -> None:
        super().__init__()
        self.group = group
        # MoCo's Res5ROIHeadsExtraNorm: a pre-trained conv5 ends without a norm on its sum.
        self.norm: nn.Module = nn.BatchNorm2d(features) if extra_norm else nn.Identity()

    def forward(self, regions: Tensor) -> Tensor:
        return self.norm(self.group(regions)).mean(dim=(2, 3))


class Detector(nn.Module):
    """torchvision's Faster R-CNN on images of one rank.

    Training: (images, targets) -> sum of the four losses. Evaluation: images -> [{boxes, labels, scores}, …]. Images are float (3, H, W) in
    [0, 1]; targets have 'boxes' and 'labels' (from 1). Frozen parts stay in evaluation mode.
    """

    def __init__(self, network: nn.Module, *, frozen: Sequence[nn.Module], fixed_norms: Sequence[nn.Module]) -> None:
        super().__init__()
        self.network = network
        self._kept_in_eval = [*frozen, *fixed_norms]
        for part in frozen:
            part.requires_grad_(False)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        found = self.network(images, targets)
        return sum(found.values(), torch.zeros((), device=images[0].device)) if self.training else found

    def train(self, mode: bool = True) -> Detector:
        super().train(mode)
        for part in self._kept_in_eval:
            part.eval()
        return self


def _normaliser(*, mean: tuple[float, ...], std: tuple[float, ...], size_divisible: int) -> nn.Module:
    """Returns torchvision's transform, which normalises images and pads them to one size, without its resizing."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    class Unresized(GeneralizedRCNNTransform):
        # The data set has resized the images with their boxes. torchvision's own switch, _skip_resize, works in training only.
        def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
            return image, target

    return Unresized(1, 1, list(mean), list(std), size_divisible=size_divisible)


def build_detector(
    backbone: Backbone,
    *,
    classes: int,
    head: str,
    frozen: str,
    fixed_norms: bool,
    extra_norm: bool,
    anchor_px: tuple[int, ...],
    anchor_aspects: tuple[float, ...],
    region_px: int,
    proposals: tuple[int, int, int, int],
    rpn_images: int,
    box_images: int,
    detections: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Detector:
    """Returns the network in training mode, with random heads from torch's global generator.

    Args:
        backbone: taken over. C4 needs one of our ResNets, whose last group can be applied to regions.
        classes: without the background.
        head: c4 or fpn.
        frozen: none; backbone: up to conv4 with C4, all of the encoder with a pyramid; encoder: conv5 in the box head too.
        fixed_norms: the encoder's batch norms keep their running statistics.
        extra_norm: a batch norm behind conv5 (C4 only).
        anchor_px: sides of the anchors; with a pyramid one for each of its maps.
        region_px: side of a pooled region.
        proposals: how many are kept before and after the suppression, in training, then in tests.
        rpn_images, box_images: anchors and regions of an image in the losses.
        detections: most of an image.

    Raises:
        UserError: C4 on a timm model, or other numbers of anchors than maps.
    """
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
    from torchvision.models.detection.rpn import RPNHead
    from torchvision.ops import MultiScaleRoIAlign

    group: nn.Sequential | None = None
    if head == "c4":
        if not isinstance(backbone, ResNetBackbone):
            raise UserError("--head c4: its box head is the last group of a ResNet, which timm's models do not give; take --head fpn")
        features = backbone.channels[-1]
        group = backbone.take_last_group()
        maps: Any = LastMap(backbone)
        box_head: nn.Module = GroupBoxHead(group, features=features, extra_norm=extra_norm)
        sides, names = (anchor_px,), ["0"]
        stride = backbone.strides[-1]
    else:
        maps = PyramidMaps(backbone)
        features, names = BOX_FEATURES, [str(number) for number in range(len(maps.used))]
        box_head = TwoMLPHead(PYRAMID_CHANNELS * region_px**2, features)
        if len(anchor_px) != len(names) + 1:
            raise UserError(f"--anchor_px {','.join(map(str, anchor_px))}: the pyramid has {len(names) + 1} maps, and each needs one side")
        sides, stride = tuple((side,) for side in anchor_px), 2 * backbone.strides[-1]
    anchors = AnchorGenerator(sides, (anchor_aspects,) * len(sides))
    before_train, after_train, before_test, after_test = proposals
    network = FasterRCNN(
        maps,
        rpn_anchor_generator=anchors,
        rpn_head=InFloat32(RPNHead(maps.out_channels, anchors.num_anchors_per_location()[0])),
        rpn_pre_nms_top_n_train=before_train,
        rpn_post_nms_top_n_train=after_train,
        rpn_pre_nms_top_n_test=before_test,
        rpn_post_nms_top_n_test=after_test,
        rpn_batch_size_per_image=rpn_images,
        # sampling_ratio 0: as many samples as the region has pixels, as in detectron2.
        box_roi_pool=MultiScaleRoIAlign(names, output_size=region_px, sampling_ratio=0),
        box_head=box_head,
        box_predictor=InFloat32(FastRCNNPredictor(features, classes + 1)),
        box_batch_size_per_image=box_images,
        box_detections_per_img=detections,
    )
    network.transform = _normaliser(mean=mean, std=std, size_divisible=stride)
    encoder_parts = [backbone, *([group] if group is not None else [])]
    kept = {"none": [], "backbone": [backbone], "encoder": encoder_parts}[frozen]
    norms = [module for part in encoder_parts for module in part.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return Detector(network, frozen=kept, fixed_norms=norms if fixed_norms else []).train()
