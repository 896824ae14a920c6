"""Encoders, projector and predictor heads, and batch norm per view and over all ranks."""

from fastbyol.models.encoder import check_image_size, encoder_from
from fastbyol.models.resnet import ResNet, build_encoder
from fastbyol.models.view_batchnorm import use_all_ranks

__all__ = ["ResNet", "build_encoder", "check_image_size", "encoder_from", "use_all_ranks"]
