"""Loads the trained encoder for use elsewhere."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fastbyol.byol import build_byol
from fastbyol.models.view_batchnorm import convert_to_batchnorm
from fastbyol.run.checkpoint import RunState, load_run
from fastbyol.run.initial_weights import load_matching


def load_encoder(path_or_run: str | Path) -> nn.Module:
    """Returns the online encoder of a run folder or checkpoint file, in eval mode on the CPU.

    It maps (N, 3, H, W) normalised images to (N, feature_dim). It is the online network's encoder, not the target's, as in the
    official evaluation. Parameter names are torchvision's.
    """
    return encoder_of(load_run(path_or_run))


def encoder_of(run: RunState) -> nn.Module:
    """Returns the encoder of a loaded run, as `load_encoder` does. Raises UserError if its weights do not match its config."""
    bias = run.state["byol"].get("probe.bias")
    byol = build_byol(run.config.model, num_classes=len(bias) if bias is not None and bias.ndim else 1)
    load_matching(byol, run.state["byol"], source=f"the checkpoint after step {run.step} of {run.folder}")
    return convert_to_batchnorm(byol.online.encoder).eval()
