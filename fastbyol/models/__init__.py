"""Encoders, heads, batch norm of two views and of all ranks."""

from fastbyol.models.encoder import encoder_from
from fastbyol.models.resnet import ResNet, build_encoder

__all__ = ["ResNet", "build_encoder", "encoder_from"]
