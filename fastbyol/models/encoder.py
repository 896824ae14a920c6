"""Builds the encoder that a config names: one of our ResNets, or any timm model."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastbyol.config.errors import UserError, require
from fastbyol.config.plain import nearest_name
from fastbyol.config.schema import ModelConfig
from fastbyol.models.resnet import DEPTHS, STEM_STRIDES, build_encoder


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


PREFIX = "timm/"
_FOR_RESNETS_ONLY = ("width", "stem", "padding", "zero_init_last_gamma", "initialisation")


def timm_encoder(config: ModelConfig) -> nn.Module:
    """Builds the model that `config.encoder` names after 'timm/', with an attribute `feature_dim`; parameter names are timm's.

    Raises:
        UserError: timm is not installed or has no such model, or the config sets an option that only our ResNets have.
    """
    timm, name = _library(config.encoder), config.encoder.removeprefix(PREFIX)
    default = ModelConfig()
    for option in _FOR_RESNETS_ONLY:
        value, unset = getattr(config, option), getattr(default, option)
        require(value == unset, f"model.{option}", value, f"{unset!r} with encoder {config.encoder}: timm's models have no such option")
    _check_name(timm, name)
    model = timm.create_model(name, pretrained=False, num_classes=0)
    model.feature_dim = int(getattr(model, "head_hidden_size", None) or model.num_features)
    return model


def check_timm_image_size(size_px: int, *, encoder: str) -> None:
    """Checks the image size for models that accept only one, such as vision transformers.

    Raises:
        UserError: another size, or timm or the model is missing.
    """
    timm, name = _library(encoder), encoder.removeprefix(PREFIX)
    _check_name(timm, name)
    settings = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if settings is not None and settings.fixed_input_size:
        require(size_px == settings.input_size[-1], "views.size_px", size_px, f"{settings.input_size[-1]}, the size that {encoder} takes")


def _library(encoder: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"model.encoder = {encoder!r}: timm is not installed; pip install 'fastbyol[timm]'") from error
    return timm


def _check_name(timm: Any, name: str) -> None:
    if not timm.is_model(name):
        near = nearest_name(name, timm.list_models())
        raise UserError(
            f"model.encoder = {PREFIX + name!r}: timm {timm.__version__} has no such model{near}; timm.list_models() lists them"
        )
