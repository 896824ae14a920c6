"""For each of several ranks: trains a classifier without batch norm for a few steps and scores images, then runs the commands of a JSON file.

Usage: ranks_of_a_classifier.py IMAGES OUT.pt WORK COMMANDS.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastbyol.__main__ import main
from fastbyol.config.schema import PrecisionConfig
from fastbyol.config.views import ViewPair
from fastbyol.data import build_crop_loader, build_image_loader
from fastbyol.evaluation.tasks.classifier import build_classifier, fit_classifier, scores_of
from fastbyol.evaluation.tasks.images import crop_and_flip
from fastbyol.evaluation.tasks.job import Job
from fastbyol.host.signals import StopRequest
from fastbyol.ranks.process_group import Process, join_process_group, leave_process_group

VIEWS = ViewPair(size_px=16)


def encoder_without_norm() -> nn.Module:
    """Returns an encoder whose features do not depend on the other images of a batch."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten())
    encoder.feature_dim = 144  # type: ignore[assignment]
    return encoder


def job_of(folder: Path, process: Process, stop: StopRequest | None = None) -> Job:
    return Job(
        task="finetune",
        data="",
        settings={"version": "quick"},
        subjects=(),
        step=0,
        process=process,
        stop=stop or StopRequest(grace_s=60.0),
        precision=PrecisionConfig(autocast="off", compile="no"),
        folder=folder,
        command="",
        batch=8,
        workers=1,
    )


def trained_scores(images: Path, folder: Path, process: Process) -> dict[str, torch.Tensor]:
    """Returns the weights after six steps of 8 images, and the logits of 11 of the images."""
    job = job_of(folder, process)
    network = build_classifier(job, encoder_without_norm(), num_classes=3)
    place = {"rank": process.rank, "world_size": process.world_size, "device": process.device}
    with (
        build_crop_loader(images, views=crop_and_flip(VIEWS), seed=0, global_batch=8, workers=1, **place) as crops,
        build_image_loader(images, views=VIEWS, batch=8, workers=1) as loader,
    ):
        fit_classifier(job, "one", network=network, crops=crops, targets=torch.from_numpy(loader.labels), lr=0.1, total_steps=6)
        scores = scores_of(job, network, loader, rows=np.arange(3, 25, 2))
    return {"scores": scores, **network.state_dict()}


if __name__ == "__main__":
    images, out, folder, commands = map(Path, sys.argv[1:])
    process = join_process_group()
    found = trained_scores(images, folder, process)
    torch.save(found, out.with_suffix(f".{process.rank}.pt"))
    leave_process_group()
    for arguments in json.loads(commands.read_text()):
        main(arguments)
