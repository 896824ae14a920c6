"""Encoders, heads, cross-replica batch norm."""

from fastbyol.models.resnet import ResNet, build_encoder, encoder_from

__all__ = ["ResNet", "build_encoder", "encoder_from"]
