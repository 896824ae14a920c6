"""Suggests the settings of a first run on a user's own images, with a reason for each: from a sample of the images, and from this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastbyol.config.errors import UserError
from fastbyol.config.plain import flatten, to_plain
from fastbyol.config.presets import PRESETS
from fastbyol.config.schema import TrainConfig
from fastbyol.data.inspection.sample import Sample
from fastbyol.host.quantities import count_text, duration_text, names_text
from fastbyol.run.command_line import parse_train_config
from fastbyol.tuning.report import options_yaml, start_command

SMALL, LARGE = 50_000, 1_000_000
"""From how many images on the presets `own` and `own_large` are suggested."""
TINY_PX = 96
"""Below this shorter side a GPU run takes the images' own size and a stem that keeps it, as the CIFAR recipes do."""
TINY_CROP = 0.2
"""Smallest crop of such images: the paper's 0.08 would leave a few pixels."""
SIZE_STEP_PX = 16
FEWEST_BATCHES = 8
"""A pass over the images has at least this many steps, or the batch is made smaller."""
FEWEST_IMAGES = 1000
MANY_DUPLICATES = 0.05
HELD = 256
"""Images of 224 px in one forward pass that a GPU is expected to hold: an estimate, `tune` measures it."""
WARMUP_SHARE = 0.05
FEWEST_STEPS = 500
TIMED_S = 10.0


@dataclass
class Suggestion:
    """Settings by dotted name, each with its reason.

    preset: what they start from. devices: processes of the run. remarks: what no setting says.
    """

    preset: str
    devices: int
    settings: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def set(self, name: str, value: Any, reason: str) -> None:
        self.settings[name], self.reasons[name] = value, reason

    def config(self) -> TrainConfig:
        """Returns the run's config, checked."""
        arguments = [f"--{name}={to_plain(value)}" for name, value in self.settings.items()]
        return parse_train_config(["--preset", self.preset, *arguments], usage="")

    def yaml(self, *, head: list[str]) -> str:
        """Returns the text of a file for `--config`."""
        values: dict[str, Any] = {"preset": self.preset}
        for name in flatten(to_plain(TrainConfig())):
            if name not in self.settings:
                continue
            *groups, key = name.split(".")
            group = values
            for part in groups:
                group = group.setdefault(part, {})
            group[key] = to_plain(self.settings[name])
        return options_yaml(values, self.reasons, head=[*head, *self.remarks])

    def command(self, path: Path) -> str:
        """Returns the command that starts the run from the file at the path."""
        return start_command(path, ranks=self.devices, out="runs/mine")


def suggest(data: str, sample: Sample, *, gpus: int) -> Suggestion:
    """Returns the settings for these images.

    Args:
        data: path of the images.
        sample: what they look like.
        gpus: GPUs of the run; 0 means a CPU.

    Raises:
        UserError: fewer images than one step takes.
    """
    name, why = _preset(sample, gpus)
    suggestion = Suggestion(name, devices=max(1, gpus))
    base = PRESETS[name].config
    suggestion.reasons["preset"] = f"{why}; {PRESETS[name].source}"
    suggestion.set("data.train", data, _seen(sample))
    _set_batch(suggestion, base, sample)
    _set_budget(suggestion, base)
    _set_size(suggestion, base, sample, gpus)
    _set_views(suggestion, base, sample)
    _remark_on_memory(suggestion, gpus)
    _remark(suggestion, sample)
    return suggestion


def _preset(sample: Sample, gpus: int) -> tuple[str, str]:
    count = count_text(sample.images, "image")
    if not gpus:
        return "own_tiny", f"{count} and no GPU: small views and a small encoder, minutes on two cores (--devices N plans for N GPUs)"
    if sample.images < SMALL:
        return "own_small", f"{count}, fewer than {SMALL:,}: a ResNet-18"
    if sample.images < LARGE:
        return "own", f"{count}, {SMALL:,} to {LARGE:,}: a ResNet-50 with batch 512"
    return "own_large", f"{count}, more than {LARGE:,}: as the paper trains on ImageNet"


def _seen(sample: Sample) -> str:
    labels = f"{len(sample.class_names)} classes" if sample.class_names else "no labels"
    colour = "grey" if sample.is_grey else "in colour"
    return (
        f"{count_text(sample.images, 'image')}, {labels}; of {sample.looked_at:,} looked at: {colour} ({sample.grey:.0%} grey), "
        f"shorter side {sample.short_side} px"
    )


