"""FFCV's own DatasetWriter on an image folder, as in its documentation and ImageNet example: Pillow decodes, JPEGs are re-encoded."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
from pathlib import Path

from PIL import Image

from fastbyol.data.inputs.listing import ImageListing

QUALITY = 90
"""FFCV's default."""


class PillowImages:
    """(image, label) by index, as in torchvision.datasets.ImageFolder."""

    def __init__(self, listing: ImageListing) -> None:
        self._listing = listing

    def __len__(self) -> int:
        return len(self._listing.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with Image.open(self._listing.path(index)) as file:
            return file.convert("RGB"), self._listing.labels[index]


def write_with_stock_ffcv(listing: ImageListing, out: Path, *, workers: int) -> None:
    """Writes a .beton of the whole listing; returns when its processes have ended."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        writer = DatasetWriter(
            str(out), {"image": RGBImageField(write_mode="jpg", jpeg_quality=QUALITY), "label": IntField()}, num_workers=workers
        )
        writer.from_indexed_dataset(PillowImages(listing))
    for process in multiprocessing.active_children():
        process.join()
