"""Encoders, heads, cross-replica batch norm."""

from fastbyol.models.resnet import ResNet, build_encoder

__all__ = ["ResNet", "build_encoder"]
