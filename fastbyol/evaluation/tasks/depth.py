"""Depth of NYU v2 by fine-tuning: the encoder with fast up-projections, reverse Huber loss, scored by the usual thresholds and errors.

Grill et al., appendix D.6, after Laina et al. (FCRN). Data: NYU v2's labelled file or folders (`dense/nyu.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastbyol.augment.reference import adjust_brightness, adjust_hue, adjust_saturation, to_grayscale
from fastbyol.config.errors import (
    require,
    require_at_least,
    require_between,
    require_choice,
    require_positive,
    require_probability,
    require_range,
)
from fastbyol.data.traversal import Indices
from fastbyol.evaluation.result_file import TaskResult
from fastbyol.evaluation.tasks.dense.batches import all_samples, moved
from fastbyol.evaluation.tasks.dense.nyu import DepthFrames, open_frames, paths_of_frames, valid
from fastbyol.evaluation.tasks.dense.pictures import keep_predictions, picture_notes, sample_rows
from fastbyol.evaluation.tasks.dense.plan import plan_training
from fastbyol.evaluation.tasks.dense.trials import (
    Trial,
    calibration_images,
    check_drops,
    compare_statistics,
    drop_without_effect,
    mean_over_pixels,
    normalised,
    prepared,
    run_trials,
    sgd,
    spread_rows,
    train_trial,
    trial_result,
)
from fastbyol.evaluation.tasks.job import Job, Subject
from fastbyol.evaluation.tasks.registry import Task
from fastbyol.evaluation.tasks.soundness import require_sound
from fastbyol.models.backbone import Backbone, backbone_of
from fastbyol.models.fast_up_projection import UpProjectionDecoder
from fastbyol.ranks.collectives import largest
from fastbyol.ranks.process_group import gather_everywhere
from fastbyol.run.precision import autocast

VIEWS = ("crop", "stretched")
THRESHOLD = 1.25
NEAREST_M = 0.01
"""Predictions below are raised to it: the ratio of the thresholds needs a positive depth."""


@dataclass(frozen=True)
class DepthSettings:
    """Settings of depth; the defaults are the paper's (appendix D.6)."""

    steps: int = 7500
    """length of the training"""
    batch_images: int = 256
    """images of all ranks in a step"""
    lr: float = 0.16
    """learning rate"""
    # Not stated by the paper.
    drop_at: tuple[float, ...] = ()
    """points at which the rate is multiplied by drop, as shares of the training (the paper states none)"""
    drop: float = 0.1
    """factor of the rate at each drop_at"""
    warmup_steps: int = 0
    """steps of a linear warm-up (the paper states none)"""
    momentum: float = 0.9
    """momentum of SGD (the paper does not state it)"""
    encoder_rate: float = 1.0
    """factor of the encoder's learning rate; 0: frozen, with its batch norms' running statistics"""
    weight_decay: float = 5e-4
    """weight decay of all parameters"""
    seeds: int = 1
    """trainings with different seeds, whose mean is reported"""
    frame_scale: float = 0.5
    """factor by which frames are resized before anything else: 0.5 makes 320 x 240 of 640 x 480 px"""
    crop_px: tuple[int, ...] = (228, 304)
    """height and width of the centre crop"""
    flip_p: float = 0.5
    """probability that a training image is mirrored"""
    gray_p: float = 0.3
    """probability that a training image is made gray"""
    brightness: float = 0.1255
    """largest change of the brightness, added to pixels in [0, 1]"""
    saturation: tuple[float, ...] = (0.5, 1.5)
    """range of the factor of the HSV saturation"""
    hue: float = 0.2
    """largest change of the hue, in turns"""
    huber_share: float = 0.2
    """threshold c of the reverse Huber loss, as a share of the largest error in the batch of all ranks"""
    first_channels: int = 1024
    """channels of the 1x1 convolution behind the encoder"""
    up_channels: tuple[int, ...] = (512, 256, 128, 64)
    """channels of the up-projections, each of which doubles the resolution"""
    test_images: int = 0
    """number of images to test on, spread evenly; 0: all"""
    test_view: str = "crop"
    """where the prediction for the centre crop is scored. crop: inside the crop; stretched: on the whole frame, to which it is stretched, as
    Laina et al. do"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_images", "seeds", "first_channels"):
            require_at_least(f"--{name}", getattr(self, name), 1)
        for name in ("warmup_steps", "test_images", "weight_decay", "encoder_rate"):
            require_at_least(f"--{name}", getattr(self, name), 0)
        for name in ("lr", "frame_scale", "huber_share"):
            require_positive(f"--{name}", getattr(self, name))
        require_between("--momentum", self.momentum, 0.0, 1.0)
        check_drops(self.drop_at, self.drop)
        require(len(self.crop_px) == 2 and min(self.crop_px) >= 1, "--crop_px", self.crop_px, "a height and a width in pixels")
        require(bool(self.up_channels) and min(self.up_channels) >= 1, "--up_channels", self.up_channels, "at least one number >= 1")
        for name in ("flip_p", "gray_p", "brightness"):
            require_probability(f"--{name}", getattr(self, name))
        require_range("--saturation", self.saturation, 0.0, 10.0)  # type: ignore[arg-type]
        require_between("--hue", self.hue, 0.0, 0.5)
        require_choice("--test_view", self.test_view, VIEWS)

    def without_effect(self, _: Sequence[str]) -> dict[str, str]:
        """Returns why each option that these settings don't use has no effect."""
        return drop_without_effect(self.drop_at)


