"""BYOL's views as lightly makes them: its BYOLTransform in a torch DataLoader over an ImageFolder.

lightly's defaults have the paper's probabilities and magnitudes. What differs from ours, all of it in lightly's favour or neutral in time: the
resize is bilinear (antialiased), colour operations and blur are Pillow's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from fastbyol.config.errors import UserError


class LightlyLoader:
    """Batches of an ImageFolder in listing order, made in the calling thread: an iterable of ([view1, view2], label)."""

    def __init__(self, folder: Path, *, size_px: int, batch: int) -> None:
        try:
            from lightly.transforms.byol_transform import (  # type: ignore[import-not-found]  # an extra
                BYOLTransform,
                BYOLView1Transform,
                BYOLView2Transform,
            )
        except ImportError as error:
            raise UserError("lightly is not installed; pip install 'fastbyol[rivals]'") from error
        transform = BYOLTransform(BYOLView1Transform(input_size=size_px), BYOLView2Transform(input_size=size_px))
        self._loader: DataLoader[Any] = DataLoader(ImageFolder(str(folder), transform), batch_size=batch, drop_last=True)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)
