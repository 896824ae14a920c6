"""Loads the exports of a ResNet-18 in the programs that they are for, and compares keys and features with the run's own encoder.

tests/long/fresh_environment.py runs it where fastbyol is installed without its checkout; it needs nothing of the checkout itself.

python exports_loaded.py RUN FOLDER FORMAT …      (the formats that FOLDER must hold, and no others)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torchvision
from torch import Tensor

import fastbyol

CLASSIFIER = {"fc.weight", "fc.bias"}
SIZE_PX = 32
LIMIT = 1e-5
PROGRAM_LIMIT = 1e-4
"""Of the largest feature: for weights in another network, and for programs whose operations are others."""


def require_keys(name: str, found: object) -> None:
    missing, unexpected = set(found.missing_keys), list(found.unexpected_keys)  # type: ignore[attr-defined]
    if missing != CLASSIFIER or unexpected:
        sys.exit(f"{name}: missing {sorted(missing)}, unexpected {unexpected}; only the classifier's may be missing")


def by_torchvision(folder: Path, images: Tensor) -> Tensor:
    model = torchvision.models.resnet18()
    require_keys("torchvision", model.load_state_dict(torch.load(folder / "torchvision.pth", weights_only=True), strict=False))
    model.fc = torch.nn.Identity()  # type: ignore[assignment]
    return model.eval()(images)


def by_timm(folder: Path, images: Tensor) -> Tensor:
    import timm
    from safetensors.torch import load_file

    model = timm.create_model("resnet18")
    require_keys("timm", model.load_state_dict(load_file(folder / "timm.safetensors"), strict=False))
    model.reset_classifier(0)
    return model.eval()(images)


def by_huggingface(folder: Path, images: Tensor) -> Tensor:
    import timm

    return timm.create_model(f"local-dir:{folder / 'huggingface'}", pretrained=True, num_classes=0).eval()(images)


def by_onnxruntime(folder: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "encoder.onnx", providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return torch.from_numpy(session.run(None, {given.name: images.numpy()})[0])


LOADED_BY: dict[str, tuple[str, float, Callable[[Path, Tensor], Tensor]]] = {
    "torchvision": ("torchvision.pth", LIMIT, by_torchvision),
    "timm": ("timm.safetensors", LIMIT, by_timm),
    "huggingface": ("huggingface", LIMIT, by_huggingface),
    "safetensors": ("encoder.safetensors", LIMIT, lambda folder, images: fastbyol.load_encoder(folder / "encoder.safetensors")(images)),
    "onnx": ("encoder.onnx", PROGRAM_LIMIT, by_onnxruntime),
    "torch_export": ("encoder.pt2", PROGRAM_LIMIT, lambda folder, images: torch.export.load(folder / "encoder.pt2").module()(images)),
    "detectron2": ("detectron2.pkl", 0.0, lambda folder, images: images),  # tests/long/detectron2_loads.py
}


def main(run: str, folder: Path, wanted: Iterable[str]) -> None:
    there = {name for name, (file, _, _) in LOADED_BY.items() if (folder / file).exists()}
    if there != set(wanted):
        sys.exit(f"{folder}: holds {sorted(there)}, wanted are {sorted(wanted)}")
    images = torch.randn(3, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = fastbyol.load_encoder(run)(images)
        for name in sorted(there - {"detectron2"}):
            _, limit, loaded = LOADED_BY[name]
            apart = ((loaded(folder, images) - features).abs().max() / features.abs().max()).item()
            print(f"{name}: features differ by {apart:.1e} of the largest at most")
            if not apart <= limit:
                sys.exit(f"{name}: more than {limit:g}")
    print(f"loaded back: {', '.join(sorted(there))}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
