"""Entry points of torch.hub: torch.hub.load("PATH/TO/THIS/REPOSITORY", "encoder", checkpoint="runs/mine", source="local").

There are no published weights of ours to download; the checkpoint is yours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

dependencies = ["torch", "numpy", "numba", "PIL", "yaml"]
"""Modules that torch.hub looks for before it loads an entry point."""


def encoder(checkpoint: str, changes: dict[str, Any] | None = None) -> nn.Module:
    """Returns a trained encoder in eval mode, with its images' preprocessing as `encoder.preprocess`.

    Args:
        checkpoint: run folder, checkpoint, export, or another program's weights, as for `fastbyol.load_encoder`.
        changes: for weights, what the file cannot tell, for example {"views.size_px": 32}.
    """
    from fastbyol import load_encoder

    return load_encoder(checkpoint, changes=changes)
