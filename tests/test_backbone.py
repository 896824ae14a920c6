"""Encoders as backbones: maps of every group, dilation with the same weights, timm's models."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from fastbyol.config.errors import UserError
from fastbyol.config.schema import ModelConfig
from fastbyol.models import build_encoder, encoder_from
from fastbyol.models.backbone import ResNetBackbone, backbone_of


def shapes(backbone: nn.Module, size_px: int) -> list[tuple[int, ...]]:
    with torch.no_grad():
        return [tuple(x.shape[1:]) for x in backbone.eval()(torch.zeros(1, 3, size_px, size_px))]


def test_every_group_gives_its_map_at_the_stride_and_width_of_the_architecture() -> None:
    backbone = backbone_of(build_encoder("resnet50"))
    assert (backbone.channels, backbone.strides) == ((256, 512, 1024, 2048), (4, 8, 16, 32))
    assert shapes(backbone, 64) == [(256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)]
    small = backbone_of(build_encoder("resnet8", stem="small2"), dilate_last=True)
    assert (small.channels, small.strides) == ((32, 64, 128), (2, 4, 4))
    assert shapes(small, 32) == [(32, 16, 16), (64, 8, 8), (128, 8, 8)]


def test_the_mean_of_the_last_map_is_the_encoders_representation() -> None:
    encoder = build_encoder("resnet18", stem="small").eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(backbone_of(encoder).last(images).mean((2, 3)), encoder(images))


def test_the_dilated_last_group_computes_what_torchvision_does_with_its_first_3x3_dilated_too() -> None:
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True]).eval()
    # torchvision dilates from the second block on; the paper dilates every 3x3 convolution of conv5.
    theirs.layer4[0].conv2.dilation = theirs.layer4[0].conv2.padding = (2, 2)
    encoder = build_encoder("resnet50")
    encoder.load_state_dict({name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")})
    images, reached = torch.randn(1, 3, 64, 64), {}
    theirs.layer4.register_forward_hook(lambda _, __, output: reached.update(map=output))
    with torch.no_grad():
        theirs(images)
        mine = backbone_of(encoder, dilate_last=True).eval().last(images)
    assert mine.shape == (1, 2048, 4, 4)
    torch.testing.assert_close(mine, reached["map"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_dilation_keeps_the_size_with_both_kinds_of_padding(padding: str) -> None:
    backbone = backbone_of(build_encoder("resnet18", padding=padding), dilate_last=True)
    assert shapes(backbone, 96)[-1] == (512, 6, 6)


def test_the_last_group_can_be_taken_out_for_the_box_head() -> None:
    encoder = build_encoder("resnet18", stem="small")
    whole = encoder.layer4
    backbone = ResNetBackbone(encoder)
    assert backbone.take_last_group() is whole
    assert (backbone.channels, backbone.strides) == ((64, 128, 256), (1, 2, 4))
    assert not [name for name in backbone.state_dict() if "layer4" in name]
    assert shapes(backbone, 32)[-1] == (256, 8, 8)


def test_timm_models_give_their_maps_with_the_encoders_weights() -> None:
    encoder = encoder_from(ModelConfig(encoder="timm/mobilenetv3_small_050")).eval()
    backbone = backbone_of(encoder, dilate_last=True)
    assert backbone.strides == (2, 4, 8, 16, 16)
    assert [shape[0] for shape in shapes(backbone, 64)] == list(backbone.channels)
    own = encoder.state_dict()
    assert all(torch.equal(own[name.removeprefix("encoder.")], value) for name, value in backbone.state_dict().items())
    transformer = backbone_of(encoder_from(ModelConfig(encoder="timm/swin_tiny_patch4_window7_224")))
    assert shapes(transformer, 224)[0] == (96, 56, 56)


def test_what_gives_no_maps_or_cannot_be_dilated_is_one_clear_error() -> None:
    with pytest.raises(UserError, match="Linear gives no feature maps"):
        backbone_of(nn.Linear(2, 2))
    swin = encoder_from(ModelConfig(encoder="timm/swin_tiny_patch4_window7_224"))
    with pytest.raises(UserError, match="cannot be dilated|can be dilated to stride 16"):
        backbone_of(swin, dilate_last=True)
