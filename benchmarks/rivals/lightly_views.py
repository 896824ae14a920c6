"""BYOL's views with lightly: its BYOLTransform in a torch DataLoader over an ImageFolder.

lightly's defaults have the paper's probabilities and magnitudes. Differences from ours, all of which favour lightly or do not affect
the time: the resize is bilinear (antialiased), colour operations and blur are Pillow's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from benchmarks.rivals.packages import import_rival


class LightlyLoader:
    """Batches of an ImageFolder in listing order, made in the calling thread; iterating yields ([view1, view2], label)."""

    def __init__(self, folder: Path, *, size_px: int, batch: int) -> None:
        byol = import_rival("lightly.transforms.byol_transform")
        transform = byol.BYOLTransform(byol.BYOLView1Transform(input_size=size_px), byol.BYOLView2Transform(input_size=size_px))
        self._loader: DataLoader[Any] = DataLoader(ImageFolder(str(folder), transform), batch_size=batch, drop_last=True)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)
