"""timm's checkpoint, and the folder that timm loads from a disk or from the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastbyol.config.schema import ModelConfig
from fastbyol.exports.card import card_text, front_matter
from fastbyol.exports.format import Facts, Features, Format, Subject, refusal_of_resnets
from fastbyol.exports.torch_weights import save_tensors
from fastbyol.run.weights_files import EXPORTED

_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200")
_PREFIX = "timm/"
CROP_SHARE = 0.875
"""timm's name for our centred square of 7/8 of the short side."""


def _refusal(model: ModelConfig) -> str:
    return "" if model.encoder.startswith(_PREFIX) else refusal_of_resnets(model, _RESNETS, program="timm")


def _name(subject: Subject) -> str:
    return subject.config.model.encoder.removeprefix(_PREFIX)


def _save(weights: Mapping[str, Tensor], path: Path, facts: Facts, subject: Subject) -> None:
    save_tensors(weights, path, facts)


def _read(path: Path, subject: Subject) -> Features:
    import timm

    # timm loads strictly; without classes it has no classifier whose keys could be missing.
    return timm.create_model(_name(subject), num_classes=0, checkpoint_path=str(path)).eval()


def _lines(name: str, subject: Subject) -> list[str]:
    return [
        "import timm",
        f"model = timm.create_model({_name(subject)!r}, num_classes=0, checkpoint_path={name!r}).eval()",
        f"feature = model(images)  # (N, {subject.feature_dim})",
    ]


# ---- a folder for the Hugging Face Hub


def _save_folder(weights: Mapping[str, Tensor], folder: Path, facts: Facts, subject: Subject) -> None:
    folder.mkdir(exist_ok=True)
    save_tensors(weights, folder / EXPORTED, facts)
    (folder / "config.json").write_text(json.dumps(_config(subject, facts), indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(front_matter(facts, library="timm") + card_text(facts), encoding="utf-8")


def _config(subject: Subject, facts: Facts) -> dict[str, Any]:
    views = subject.config.views
    known = getattr(subject.encoder, "pretrained_cfg", None) or {"first_conv": "conv1", "classifier": "fc"}
    return {
        "architecture": _name(subject),
        "num_classes": 0,
        "num_features": subject.feature_dim,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, views.size_px, views.size_px],
            "fixed_input_size": bool(known.get("fixed_input_size", False)),
            "interpolation": views.interpolation,
            "crop_pct": CROP_SHARE,
            "crop_mode": "center",
            "mean": list(views.mean),
            "std": list(views.std),
            "first_conv": known.get("first_conv"),
            "classifier": known.get("classifier"),
            "license": facts["licence"],
        },
    }


def _read_folder(folder: Path, subject: Subject) -> Features:
    import timm

    return timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()


def _folder_lines(name: str, subject: Subject) -> list[str]:
    return [
        "import timm",
        f"model = timm.create_model({f'local-dir:{name}'!r}, pretrained=True, num_classes=0).eval()  # after uploading it: hf-hub:YOU/NAME",
        f"feature = model(images)  # (N, {subject.feature_dim})",
    ]


FORMATS = {
    "timm": Format(
        file="timm.safetensors",
        suffixes=(".safetensors", ".pth", ".pt"),
        needs=("timm", "safetensors"),
        checked_in="timm",
        refusal=_refusal,
        convert=Subject.weights,
        save=_save,
        read=_read,
        lines=_lines,
    ),
    "huggingface": Format(
        file="huggingface",
        suffixes=(),
        needs=("timm", "safetensors"),
        checked_in="timm",
        refusal=_refusal,
        convert=Subject.weights,
        save=_save_folder,
        read=_read_folder,
        lines=_folder_lines,
    ),
}
