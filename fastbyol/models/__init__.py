"""Encoders, projector and predictor heads, and batch norm per view and over all ranks."""

from fastbyol.models.encoder import encoder_from
from fastbyol.models.resnet import ResNet, build_encoder

__all__ = ["ResNet", "build_encoder", "encoder_from"]
