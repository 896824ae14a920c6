"""The options that every command with --checkpoint shares: those that describe weights of other programs, and the device."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from fastbyol.config.errors import UserError
from fastbyol.config.schema import WEIGHTS_OPTIONS

CHECKPOINT_HELP = (
    "run folder (its newest checkpoint), one checkpoint file, an export, or a ResNet's weights from torchvision, timm, solo-learn, lightly, "
    "VISSL, mmselfsup or DeepMind; "
    "what such a file does not tell is given by the options of training: --views.size_px 32 --model.stem small2"
)


def changes_from(run_options: Sequence[str]) -> dict[str, Any]:
    """Returns the options typed as for training, by dotted name. Raises UserError for one that weights do not have, or a bad value."""
    typed = [argument.split("=")[0].removeprefix("--") for argument in run_options if argument.startswith("--")]
    for name in typed:
        if name not in WEIGHTS_OPTIONS:
            raise UserError(
                f"unrecognized arguments: --{name}; options of weights are {', '.join(f'--{each}' for each in WEIGHTS_OPTIONS)}"
            )
    if not run_options:
        return {}
    from fastbyol.run.command_line import parse_train_config

    config = parse_train_config(run_options, usage="")
    groups = {"model": config.model, "views": config.views}
    return {name: getattr(groups[name.partition(".")[0]], name.partition(".")[2]) for name in typed}


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Adds --device, whose value `device_named` reads."""
    what = "where the encoder runs (default: auto, a GPU if there is one)"
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=what)


def device_named(name: str) -> str:
    """Returns 'cuda' or 'cpu' for a value of --device; 'auto' takes the GPU if there is one. Raises UserError for 'cuda' without a GPU."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible to PyTorch; leave it out to run on the CPU")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
