"""Named tensors: torchvision's state dict, and .safetensors that say themselves how to build the encoder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fastbyol.config.schema import ModelConfig
from fastbyol.export import load_encoder
from fastbyol.exports.format import Facts, Features, Format, Subject, no_refusal, refusal_of_resnets
from fastbyol.run.weights_files import METADATA

_TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def save_tensors(weights: Mapping[str, Tensor], path: Path, facts: Facts) -> None:
    """Writes .safetensors with the facts in its metadata, or for another suffix a plain state dict of torch.save."""
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import save

        # Not save_file, whose files nobody else may read.
        path.write_bytes(save(dict(weights), metadata={"format": "pt", METADATA: json.dumps(facts)}))
    else:
        torch.save(dict(weights), path)


def _save(weights: Mapping[str, Tensor], path: Path, facts: Facts, subject: Subject) -> None:
    save_tensors(weights, path, facts)


# ---- torchvision


def _torchvision_refusal(model: ModelConfig) -> str:
    return refusal_of_resnets(model, _TORCHVISION, program="torchvision")


def _read_torchvision(path: Path, subject: Subject) -> Features:
    import torchvision

    network = getattr(torchvision.models, subject.config.model.encoder)()
    network.fc = nn.Identity()
    network.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return network.eval()


def _torchvision_lines(name: str, subject: Subject) -> list[str]:
    return [
        f"import torch, torchvision; model = torchvision.models.{subject.config.model.encoder}(); model.fc = torch.nn.Identity()",
        f"model.load_state_dict(torch.load({name!r}, weights_only=True))",
        f"feature = model.eval()(images)  # (N, {subject.feature_dim})",
    ]


# ---- safetensors


def _read_safetensors(path: Path, subject: Subject) -> Features:
    return load_encoder(path)


def _safetensors_lines(name: str, subject: Subject) -> list[str]:
    return [
        "import fastbyol  # or safetensors.torch.load_file, for the tensors alone",
        f"encoder = fastbyol.load_encoder({name!r})",
        f"feature = encoder(encoder.preprocess('photo.jpg'))  # (1, {subject.feature_dim})",
    ]


FORMATS = {
    "torchvision": Format(
        file="torchvision.pth",
        suffixes=(".pth", ".pt"),
        needs=("torchvision",),
        checked_in="torchvision",
        refusal=_torchvision_refusal,
        convert=Subject.weights,
        save=_save,
        read=_read_torchvision,
        lines=_torchvision_lines,
    ),
    "safetensors": Format(
        file="encoder.safetensors",
        suffixes=(".safetensors",),
        needs=("safetensors",),
        checked_in="fastbyol",
        refusal=no_refusal,
        convert=Subject.weights,
        save=_save,
        read=_read_safetensors,
        lines=_safetensors_lines,
    ),
}
