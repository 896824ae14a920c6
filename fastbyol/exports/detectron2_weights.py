"""detectron2's backbone, under the names and in the pickle that its own converters write.

Sources: detectron2, tools/convert-torchvision-to-d2.py and modeling/backbone/resnet.py; MoCo, detection/convert-pretrain-to-detectron2.py.
detectron2 is not on PyPI, so an export is checked by turning its names back into the encoder's. tests/long/detectron2_loads.py loads it in detectron2.
"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from fastbyol.config.schema import ModelConfig
from fastbyol.exports.format import Facts, Features, Format, Subject, refusal_of_resnets
from fastbyol.models import encoder_from

_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_BASIC = ("resnet18", "resnet34")


def detectron2_name(name: str) -> str:
    """Returns what detectron2's ResNet calls one of torchvision's parameters: layer1.0.bn2.weight is res2.0.conv2.norm.weight."""
    name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name) if name.startswith("layer") else f"stem.{name}"
    return re.sub(r"\bbn(\d)", r"conv\1.norm", name).replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def _refusal(model: ModelConfig) -> str:
    return refusal_of_resnets(model, _RESNETS, program="detectron2")


def _convert(subject: Subject) -> dict[str, NDArray[Any]]:
    return {detectron2_name(name): tensor.numpy() for name, tensor in subject.weights().items()}


def _save(weights: dict[str, NDArray[Any]], path: Path, facts: Facts, subject: Subject) -> None:
    with path.open("wb") as file:
        pickle.dump({"model": weights, "__author__": "fastbyol", "matching_heuristics": True}, file)


def _read(path: Path, subject: Subject) -> Features:
    """Rebuilds the encoder from the file alone and returns it."""
    held = pickle.loads(path.read_bytes())["model"]  # the file that was written a moment ago, never a stranger's
    encoder = encoder_from(subject.config.model)
    encoder.load_state_dict({name: torch.from_numpy(held.pop(detectron2_name(name))) for name in encoder.state_dict()})
    if held:
        raise ValueError(f"{next(iter(held))} is not a name of a tensor of the encoder")
    return encoder.eval()


def _lines(name: str, subject: Subject) -> list[str]:
    model, views = subject.config.model, subject.config.views
    mean, std = ([round(255 * value, 3) for value in values] for values in (views.mean, views.std))
    basic = ", RES2_OUT_CHANNELS: 64" if model.encoder in _BASIC else ""
    return [
        f"MODEL: {{WEIGHTS: {json.dumps(name)}, PIXEL_MEAN: {mean}, PIXEL_STD: {std},",
        f"        RESNETS: {{DEPTH: {model.encoder.removeprefix('resnet')}, STRIDE_IN_1X1: false, NORM: SyncBN{basic}}}}}",
        "INPUT: {FORMAT: RGB}  # a detectron2 config; MoCo's detection/configs have the rest",
    ]


FORMATS = {
    "detectron2": Format(
        file="detectron2.pkl",
        suffixes=(".pkl",),
        needs=(),
        checked_in="fastbyol",
        refusal=_refusal,
        convert=_convert,
        save=_save,
        read=_read,
        lines=_lines,
        not_loaded="Not loaded in detectron2, which is not on PyPI; with its names turned back into the encoder's",
    ),
}
