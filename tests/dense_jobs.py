"""Jobs, encoders and scenes for the tests of segmentation, detection and depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from fastbyol.config.schema import PrecisionConfig
from fastbyol.config.views import PAPER
from fastbyol.data.demo.folder import DemoSettings
from fastbyol.data.demo.scenes import write_scenes
from fastbyol.evaluation.tasks.job import Images, Job, Subject
from fastbyol.evaluation.tasks.registry import result_settings
from fastbyol.host.signals import StopRequest
from fastbyol.models import ResNet, build_encoder
from fastbyol.ranks.process_group import Process

TINY = ("--model.encoder", "resnet8", "--model.stem", "small2", "--views.size_px", "32", "--device", "cpu", "--workers", "1")
"""Options for weights of `tiny_encoder`."""


def tiny_encoder(seed: int = 0) -> ResNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_encoder("resnet8", stem="small2").eval()


def subject(name: str = "byol", *, seed: int = 0) -> Subject:
    def build(_: Images) -> torch.nn.Module:
        return tiny_encoder(seed)

    return Subject(name, name, PAPER, f"seed {seed}", build)


class StopsAt:
    """Stands for a StopRequest that a signal reaches while step `step` runs; 0: never."""

    def __init__(self, step: int = 0) -> None:
        self.step, self.asked = step, 0

    @property
    def requested(self) -> bool:
        self.asked += 1
        return self.asked == self.step


def make_job(task: str, settings: Any, *, data: Path, folder: Path, stop: int = 0, subjects: tuple[Subject, ...] = ()) -> Job:
    return Job(
        task=task,
        data=str(data),
        settings=result_settings(settings, "quick"),
        subjects=subjects or (subject(), subject("untrained", seed=1)),
        step=0,
        process=Process(0, 1, torch.device("cpu")),
        stop=cast(StopRequest, StopsAt(stop)),
        precision=PrecisionConfig(autocast="off"),
        folder=folder,
        command="",
        batch=16,
        workers=1,
    )


def scenes(root: Path, *, train: int = 2, val: int = 1) -> Path:
    """Writes scenes of so many images a class, in all layouts, and returns the folder."""
    write_scenes(root / "scenes", settings=DemoSettings(train_per_class=train, val_per_class=val), overwrite=False)
    return root / "scenes"