def _set_batch(suggestion: Suggestion, base: TrainConfig, sample: Sample) -> None:
    """Sets the batch, and the rates that follow from it."""
    devices, planned = suggestion.devices, base.global_batch
    shares = f", and {devices} devices share it" if devices > 1 else ""
    batch = max(1, min(planned, sample.images // FEWEST_BATCHES) // devices) * devices
    if batch > sample.images or batch < 2:
        raise UserError(
            f"--data: {count_text(sample.images, 'image')} for {count_text(devices, 'device')}; BYOL needs some hundreds at least"
        )
    if batch == planned:
        suggestion.set("global_batch", batch, f"the preset's; {batch // devices} on each of {devices}" if devices > 1 else "the preset's")
        suggestion.set("optim.base_lr", base.optim.base_lr, "the preset's, per 256 images")
        suggestion.set("optim.tau_base", base.optim.tau_base, "the preset's")
        return
    optim = base.optim
    lr, tau = rates_at_batch(batch, planned=planned, base_lr=optim.base_lr, tau_base=optim.tau_base)
    why = f"a pass over the images has {FEWEST_BATCHES} steps" if sample.images // FEWEST_BATCHES < planned else "all get the same share"
    suggestion.set("global_batch", batch, f"{planned} in the preset; fewer, so that {why}{shares}")
    suggestion.set("optim.base_lr", lr, f"{optim.base_lr:g} at batch {planned}; smaller batches take more per image (appendix G)")
    suggestion.set("optim.tau_base", tau, f"{optim.tau_base:g} at batch {planned}, to the power {batch}/{planned} (appendix G)")


def rates_at_batch(batch: int, *, planned: int, base_lr: float, tau_base: float) -> tuple[float, float]:
    """Returns base_lr, rounded to 2 digits, and tau_base, 1 - tau to 3, for another batch than the one they were chosen for.

    Source: appendix G goes from batch 4096 to 512 with base_lr 0.2 to 0.4, which is 8^(1/3), and tau 0.996 to 0.9995, which is 0.996^(1/8):
    the target then moves as far in a pass over the images.
    """
    share = batch / planned
    return float(f"{base_lr * share ** (-1 / 3):.2g}"), float(1 - float(f"{1 - tau_base**share:.3g}"))


def _set_budget(suggestion: Suggestion, base: TrainConfig) -> None:
    if base.steps:
        suggestion.set("steps", base.steps, "the preset's; few images need many passes. More steps are the first thing that helps")
        suggestion.set("optim.warmup_steps", base.optim.warmup_steps, "the preset's")
    else:
        suggestion.set("epochs", base.epochs, "the preset's")
        suggestion.set("optim.warmup_epochs", base.optim.warmup_epochs, "the preset's")


def _set_size(suggestion: Suggestion, base: TrainConfig, sample: Sample, gpus: int) -> None:
    planned = base.views.size_px
    if gpus and sample.short_side < TINY_PX:
        size = max(32, sample.short_side // SIZE_STEP_PX * SIZE_STEP_PX)
        reason = (
            f"the images' own: their shorter side is {sample.short_side} px"
            if size <= sample.short_side
            else f"the smallest that is suggested; the images' shorter side is {sample.short_side} px"
        )
        suggestion.set("views.size_px", size, reason)
        suggestion.set(
            "model.stem", "small", "does not shrink small images, as in recipes for CIFAR (solo-learn); costs four times as much as small2"
        )
        return
    size = min(planned, max(32, sample.short_side // SIZE_STEP_PX * SIZE_STEP_PX))
    larger = "; 64 sees finer detail for four times the time" if not gpus and sample.short_side >= 64 else ""
    suggestion.set(
        "views.size_px", size, f"the preset's{larger}" if size == planned else f"the images' shorter side is {sample.short_side} px"
    )


def _set_views(suggestion: Suggestion, base: TrainConfig, sample: Sample) -> None:
    for view in ("view1", "view2"):
        spec = getattr(base.views, view)
        smallest, largest = spec.crop_area
        if sample.short_side < TINY_PX and smallest < TINY_CROP:
            smallest = TINY_CROP
        suggestion.set(
            f"views.{view}.crop_area",
            (smallest, largest),
            f"share of the image that a view shows; {smallest:g} of it is {round(sample.short_side * smallest**0.5)} px wide here and must still "
            "show what counts",
        )
        suggestion.set(
            f"views.{view}.flip_p",
            0.0,
            "cannot be told from the images: 0.5 if a mirrored image still shows the same thing (most photographs; worth half a point on "
            "ImageNet), 0 where left and right matter (letters, signs, scans)",
        )
        if sample.is_grey:
            suggestion.set(f"views.{view}.saturation", 0.0, "the images are grey: no effect")
            suggestion.set(f"views.{view}.hue", 0.0, "the images are grey: no effect")
            suggestion.set(f"views.{view}.gray_p", 0.0, "the images are grey: no effect")
        else:
            jitter = f"brightness {spec.brightness:g}, contrast {spec.contrast:g}, saturation {spec.saturation:g}, hue {spec.hue:g}"
            suggestion.set(f"views.{view}.jitter_p", spec.jitter_p, f"changes colours ({jitter}); 0 if the colour itself is what counts")
            suggestion.set(
                f"views.{view}.gray_p", spec.gray_p, "hides colour in this share of views; 0 if the colour itself is what counts"
            )


def _remark_on_memory(suggestion: Suggestion, gpus: int) -> None:
    config = suggestion.config()
    images, size = config.global_batch // suggestion.devices, config.views.size_px
    # A stem that keeps small images at their size passes on as much as the usual one does of images of four times the side.
    seen = size * 4 if config.model.stem == "small" else size
    if gpus and images * seen**2 > HELD * 224**2:
        suggestion.remarks.append(
            f"{images:,} images of {size} px in one forward pass may not fit into a GPU's memory: python -m fastbyol tune finds the largest rank_batch "
            "that fits, or give --rank_batch."
        )


def _remark(suggestion: Suggestion, sample: Sample) -> None:
    if sample.images < FEWEST_IMAGES:
        suggestion.remarks.append(
            f"Few images: {sample.images:,}. BYOL learns little from fewer than {FEWEST_IMAGES:,}; compare with the untrained encoder."
        )
    if sample.near_duplicates > MANY_DUPLICATES:
        suggestion.remarks.append(
            f"{sample.near_duplicates:.0%} of the images looked at are near-duplicates of others (same picture in another size or quality): "
            "they count more than once, and may be in both train and val."
        )
    if sample.unreadable:
        what = f"{len(sample.unreadable):,} of the images looked at do not decode, and training leaves them out"
        suggestion.remarks.append(f"{what}: {names_text(sample.unreadable)}.")
    suggestion.remarks.append("Look at the views before training: python -m fastbyol views --data IMAGES --config FILE --out views.png")


def fit_hours(suggestion: Suggestion, hours: float, *, gpus: int, announce: Callable[[str], None]) -> None:
    """Times some steps on this machine, and sets the number of steps so that the run takes `hours`.

    One process is timed, with its share of the batch; what several exchange is not. gpus: GPUs of the run; 0 means a CPU, which is timed then.

    Raises:
        UserError: a step does not fit into memory, or the hours are too few.
    """
    from fastbyol.tuning.comparison import TrialFailed

    config = suggestion.config()
    announce(f"timing steps for {TIMED_S:g} s")
    share = config.global_batch // suggestion.devices
    try:
        rate = images_per_s(replace(config, global_batch=share), device="cuda" if gpus else "cpu") * suggestion.devices
    except TrialFailed as error:
        raise UserError(
            f"--hours {hours:g}: a step of {share:,} images of {config.views.size_px} px cannot be timed on one device ({error}); "
            "plan for more with --devices, or leave --hours out: python -m fastbyol tune finds the rank_batch that fits"
        ) from error
    per_step_s = config.global_batch / rate
    steps = int(hours * 3600 / per_step_s)
    if steps < FEWEST_STEPS:
        fewest = f"the fewest steps that teach anything, {FEWEST_STEPS:,}, take {duration_text(FEWEST_STEPS * per_step_s)}"
        raise UserError(f"--hours {hours:g}: is enough for only {steps:,} steps of {per_step_s:.3g} s; {fewest}")
    for name in ("epochs", "optim.warmup_epochs"):
        suggestion.settings.pop(name, None)
    suggestion.set("steps", steps, f"{duration_text(hours * 3600)} at {per_step_s:.3g} s a step, timed here; evaluation comes on top")
    suggestion.set("optim.warmup_steps", max(1, round(WARMUP_SHARE * steps)), f"{WARMUP_SHARE:.0%} of the steps")


def images_per_s(config: TrainConfig, *, device: str) -> float:
    """Returns the images per second of one process that trains with this config on this machine's CPU or first GPU: device cpu or cuda.

    Raises TrialFailed if a step does not fit into memory.
    """
    import torch

    from fastbyol.data.build import build_run_loader
    from fastbyol.ranks.process_group import Process
    from fastbyol.tuning.stepper import Pace, Stepper

    process = Process(rank=0, world_size=1, device=torch.device(device, 0) if device == "cuda" else torch.device(device))
    paces: list[Pace] = []
    with build_run_loader(config, process, option="--data") as loader:
        Stepper(config, process).fed_by(loader, paces)(TIMED_S)
    return paces[-1].images_per_s
