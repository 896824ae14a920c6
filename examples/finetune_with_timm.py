"""Exports a trained encoder, loads it with timm, and fine-tunes it on labelled images with a plain PyTorch loop.

    python examples/finetune_with_timm.py --checkpoint runs/mine --data photos --out exported

DATA holds train and val, each with a folder for each class. The encoder must be one that timm has: a ResNet-18 or larger, not the ResNet-8
that `suggest` chooses on a CPU. After the export, fastbyol is not needed any more.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from fastbyol.__main__ import main as fastbyol


def accuracy(network: nn.Module, loader: DataLoader) -> float:
    """Returns the share of images whose class the network finds."""
    network.eval()
    with torch.inference_mode():
        hits = [network(images).argmax(dim=1) == label for images, label in loader]
    return torch.cat(hits).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run folder, checkpoint, or weights")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds train and val")
    parser.add_argument("--out", type=Path, required=True, help="folder to export to")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=0.01)
    options, weights = parser.parse_known_args()  # the rest describes weights of another program, for example --views.size_px 64
    for split in ("train", "val"):  # checked before the export, which takes longer
        if not any(each.is_dir() for each in (options.data / split).glob("*")):
            parser.error(f"--data {options.data}: its folder {split} is missing, or has no folder for each class")
    fastbyol(["export", "--checkpoint", options.checkpoint, "--to", "huggingface", "--out", str(options.out), *weights])

    # The exported folder says how images are prepared, and timm makes its transforms from that.
    sizes = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{options.out}", pretrained=False))
    train, val = (
        ImageFolder(options.data / split, timm.data.create_transform(**sizes, is_training=split == "train")) for split in ("train", "val")
    )
    network = timm.create_model(f"local-dir:{options.out}", pretrained=True, num_classes=len(train.classes))
    optimizer = torch.optim.SGD(network.parameters(), lr=options.lr, momentum=0.9, nesterov=True)
    for epoch in range(options.epochs):
        network.train()
        for images, label in DataLoader(train, batch_size=32, shuffle=True):
            loss = nn.functional.cross_entropy(network(images), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: {accuracy(network, DataLoader(val, batch_size=64)):.1%} on val")


if __name__ == "__main__":
    main()
