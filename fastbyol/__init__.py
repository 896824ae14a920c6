"""fastbyol: fast and faithful pre-training with BYOL (Grill et al., NeurIPS 2020).

The names below are imported on first use, so that `import fastbyol` itself does not wait for torch; docs/python.md shows them at work.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbyol.byol import BYOL
    from fastbyol.config.schema import DataConfig, ModelConfig, TrainConfig
    from fastbyol.config.views import ViewPair, ViewSpec
    from fastbyol.data.batch import ImageBatch, ViewBatch
    from fastbyol.data.build import build_image_loader, build_loader
    from fastbyol.evaluation.embedding import embed
    from fastbyol.evaluation.feature_file import FeatureFile
    from fastbyol.export import load_encoder
    from fastbyol.models.resnet import build_encoder
    from fastbyol.objectives import byol_loss
    from fastbyol.optim.ema import ema_update
    from fastbyol.optim.lars import LARS
    from fastbyol.optim.param_groups import byol_param_groups
    from fastbyol.schedules import lr_at, tau_at

__version__ = "0.1.0"

_HOME = {
    "BYOL": "byol",
    "DataConfig": "config.schema",
    "FeatureFile": "evaluation.feature_file",
    "ImageBatch": "data.batch",
    "LARS": "optim.lars",
    "ModelConfig": "config.schema",
    "TrainConfig": "config.schema",
    "ViewBatch": "data.batch",
    "ViewPair": "config.views",
    "ViewSpec": "config.views",
    "build_encoder": "models.resnet",
    "build_image_loader": "data.build",
    "build_loader": "data.build",
    "byol_loss": "objectives",
    "byol_param_groups": "optim.param_groups",
    "ema_update": "optim.ema",
    "embed": "evaluation.embedding",
    "load_encoder": "export",
    "lr_at": "schedules",
    "tau_at": "schedules",
}
"""The module of each public name."""

__all__ = [
    "BYOL",
    "LARS",
    "DataConfig",
    "FeatureFile",
    "ImageBatch",
    "ModelConfig",
    "TrainConfig",
    "ViewBatch",
    "ViewPair",
    "ViewSpec",
    "build_encoder",
    "build_image_loader",
    "build_loader",
    "byol_loss",
    "byol_param_groups",
    "ema_update",
    "embed",
    "load_encoder",
    "lr_at",
    "tau_at",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastbyol' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"fastbyol.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
