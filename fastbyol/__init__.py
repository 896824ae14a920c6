"""fastbyol: fast and faithful pre-training with BYOL (Grill et al., NeurIPS 2020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

__version__ = "0.1.0"


def load_encoder(path_or_run: str | Path) -> nn.Module:
    """Returns the online encoder of a run folder or checkpoint file in eval mode on the CPU: (N, 3, H, W) normalised images -> (N, D)."""
    from fastbyol.export import load_encoder as load

    return load(path_or_run)
