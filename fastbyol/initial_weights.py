"""Weights to start from: another run's networks, or a bare encoder, under a schedule of its own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbyol.byol import BYOL
from fastbyol.checkpoint import CheckpointError, load_checkpoint, load_newest, why_not_loaded
from fastbyol.config.errors import UserError

log = logging.getLogger("fastbyol")
OPTION = "init_from"


def load_initial_weights(byol: BYOL, source: str) -> None:
    """Fills the networks, in place, before the first step.

    Args:
        byol: freshly built.
        source: a run folder or checkpoint of ours: both networks and, where the classes are as many, the probe. Or a file with an encoder's state
            dict under torchvision's names (torch.save, loaded with weights_only): the encoder of both networks; heads stay as they are.

    Raises:
        UserError: no such path, nothing of ours in it, or networks of another shape (with the first names that differ).
    """
    state = _read(Path(source))
    if "byol" in state:
        weights = dict(state["byol"])
        own = byol.state_dict()
        for name in ("probe.weight", "probe.bias"):
            if name in weights and weights[name].shape != own[name].shape:
                log.info("%s = %s: the probe of %d classes stays new", OPTION, source, len(own["probe.bias"]))
                weights[name] = own[name]
        load_matching(byol, weights, source=f"{OPTION} = {source!r}")
        log.info("%s = %s: networks after its step %d", OPTION, source, state["step"])
        return
    for network in (byol.online, byol.target):
        encoder = network.encoder
        assert isinstance(encoder, nn.Module)
        without_classifier = {name: value for name, value in state.items() if not name.startswith("fc.")}
        load_matching(encoder, without_classifier, source=f"{OPTION} = {source!r}")
    log.info("%s = %s: the encoder of both networks", OPTION, source)


def load_matching(module: nn.Module, weights: dict[str, Tensor], *, source: str) -> None:
    """`load_state_dict`, whose refusal becomes one line.

    Raises:
        UserError: names or shapes differ.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, must be {tuple(value.shape)}"
        for name, value in own.items()
        if name in weights and weights[name].shape != value.shape
    ]
    complaints = [f"it has no {name}" for name in missing] + [f"{name} is unknown here" for name in extra] + shapes
    if complaints:
        more = f" and {len(complaints) - 5} more" if len(complaints) > 5 else ""
        raise UserError(f"{source}: holds other networks ({'; '.join(complaints[:5])}{more}); give the model.… options of that run")
    module.load_state_dict(weights)


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        state = load_newest(path)
        if state is None:
            raise UserError(
                f"{OPTION} = {str(path)!r}: no checkpoints/step-*.pt in it; give a run folder, a checkpoint or an encoder's weights"
            )
        return state
    if not path.is_file():
        raise UserError(f"{OPTION} = {str(path)!r}: no such file or folder")
    if path.with_suffix(".sha256").exists():
        return load_checkpoint(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{OPTION} = {str(path)!r}: is not a file of weights ({why_not_loaded(error)})") from error
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{OPTION} = {str(path)!r}: is not a state dict (names to tensors)")
    return state
