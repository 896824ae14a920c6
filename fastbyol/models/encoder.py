"""Builds the encoder that a config names: one of our ResNets, or any timm model."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol.config.errors import UserError, require
from fastbyol.config.plain import nearest_name
from fastbyol.config.schema import ModelConfig
from fastbyol.models.resnet import STEM_STRIDES, build_encoder, layers_of

PREFIX = "timm/"
_FOR_RESNETS_ONLY = ("width", "stem", "padding", "zero_init_last_gamma", "initialisation")
_ONE_CHANNEL_MORE = (0, 0, 0, 0, 0, 1)
"""For F.pad of (N, C, H, W), which counts from the last dimension on."""


def encoder_from(config: ModelConfig) -> nn.Module:
    """Returns the encoder, (N, 3, H, W) -> (N, feature_dim), freshly initialised from torch's global generator."""
    if config.encoder.startswith(PREFIX):
        return _timm_encoder(config)
    return build_encoder(
        config.encoder,
        width=config.width,
        stem=config.stem,
        padding=config.padding,
        zero_init_last_gamma=config.zero_init_last_gamma,
        initialisation=config.initialisation,
    )


def check_image_size(size_px: int, *, encoder: str, stem: str) -> None:
    """Raises UserError unless the encoder is known and accepts images of this size."""
    if encoder.startswith(PREFIX):
        timm, name = _timm_and_name(encoder)
        settings = timm.get_pretrained_cfg(name, allow_unregistered=True)
        # Vision transformers have an embedding for each patch, and so one size.
        if settings is not None and settings.fixed_input_size:
            fixed_px = settings.input_size[-1]
            require(size_px == fixed_px, "views.size_px", size_px, f"{fixed_px}, the size that {encoder} takes")
        return
    _, blocks = layers_of(encoder)
    # Each group after the first halves the image, and at least one position must be left.
    strides = STEM_STRIDES[stem] * 2 ** (len(blocks) - 1)
    require(size_px >= strides, "views.size_px", size_px, f">= {strides}, the product of the strides of {encoder} with stem {stem}")


def _timm_encoder(config: ModelConfig) -> nn.Module:
    """Builds the model that `config.encoder` names after 'timm/', with an attribute `feature_dim`; parameter names are timm's."""
    timm, name = _timm_and_name(config.encoder)
    default = ModelConfig()
    for option in _FOR_RESNETS_ONLY:
        value, unset = getattr(config, option), getattr(default, option)
        require(value == unset, f"model.{option}", value, f"{unset!r} with encoder {config.encoder}: timm's models have no such option")
    model = timm.create_model(name, pretrained=False, num_classes=0)
    # Some models (MobileNetV3) widen their features once more in front of the classifier.
    model.feature_dim = int(getattr(model, "head_hidden_size", None) or model.num_features)
    return model


def _timm_and_name(encoder: str) -> tuple[Any, str]:
    """Returns the library and the model's name in it. Raises UserError if either is missing."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"model.encoder = {encoder!r}: timm is not installed; pip install 'fastbyol[timm]'") from error
    name = encoder.removeprefix(PREFIX)
    if not timm.is_model(name):
        near = nearest_name(name, timm.list_models())
        raise UserError(f"model.encoder = {encoder!r}: timm {timm.__version__} has no such model{near}; timm.list_models() lists them")
    return timm, name


def pad_stem(module: nn.Module) -> None:
    """Makes every convolution over three channels in the module read four, the last of them zero, in place; the results are the same.

    Tensor cores read channels-last pixels in pieces of 4, 8 or 16 channels; with 3 of them cuDNN either pads a copy itself or takes a slower
    kernel. Which is faster depends on the card, so it is a switch (`precision.pad_stem`) that `python -m fastbyol tune` measures.
    Parameters keep their shapes: checkpoints, exports and the optimizer know nothing of it.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3 and layer.groups == 1:
            layer._conv_forward = MethodType(_with_fourth_channel, layer)  # type: ignore[method-assign]


def _with_fourth_channel(layer: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    padded = F.pad(input, _ONE_CHANNEL_MORE), F.pad(weight, _ONE_CHANNEL_MORE)
    return type(layer)._conv_forward(layer, *padded, bias)
