"""Data loading: reads images, converts them for fast reading, and yields batches of two views (`ViewBatch`).

The names below are imported on first use, because the worker processes of a conversion import this package and must not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbyol.data.batch import CropBatch, ImageBatch, ViewBatch, crops_on_device, views_on_device
    from fastbyol.data.build import build_crop_loader, build_image_loader, build_loader, build_run_loader

__all__ = [
    "CropBatch",
    "ImageBatch",
    "ViewBatch",
    "build_crop_loader",
    "build_image_loader",
    "build_loader",
    "build_run_loader",
    "crops_on_device",
    "views_on_device",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.{'build' if name.startswith('build') else 'batch'}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
