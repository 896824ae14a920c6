"""Builds the encoder that a config names: one of our ResNets, or any timm model."""

from __future__ import annotations

from torch import nn

from fastbyol.config.errors import UserError, require
from fastbyol.config.schema import ModelConfig
from fastbyol.models.resnet import DEPTHS, STEM_STRIDES, build_encoder
from fastbyol.models.timm_encoder import PREFIX, check_timm_image_size, timm_encoder


def encoder_from(config: ModelConfig) -> nn.Module:
    """Returns the encoder, (N, 3, H, W) -> (N, feature_dim), freshly initialised from torch's global generator.

    Raises:
        UserError: unknown name or option.
    """
    if config.encoder.startswith(PREFIX):
        return timm_encoder(config)
    return build_encoder(
        config.encoder,
        width=config.width,
        stem=config.stem,
        padding=config.padding,
        zero_init_last_gamma=config.zero_init_last_gamma,
        initialisation=config.initialisation,
    )


def check_image_size(size_px: int, *, encoder: str, stem: str) -> None:
    """Checks that the encoder accepts images of this size: its strides must leave at least one position, and some encoders have a fixed
    size.

    Raises:
        UserError: the size is not accepted, or the encoder is unknown.
    """
    if encoder.startswith(PREFIX):
        check_timm_image_size(size_px, encoder=encoder)
        return
    if encoder not in DEPTHS:
        raise UserError(f"model.encoder = {encoder!r}: unknown; choose one of {', '.join(DEPTHS)}, or timm/NAME")
    strides = STEM_STRIDES[stem] * 2 ** (len(DEPTHS[encoder][1]) - 1)
    require(size_px >= strides, "views.size_px", size_px, f">= {strides}, the product of the strides of {encoder} with stem {stem}")
