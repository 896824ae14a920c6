"""The trained encoder, for use elsewhere."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fastbyol.byol import build_byol
from fastbyol.checkpoint import load_run
from fastbyol.models.view_batchnorm import convert_to_batchnorm


def load_encoder(path_or_run: str | Path) -> nn.Module:
    """The online encoder of a run folder or checkpoint file, in eval mode on the CPU: (N, 3, H, W) normalised images -> (N, feature_dim).

    The online network's, not the target's, as the official evaluation. Its parameter names are torchvision's.
    """
    run = load_run(path_or_run)
    byol = build_byol(run.config.model, num_classes=len(run.state["byol"]["probe.bias"]))
    byol.load_state_dict(run.state["byol"])
    return convert_to_batchnorm(byol.online.encoder).eval()