# For 48 px and a small encoder of stride 8: two up-projections give maps of 24 x 24 positions. The encoder is frozen, as in segmentation.
QUICK = DepthSettings(
    steps=300,
    batch_images=16,
    lr=0.01,
    encoder_rate=0.0,
    drop_at=(0.7, 0.9),
    frame_scale=1.0,
    crop_px=(48, 48),
    first_channels=64,
    up_channels=(32, 16),
    test_images=800,
)
PAPER_ROWS = {
    "paper, BYOL ResNet-50": {"pct1": 84.6, "pct2": 96.7, "pct3": 99.1, "rms": 0.541, "rel": 0.129},
    "paper, SimCLR (reproduced)": {"pct1": 83.3, "pct2": 96.5, "pct3": 99.1, "rms": 0.557, "rel": 0.134},
    "paper, supervised ImageNet (Laina et al.)": {"pct1": 81.1, "pct2": 95.3, "pct3": 98.8, "rms": 0.573, "rel": 0.127},
}
COLUMNS = {"pct1": "< 1.25 %", "pct2": "< 1.25^2 %", "pct3": "< 1.25^3 %", "rms": "-rms (m)", "rel": "-rel"}


class DepthNetwork(nn.Module):
    """Backbone and up-projections: (N, 3, H, W) -> depth in metres (N, h, w)."""

    def __init__(self, backbone: Backbone, *, first_channels: int, up_channels: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = UpProjectionDecoder(backbone.channels[-1], first_channels=first_channels, up_channels=up_channels)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.backbone.last(images)).squeeze(1)


def reverse_huber(prediction: Tensor, depth: Tensor, *, share: float) -> Tensor:
    """Returns the mean reverse Huber loss over the pixels whose depth is known: |e| up to c, (e^2 + c^2) / 2c above; see `mean_over_pixels`.

    c: this share of the largest |e| of the batch, over all ranks. prediction, depth: (N, H, W); 0 without known pixels.
    """
    known = valid(depth)
    # Errors of unknown pixels are set to 0, not left out: a selection has another size in every step, and waits for the device.
    error = torch.where(known, prediction.float() - depth, 0.0).abs()
    c = (share * largest(error.detach().amax())).clamp(min=1e-12)
    loss = torch.where(error <= c, error, (error * error + c * c) / (2 * c))
    return mean_over_pixels(loss.sum(), known)


STATISTICS = ("pixels", "hits1", "hits2", "hits3", "squared", "relative")


def depth_statistics(prediction: Tensor, depth: Tensor) -> NDArray[np.float64]:
    """Returns sums over the known pixels of one image, `STATISTICS`, float64 (6,)."""
    known = valid(depth)
    truth, mine = depth[known].double(), prediction[known].double().clamp(min=NEAREST_M)
    ratio = torch.maximum(truth / mine, mine / truth)
    sums = [known.sum().double(), *((ratio < THRESHOLD**power).sum().double() for power in (1, 2, 3))]
    sums += [((truth - mine) ** 2).sum(), ((truth - mine).abs() / truth).sum()]
    return torch.stack(sums).cpu().numpy()


def depth_scores(statistics: NDArray[np.float64]) -> dict[str, float]:
    """Returns the scores over all known pixels of all images, from (N, 6)."""
    pixels, hits1, hits2, hits3, squared, relative = statistics.sum(axis=0)
    return {
        "pct1": float(hits1 / pixels),
        "pct2": float(hits2 / pixels),
        "pct3": float(hits3 / pixels),
        "rms": float(np.sqrt(squared / pixels)),
        "rel": float(relative / pixels),
    }


