"""The formats by name."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from fastbyol.config.errors import UserError
from fastbyol.config.plain import nearest_name
from fastbyol.config.schema import ModelConfig

if TYPE_CHECKING:
    from fastbyol.exports.format import Format

MODULES: dict[str, str] = {
    "torchvision": "torch_weights",
    "timm": "timm_weights",
    "safetensors": "torch_weights",
    "huggingface": "timm_weights",
    "onnx": "graph",
    "torch_export": "graph",
    "detectron2": "detectron2_weights",
}
"""Module of each format, imported when it is chosen. Another format is a line here and in WHAT, and an entry of FORMATS there."""
WHAT: dict[str, str] = {
    "torchvision": "state dict of torchvision's ResNet, all keys but the classifier's (.pth)",
    "timm": "checkpoint for timm.create_model(checkpoint_path=...) (.safetensors or .pth)",
    "safetensors": "tensors with size, normalisation and card in the metadata; holds every encoder",
    "huggingface": "folder for timm's local-dir: and hf-hub:; nothing is uploaded",
    "onnx": "ONNX program with free batch size (.onnx)",
    "torch_export": "torch.export's program with free batch size (.pt2)",
    "detectron2": "backbone as MoCo's converter writes it (.pkl)",
}
"""Describes each format in a line, for --help."""


def format_named(name: str) -> Format:
    """Returns the format. Raises UserError for an unknown name."""
    if name not in MODULES:
        raise UserError(f"--to {name}: no such format{nearest_name(name, MODULES)}; those are {', '.join(MODULES)}, or all")
    return import_module(f"fastbyol.exports.{MODULES[name]}").FORMATS[name]


def all_suffixes() -> set[str]:
    """Returns every suffix that a file of one of the formats may have."""
    return {suffix for name in MODULES for suffix in format_named(name).suffixes}


def formats_for(names: list[str], model: ModelConfig, *, fold: str = "auto") -> tuple[dict[str, Format], dict[str, str]]:
    """Returns the chosen formats, and why others are left out of 'all'. fold: whether batch norm is to be folded, as typed.

    Raises UserError for one that cannot hold such an encoder, or whose library is missing; and for folding that none of them can do.
    """
    everything = "all" in names
    if everything and len(names) > 1:
        raise UserError(f"--to {' '.join(names)}: all has every format; leave the others out")
    chosen, left_out = {}, {}
    for name in MODULES if everything else dict.fromkeys(names):
        found = format_named(name)
        reason = found.refusal(model)
        if reason and not everything:
            able = [each for each in MODULES if not format_named(each).refusal(model)]
            raise UserError(f"--to {name}: {reason}; formats that can hold it: {', '.join(able)}")
        if not reason and (missing := [package for package in found.needs if find_spec(package) is None]):
            reason = f"{missing[0]} is not installed; pip install 'fastbyol[export]'"
            if not everything:
                raise UserError(f"--to {name}: {reason}")
        if reason:
            left_out[name] = reason
        else:
            chosen[name] = found
    if fold != "auto" and not any(each.folds for each in chosen.values()):
        raise UserError(f"--fold_bn: has no effect on {', '.join(chosen)}, which keeps every key; leave it out")
    if fold == "yes" and "torch_export" in chosen and model.encoder.startswith("timm/"):
        raise UserError(f"--fold_bn yes: {model.encoder} is not one of our ResNets, so torch_export does not fold it; leave it out")
    return chosen, left_out
