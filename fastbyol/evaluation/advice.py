"""Advice on what to try first when a run has not learnt more than its baselines: derived from its options, its log and its images."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastbyol.config.schema import TrainConfig
from fastbyol.config.views import ViewPair, ViewSpec
from fastbyol.evaluation.gallery import display_pixels
from fastbyol.evaluation.splits import Split
from fastbyol.evaluation.subjects import random_images
from fastbyol.evaluation.training_log import Record, alarms
from fastbyol.host.quantities import count_text
from fastbyol.monitors.collapse import what_to_try

FEW_STEPS = 3000
"""Our demo's runs, on small and easy images, take about so many steps."""
SMALL_PX = 64
SMALLEST_CROP, LARGER_CROPS = 0.3, "'[0.4,1.0]'"
GREY_LEVELS = 8
"""Largest mean difference between the channels of a grey image, of 255: JPEG's colours are not exactly neutral."""
MOST_IDEAS = 4
LOOKED_AT = 64


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run that the advice depends on.

    step: optimizer steps taken. epoch: passes over the images. alarms: those of the log. grey: all images looked at are grey.
    """

    config: TrainConfig
    step: int
    epoch: float
    alarms: list[str]
    grey: bool

    @classmethod
    def of(cls, config: TrainConfig, *, step: int, records: list[Record], split: Split) -> RunFacts:
        """Collects the facts of a run. records: its training log; split: images as it sees them."""
        epoch = next((float(record["epoch"]) for record in reversed(records) if record["step"] < step), 0.0)
        return cls(config, step=step, epoch=epoch, alarms=alarms(records), grey=are_grey(split, views=config.views))


def are_grey(split: Split, *, views: ViewPair) -> bool:
    """Returns True if the channels of some random images are equal."""
    pixels = torch.from_numpy(display_pixels(random_images(split, count=LOOKED_AT), views=views)).float()
    return bool(((pixels.amax(dim=3) - pixels.amin(dim=3)).mean(dim=(1, 2)) < GREY_LEVELS).all())


def first_ideas(facts: RunFacts) -> list[str]:
    """Returns what to try, most promising first, at most MOST_IDEAS; options are those of train.py."""
    config = facts.config
    views, optim = config.views, config.optim
    if not facts.step:  # another program's weights: none of the options below has made them
        size = f"images are shown to them at {views.size_px} px here: give the size and normalisation that they were trained with"
        return [
            "train on from these weights with your own images: python -m fastbyol train --init_from FILE",
            f"{size}, --views.size_px {views.size_px}, --views.mean, --views.std",
        ]
    ideas = []
    if facts.alarms:
        ideas.append(f"the log has {count_text(len(facts.alarms), 'alarm')} of collapse; {what_to_try(config)}")
    if where := _stopped_at(facts):
        ideas.append(f"the run stopped after {where}: let it finish (the same command continues)")
    elif facts.step < FEW_STEPS:
        ideas.append(f"{facts.step:,} steps are few: train longer, in a new folder, --steps {FEW_STEPS} --out FOLDER")
    if facts.grey and _any(views, "jitter_p"):
        ideas.append(f"the images are grey, so colour jitter only changes their brightness: {_both('jitter_p', 0)}")
    elif not facts.grey and _any(views, "jitter_p"):
        ideas.append(f"if colour tells your images apart, do not change it: {_both('jitter_p', 0)} {_both('gray_p', 0)}")
    if _any(views, "flip_p"):
        ideas.append(f"if left and right differ in your images (characters, drawings, maps), do not mirror them: {_both('flip_p', 0)}")
    if min(view.crop_area[0] for view in _pair(views)) < SMALLEST_CROP:
        ideas.append(f"larger crops, so that both views show the same thing: {_both('crop_area', LARGER_CROPS)}")
    if views.size_px <= SMALL_PX and _any(views, "blur_p"):
        ideas.append(f"no blur, which removes much of the detail at {views.size_px} px: {_both('blur_p', 0)}")
    if facts.step < 4 * FEW_STEPS and optim.tau_base > 0.95:
        ideas.append(f"a target that moves faster in a short run: --optim.tau_base 0.9 (it is {optim.tau_base:g})")
    if optim.warmup_epochs > config.epochs / 4 and not config.steps:
        ideas.append(
            f"a shorter warm-up: --optim.warmup_epochs {config.epochs / 20:.3g} (it is {optim.warmup_epochs:g} of {config.epochs:g})"
        )
    ideas.append("look at what the network sees: python -m fastbyol views, with this run's options")
    return ideas[:MOST_IDEAS]


def _stopped_at(facts: RunFacts) -> str:
    """Returns how far a run came that is not complete, else ''."""
    config = facts.config
    if config.steps:
        return f"{facts.step:,} of {config.steps:,} steps" if facts.step < config.steps else ""
    # A complete run ends less than a step before its last epoch does: a smaller batch is left out.
    unfinished = facts.epoch > 0 and facts.epoch * (1 + 1 / max(facts.step, 1)) <= config.epochs
    return f"{facts.epoch:.3g} of {config.epochs:g} epochs" if unfinished else ""


def _pair(views: ViewPair) -> tuple[ViewSpec, ViewSpec]:
    return views.view1, views.view2


def _any(views: ViewPair, probability: str) -> bool:
    return any(getattr(view, probability) > 0 for view in _pair(views))


def _both(name: str, value: object) -> str:
    return " ".join(f"--views.{view}.{name} {value}" for view in ("view1", "view2"))