def _first_threshold(statistics: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    pixels, hits = weights @ statistics[:, 0], weights @ statistics[:, 1]
    return float(hits / pixels) if pixels else float("nan")


# ---- images


@dataclass(frozen=True)
class DepthImages:
    """Augmented training crops and test frames; `batches.Source`."""

    frames: DepthFrames
    settings: DepthSettings

    def __len__(self) -> int:
        return len(self.frames)

    def _reduced(self, image: Tensor, depth: Tensor) -> tuple[Any, Any]:
        """Returns a frame in its reduced size; the depth by nearest neighbours: a mean over an edge is the depth of nothing."""
        from torchvision import tv_tensors
        from torchvision.transforms import v2

        pair = tv_tensors.Image(image), tv_tensors.Mask(depth)
        if self.settings.frame_scale == 1:
            return pair
        size = [max(1, round(side * self.settings.frame_scale)) for side in depth.shape]
        return v2.Resize(size, antialias=True)(*pair)

    def train(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns uint8 (3, h, w) and float32 (h, w)."""
        from torchvision.transforms import v2

        settings = self.settings
        view = v2.Compose([v2.CenterCrop(list(settings.crop_px)), v2.RandomHorizontalFlip(settings.flip_p)])
        image, depth = view(*self._reduced(*self.frames.read(index)))
        return self._coloured(image.as_subclass(Tensor)), depth.as_subclass(Tensor)

    def _coloured(self, image: Tensor) -> Tensor:
        """Returns the image with changed colours, by the paper's formulas (additive brightness, HSV saturation), rounded to 8 bits."""
        settings, draw = self.settings, torch.rand(5).tolist()
        x = image[None].float() / 255
        if draw[0] < settings.gray_p:
            x = to_grayscale(x)
        x = adjust_brightness(x, settings.brightness * (2 * draw[1] - 1)).clamp(0, 1)
        low, high = settings.saturation
        x = adjust_saturation(x, low + (high - low) * draw[2]).clamp(0, 1)
        x = adjust_hue(x, settings.hue * (2 * draw[3] - 1)).clamp(0, 1)
        return (255 * x[0]).round().byte()

    def test(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns the reduced image's centre crop, uint8 (3, h, w), and the depth it is scored with, in the frame's own resolution, float32 (H, W)."""
        from torchvision.transforms import v2

        whole, depth = self.frames.read(index)
        image, _ = self._reduced(whole, depth)
        # Not the whole frame: the network was trained on crops of this size, and the positions of its map stand for such a crop's.
        image = v2.CenterCrop(list(self.settings.crop_px))(image)
        if self.settings.test_view == "crop":
            # Where a frame is smaller than the crop both are padded, the depth by 0, which is unknown.
            depth = v2.CenterCrop([round(crop / self.settings.frame_scale) for crop in self.settings.crop_px])(depth)
        return image.as_subclass(Tensor), depth


def stacked(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([image for image, _ in samples]), torch.stack([depth for _, depth in samples])


@dataclass(frozen=True)
class _Data:
    train: DepthImages
    test: DepthImages
    test_rows: Indices


def _open(job: Job, settings: DepthSettings) -> _Data:
    train, test = open_frames(job.data)
    for name, frames in (("training", train), ("test", test)):
        # h5py reads in one thread at a time; a folder's files are decoded side by side.
        require_sound(job, f"{name} frames", range(len(frames)), frames.check)
    return _Data(DepthImages(train, settings), DepthImages(test, settings), spread_rows(len(test), settings.test_images))


# ---- the task


def build_network(subject: Subject, settings: DepthSettings, images: DepthImages, seed: int) -> nn.Module:
    """Returns a new network of the subject in training mode, on the CPU; the decoder is random by the seed."""

    def calibration() -> Tensor:
        read = lambda row: images.train(row)[0]  # noqa: E731
        return calibration_images(read, subject, num_train=len(images), seed=seed, size_px=max(settings.crop_px))

    backbone = backbone_of(subject.encoder(calibration))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DepthNetwork(backbone, first_channels=settings.first_channels, up_channels=settings.up_channels)
    return network.train()


def _optimizer(network: nn.Module, settings: DepthSettings) -> torch.optim.Optimizer:
    assert isinstance(network, DepthNetwork)
    return sgd(
        network,
        network.backbone,
        encoder_rate=settings.encoder_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def _loss(subject: Subject, share: float, network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, depth = batch
    prediction = network(normalised(images, subject))
    small = F.interpolate(depth[:, None], size=prediction.shape[1:], mode="nearest-exact")[:, 0]
    return reverse_huber(prediction, small, share=share)


def _train_and_test(job: Job, settings: DepthSettings, data: _Data, subject: Subject, trial: Trial) -> dict[str, Any]:
    start = time.monotonic()
    network = prepared(build_network(subject, settings, data.train, trial.seed), job)
    figures = train_trial(
        job,
        trial,
        settings,
        network=network,
        optimizer=_optimizer(network, settings),
        loss_of=partial(_loss, subject, settings.huber_share),
        source=data.train,
        collate=stacked,
        warmup_steps=settings.warmup_steps,
    )
    statistics = _test(job, subject, network, data, key=trial.key)
    return {
        "scores": depth_scores(statistics),
        "seconds": time.monotonic() - start,
        "images_per_s": figures.images_per_s,
        "statistics": statistics.tolist(),
    }


@torch.inference_mode()
def _test(job: Job, subject: Subject, network: nn.Module, data: _Data, *, key: str) -> NDArray[np.float64]:
    """Returns the statistics of each test image in the order of the rows, (N, 6), on every rank."""
    network.eval()
    drawn, kept, found = sample_rows(len(data.test_rows), ranks=job.process.world_size), {}, {}
    place = {int(row): at for at, row in enumerate(data.test_rows)}
    for samples in all_samples(job, data.test, rows=data.test_rows, batch=max(1, min(job.batch, 32))):
        for group in _of_equal_size(samples):
            images = moved(torch.stack([image for _, (image, _) in group]), job.process.device)
            with autocast(job.precision, device=job.process.device):
                # Not network(...): a compiled one would be compiled again for the size of the test images.
                predictions = network.forward(normalised(images, subject)).float()
            for (row, (_, depth)), prediction in zip(group, predictions, strict=True):
                full = F.interpolate(prediction[None, None], size=depth.shape, mode="bilinear", align_corners=False)[0, 0]
                found[place[row]] = depth_statistics(full, depth.to(full.device))
                if place[row] in drawn:
                    kept[place[row]] = full.half().cpu().numpy()
    network.train()
    keep_predictions(job, key, kept)
    everywhere = {at: value for part in gather_everywhere(found) for at, value in part.items()}
    return np.stack([everywhere[at] for at in range(len(data.test_rows))])


def _of_equal_size(samples: list[Any]) -> list[list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for sample in samples:
        groups.setdefault(tuple(sample[1][0].shape), []).append(sample)
    return list(groups.values())


def run(job: Job, settings: DepthSettings) -> TaskResult:
    data = _open(job, settings)
    outcomes = run_trials(
        job,
        lrs=(settings.lr,),
        seeds=settings.seeds,
        num_train=len(data.train),
        selected_by="pct1",
        run=partial(_train_and_test, job, settings, data),
    )
    return trial_result(
        job,
        outcomes,
        columns=COLUMNS,
        evidence=lambda part: np.asarray(part["statistics"]),
        compare=partial(compare_statistics, score=_first_threshold),
        details=lambda _, statistics: {"known_pixels": int(statistics[0][:, 0].sum())},
        sizes={"train": len(data.train), "test": len(data.test_rows)},
        paper=PAPER_ROWS,
        notes=[*_notes(settings), *_picture(job, data)],
    )


def _notes(settings: DepthSettings) -> list[str]:
    where = "the centre crop" if settings.test_view == "crop" else "the whole frame, over which the centre crop's prediction is stretched,"
    return [
        f"scored on all pixels of {where} in the frame's own resolution whose depth is finite and above 0; predictions below {NEAREST_M} m count as that",
        "the paper does not state momentum, schedule, warm-up and whether borders are masked: "
        f"here {settings.momentum:g}, {'a constant rate' if not settings.drop_at else 'drops of the rate'}, {settings.warmup_steps} steps, no",
    ]


def _picture(job: Job, data: _Data) -> list[str]:
    @cache
    def image_and_truth(at: int) -> tuple[NDArray[np.uint8], Any]:
        image, depth = data.test.test(int(data.test_rows[at]))
        return image.permute(1, 2, 0).numpy(), depth.numpy()

    rows = sample_rows(len(data.test_rows), ranks=job.process.world_size) if job.process.is_main else []
    far = max((float(image_and_truth(at)[1].max()) for at in rows), default=0.0)

    def draw(axes: Any, cell: Any) -> Any:
        return axes.imshow(np.asarray(cell[1], dtype=np.float32), vmin=0.0, vmax=far, cmap="viridis")

    return picture_notes(job, num_test=len(data.test_rows), image_and_truth=image_and_truth, draw=draw, bar="depth (m)")


def plan(job: Job, settings: DepthSettings) -> list[str]:
    data = _open(job, settings)
    subject = job.subjects[0]
    network = prepared(build_network(subject, settings, data.train, job.seed), job)
    return plan_training(
        job,
        network,
        optimizer=_optimizer(network, settings),
        loss_of=partial(_loss, subject, settings.huber_share),
        source=data.train,
        collate=stacked,
        size_px=max(settings.crop_px),
        trainings=len(job.subjects) * settings.seeds,
        settings=settings,
        num_test=len(data.test_rows),
    )


TASKS = {
    "depth": Task(
        title="NYU v2 depth",
        what="the encoder with fast up-projections, fine-tuned; threshold accuracies and errors",
        versions={"paper": DepthSettings(), "quick": QUICK},
        run=run,
        plan=plan,
        paths=lambda job, _: paths_of_frames(job.data),
    )
}
