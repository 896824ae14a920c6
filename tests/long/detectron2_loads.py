"""Loads the `detectron2` export in detectron2 itself and compares its backbone's features with torchvision's, for a ResNet-18 and a ResNet-50.

pip install fvcore iopath omegaconf hydra-core pycocotools
PYTHONPATH=DETECTRON2:. python -m tests.long.detectron2_loads       (seconds; DETECTRON2: a checkout of it, which needs no building for this)

detectron2 is not on PyPI, so the default suite compares names only.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer  # pyright: ignore[reportMissingImports]
from detectron2.config import get_cfg  # pyright: ignore[reportMissingImports]
from detectron2.layers import ShapeSpec  # pyright: ignore[reportMissingImports]
from detectron2.modeling.backbone import build_resnet_backbone  # pyright: ignore[reportMissingImports]

from fastbyol.exports.detectron2_weights import FORMATS


def model_of(name: str) -> torch.nn.Module:
    """Returns torchvision's network with statistics and scales as different as training makes them: equal ones would hide a confusion."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)()
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            for values, low, high in (
                (part.running_mean, -0.1, 0.1),
                (part.running_var, 0.5, 1.5),
                (part.weight, 0.5, 1.5),
                (part.bias, -0.1, 0.1),
            ):
                torch.nn.init.uniform_(values, low, high)  # pyright: ignore[reportArgumentType]
    return model.eval()


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="fastbyol-detectron2-") as scratch:
        for name in ("resnet18", "resnet50"):
            model, weights, exported = model_of(name), Path(scratch) / f"{name}.pt", Path(scratch) / f"{name}, exported.pkl"
            torch.save(model.state_dict(), weights)
            options = f"-m fastbyol export --model.encoder {name} --to detectron2".split()
            subprocess.run(
                [sys.executable, *options, "--checkpoint", str(weights), "--out", str(exported)], check=True, capture_output=True
            )
            # The config is the card's, word for word.
            card = Path(f"{exported}.md").read_text()
            block = re.search(r"MODEL: \{.*?\}\}\nINPUT: \{.*?\}", card, re.DOTALL)
            assert block, card
            (Path(scratch) / "config.yaml").write_text(block[0])
            config = get_cfg()
            config.merge_from_file(str(Path(scratch) / "config.yaml"))
            config.MODEL.RESNETS.OUT_FEATURES = ["res5"]
            backbone = build_resnet_backbone(config, ShapeSpec(channels=3))
            left = DetectionCheckpointer(backbone).load(str(Path(scratch) / config.MODEL.WEIGHTS))
            assert not any(left.get(names) for names in ("missing_keys", "unexpected_keys", "incorrect_shapes")), left
            images = torch.randint(256, (4, 3, 224, 224)).float()
            mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (config.MODEL.PIXEL_MEAN, config.MODEL.PIXEL_STD))
            with torch.no_grad():
                theirs = backbone.eval()((images - mean) / std)["res5"].mean((2, 3))
                model.fc = torch.nn.Identity()
                ours = model((images - mean) / std)
            error, largest = (theirs - ours).abs().max().item(), ours.abs().max().item()
            print(f"{name}: every key matched; the largest difference in a feature is {error:.2g}, and the largest feature {largest:.3g}")
            assert error <= FORMATS["detectron2"].limit * largest


if __name__ == "__main__":
    main()
