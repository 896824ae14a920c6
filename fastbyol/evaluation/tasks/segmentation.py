"""Semantic segmentation of VOC2012 by fine-tuning: a dilated encoder with a small convolutional head, scored by mean IoU.

Grill et al., appendix D.4, which follows MoCo's appendix A.5. Data in VOC's layout (`dense/voc.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fastbyol.config.errors import require_at_least, require_between, require_choice, require_positive, require_probability, require_range
from fastbyol.data.traversal import Indices
from fastbyol.evaluation.result_file import TaskResult
from fastbyol.evaluation.tasks.dense.batches import all_samples, moved
from fastbyol.evaluation.tasks.dense.files import read_image
from fastbyol.evaluation.tasks.dense.pictures import coloured, keep_predictions, picture_notes, sample_rows
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
from fastbyol.evaluation.tasks.dense.voc import IGNORE, LabelledImage, class_names, labelled_images, sbd_folders, voc_folder
from fastbyol.evaluation.tasks.held_out import NOTHING_TO_CHOOSE, check_amounts, held_out_notes
from fastbyol.evaluation.tasks.job import Job, Subject
from fastbyol.evaluation.tasks.registry import Task
from fastbyol.evaluation.tasks.soundness import require_sound
from fastbyol.models.backbone import Backbone, backbone_of
from fastbyol.ranks.process_group import gather_everywhere
from fastbyol.run.precision import autocast

VIEWS = ("crop", "full")
YEAR = "2012"


@dataclass(frozen=True)
class SegmentationSettings:
    """Settings of segmentation; the defaults are the paper's (protocol: appendix D.4)."""

    train_set: str = "train_aug"
    """list in ImageSets/Segmentation to train on"""
    test_set: str = "val"
    """list to test on"""
    test_images: int = 0
    """number of images to test on, spread evenly over the list; 0: all"""
    steps: int = 30_000
    """length of a training"""
    batch_images: int = 16
    """images of all ranks in a step"""
    lrs: tuple[float, ...] = (1e-3, 10**-2.5, 1e-2, 10**-1.5, 1e-1)
    """learning rates, of which the best on held-out training images is used"""
    held_out: tuple[float, ...] = (2119, 0.08)
    """training images on which the rate is chosen, where there are several: a number, or a share below 1; of two values, the second is used where
    the first is more than a quarter of the training images"""
    seeds: int = 5
    """trainings with different seeds, whose mean is reported"""
    drop_at: tuple[float, ...] = (0.7, 0.9)
    """points at which the rate is multiplied by drop, as shares of the training"""
    drop: float = 0.1
    """factor of the rate at each drop_at"""
    # Not stated by the paper; the usual ones.
    momentum: float = 0.9
    """momentum of SGD (the paper does not state it)"""
    encoder_rate: float = 1.0
    """factor of the encoder's learning rate; 0: frozen, with its batch norms' running statistics"""
    weight_decay: float = 1e-4
    """weight decay of all parameters"""
    scale: tuple[float, ...] = (0.5, 2.0)
    """range of the random scale of a training image"""
    crop_px: int = 513
    """side of a training crop, and of the test's crop"""
    flip_p: float = 0.5
    """probability that a training image is mirrored"""
    head_channels: int = 256
    """channels of the head's two 3x3 convolutions"""
    head_dilation: int = 6
    """dilation of the head's two 3x3 convolutions"""
    test_view: str = "crop"
    """crop: the centre of crop_px, as BYOL tests; full: every image in its own size, as MoCo does"""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_images", "seeds", "crop_px", "head_channels", "head_dilation"):
            require_at_least(f"--{name}", getattr(self, name), 1)
        for name in ("test_images", "weight_decay", "encoder_rate"):
            require_at_least(f"--{name}", getattr(self, name), 0)
        require_at_least("--lrs", len(self.lrs), 1)
        for lr in self.lrs:
            require_positive("--lrs", lr)
        check_amounts("--held_out", self.held_out)
        check_drops(self.drop_at, self.drop)
        require_between("--momentum", self.momentum, 0.0, 1.0)
        require_range("--scale", self.scale, 0.05, 20.0)  # type: ignore[arg-type]
        require_probability("--flip_p", self.flip_p)
        require_choice("--test_view", self.test_view, VIEWS)

    def without_effect(self, _: Sequence[str]) -> dict[str, str]:
        """Returns why each option that these settings don't use has no effect."""
        return (NOTHING_TO_CHOOSE if len(self.lrs) == 1 else {}) | drop_without_effect(self.drop_at)


# For 48 px and a small encoder: one rate, a narrow head, half the dilation, because the maps have 12 x 12 positions. The encoder is frozen,
# so that the score is about its features (docs/evaluation.md).
QUICK = SegmentationSettings(
    train_set="train",
    test_images=800,
    steps=300,
    lrs=(0.2,),
    seeds=1,
    encoder_rate=0.0,
    crop_px=48,
    scale=(0.75, 1.25),
    head_channels=64,
    head_dilation=3,
)
PAPER_ROWS = {
    "paper, BYOL ResNet-50": {"miou": 76.3},
    "paper, SimCLR (reproduced)": {"miou": 75.2},
    "paper, supervised ImageNet": {"miou": 74.4},
    "paper, MoCo": {"miou": 72.5},
}


class SegmentationNetwork(nn.Module):
    """A dilated backbone and the paper's head: (N, 3, H, W) -> logits (N, classes, H / stride, W / stride)."""

    def __init__(self, backbone: Backbone, *, classes: int, channels: int, dilation: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Sequential(
            *_convolution(backbone.channels[-1], channels, dilation),
            *_convolution(channels, channels, dilation),
            nn.Conv2d(channels, classes, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone.last(images))


def _convolution(inputs: int, outputs: int, dilation: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean cross-entropy of the pixels that count, with the logits upsampled to the labels' size (N, H, W); see `mean_over_pixels`."""
    logits = upsampled(logits, tuple(labels.shape[1:]))
    return mean_over_pixels(F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"), labels != IGNORE)


def upsampled(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """Returns the logits in float32, bilinearly resized (the paper does not say how)."""
    return F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def confusion_of(prediction: Tensor, labels: Tensor, *, classes: int) -> Tensor:
    """Returns how many pixels of each true class (rows) are predicted as each (columns), int64 (classes, classes); ignored pixels left out."""
    counted = labels != IGNORE
    cells = labels[counted].long() * classes + prediction[counted].long()
    return torch.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def mean_iou(confusion: NDArray[Any], weights: NDArray[np.float64] | None = None) -> float:
    """Returns the mean over classes of intersection over union, from (classes, classes), or (N, classes, classes) weighted and summed.

    A class that is in neither truth nor prediction has no IoU and is left out of the mean, as in VOC's devkit. NaN if there is none.
    """
    total = _total(confusion, weights)
    both = np.diag(total)
    union = total.sum(axis=0) + total.sum(axis=1) - both
    return float((both[union > 0] / union[union > 0]).mean()) if (union > 0).any() else float("nan")


def pixel_accuracy(confusion: NDArray[Any], weights: NDArray[np.float64] | None = None) -> float:
    """Returns the share of counted pixels whose class is predicted."""
    total = _total(confusion, weights)
    return float(np.trace(total) / total.sum()) if total.sum() else float("nan")


def _total(confusion: NDArray[Any], weights: NDArray[np.float64] | None) -> NDArray[np.float64]:
    if weights is None:
        return np.asarray(confusion, dtype=np.float64)
    return np.tensordot(weights, confusion, axes=1)


# ---- images


@dataclass(frozen=True)
class SegmentationImages:
    """Training crops and test views of labelled images; `batches.Source`."""

    images: tuple[LabelledImage, ...]
    classes: int
    settings: SegmentationSettings
    fill: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.images)

    def _read(self, index: int) -> tuple[Any, Any]:
        from torchvision import tv_tensors

        item = self.images[index]
        return tv_tensors.Image(read_image(item.image)), tv_tensors.Mask(item.read_labels(classes=self.classes))

    def _fills(self) -> dict[Any, Any]:
        from torchvision import tv_tensors

        return {tv_tensors.Image: list(self.fill), tv_tensors.Mask: IGNORE}

    def train(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns a random scale and crop of the image and its labels: uint8 (3, C, C) and (C, C); borders are mean colour, and ignored."""
        from torchvision.transforms import v2

        image, labels = self._read(index)
        # Not ScaleJitter: it compares the target's width with the image's height, and shrinks what is not square.
        factor = torch.empty(()).uniform_(*self.settings.scale).item()
        view = v2.Compose(
            [
                v2.Resize([max(1, round(factor * side)) for side in image.shape[-2:]], antialias=True),
                v2.RandomCrop(self.settings.crop_px, pad_if_needed=True, fill=self._fills()),
                v2.RandomHorizontalFlip(self.settings.flip_p),
            ]
        )
        image, labels = view(image, labels)
        return image.as_subclass(Tensor), labels.as_subclass(Tensor)

    def test(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns the image and its labels as they are tested: the centre crop, padded where the image is smaller, or all of it."""
        from torchvision.transforms import v2

        image, labels = self._read(index)
        if self.settings.test_view == "crop":
            height, width = image.shape[-2:]
            short = [max(self.settings.crop_px - width, 0), max(self.settings.crop_px - height, 0)]
            padding = [short[0] // 2, short[1] // 2, short[0] - short[0] // 2, short[1] - short[1] // 2]
            view = v2.Compose([v2.Pad(padding, fill=self._fills()), v2.CenterCrop(self.settings.crop_px)])
            image, labels = view(image, labels)
        return image.as_subclass(Tensor), labels.as_subclass(Tensor)


def stacked(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.stack([image for image, _ in samples]), torch.stack([labels for _, labels in samples]).long()


@dataclass(frozen=True)
class _Data:
    train: SegmentationImages
    test: SegmentationImages
    test_rows: Indices
    classes: tuple[str, ...]


def _open(job: Job, settings: SegmentationSettings) -> _Data:
    folder = voc_folder(job.data, year=YEAR)
    names = class_names(folder)
    parts = {}
    fill = tuple(255 * value for value in job.subjects[0].views.mean)
    for list_name in dict.fromkeys((settings.train_set, settings.test_set)):
        items = tuple(labelled_images(folder, list_name, data=job.data))
        require_sound(job, f"label images of {list_name}", items, partial(LabelledImage.check, classes=len(names)))
        parts[list_name] = SegmentationImages(items, len(names), settings, fill)
    test = parts[settings.test_set]
    return _Data(parts[settings.train_set], test, spread_rows(len(test), settings.test_images), ("background", *names))


# ---- the task


def build_network(subject: Subject, data_classes: int, settings: SegmentationSettings, images: SegmentationImages, seed: int) -> nn.Module:
    """Returns a new network of the subject in training mode, on the CPU; the head is random by the seed."""

    def calibration() -> Tensor:
        read = lambda row: images.train(row)[0]  # noqa: E731
        return calibration_images(read, subject, num_train=len(images), seed=seed, size_px=settings.crop_px)

    backbone = backbone_of(subject.encoder(calibration), dilate_last=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SegmentationNetwork(backbone, classes=data_classes, channels=settings.head_channels, dilation=settings.head_dilation)
    return network.train()


def _optimizer(network: nn.Module, settings: SegmentationSettings) -> torch.optim.Optimizer:
    assert isinstance(network, SegmentationNetwork)
    return sgd(
        network,
        network.backbone,
        encoder_rate=settings.encoder_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def _loss(subject: Subject, network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return pixel_loss(network(normalised(images, subject)), labels)


def _train_and_test(job: Job, settings: SegmentationSettings, data: _Data, subject: Subject, trial: Trial) -> dict[str, Any]:
    start = time.monotonic()
    network = prepared(build_network(subject, len(data.classes), settings, data.train, trial.seed), job)
    figures = train_trial(
        job,
        trial,
        settings,
        network=network,
        optimizer=_optimizer(network, settings),
        loss_of=partial(_loss, subject),
        source=data.train,
        collate=stacked,
    )
    source, rows = (data.test, data.test_rows) if trial.test_rows is None else (data.train, trial.test_rows)
    confusion = _test(job, settings, subject, network, source, rows, classes=len(data.classes), key=trial.key)
    total = confusion.sum(axis=0)
    return {
        "scores": {"miou": mean_iou(total), "accuracy": pixel_accuracy(total)},
        "seconds": time.monotonic() - start,
        "images_per_s": figures.images_per_s,
        "confusion": confusion.tolist() if trial.test_rows is None else [],
    }


@torch.inference_mode()
def _test(
    job: Job,
    settings: SegmentationSettings,
    subject: Subject,
    network: nn.Module,
    source: SegmentationImages,
    rows: Indices,
    *,
    classes: int,
    key: str,
) -> NDArray[np.int64]:
    """Returns the confusion of each test image in the order of the rows, (N, classes, classes), on every rank."""
    network.eval()
    batch = 1 if settings.test_view == "full" else max(1, min(job.batch, settings.batch_images))
    drawn, kept, found = sample_rows(len(rows), ranks=job.process.world_size), {}, {}
    place = {int(row): at for at, row in enumerate(rows)}
    for samples in all_samples(job, source, rows=rows, batch=batch):
        images, labels = (moved(each, job.process.device) for each in stacked([sample for _, sample in samples]))
        with autocast(job.precision, device=job.process.device):
            # Not network(...): a compiled one would be compiled again for each size of test image.
            logits = network.forward(normalised(images, subject))
        predictions = upsampled(logits, tuple(labels.shape[1:])).argmax(dim=1)
        for (row, _), prediction, truth in zip(samples, predictions, labels, strict=True):
            found[place[row]] = confusion_of(prediction, truth, classes=classes).cpu().numpy()
            if place[row] in drawn:
                kept[place[row]] = prediction.byte().cpu().numpy()
    network.train()
    keep_predictions(job, key, kept)
    everywhere = {at: value for part in gather_everywhere(found) for at, value in part.items()}
    return np.stack([everywhere[at] for at in range(len(rows))])


def run(job: Job, settings: SegmentationSettings) -> TaskResult:
    data = _open(job, settings)
    outcomes = run_trials(
        job,
        lrs=settings.lrs,
        seeds=settings.seeds,
        held_out=settings.held_out,
        num_train=len(data.train),
        selected_by="miou",
        run=partial(_train_and_test, job, settings, data),
    )
    return trial_result(
        job,
        outcomes,
        columns={"miou": "mIoU %", "accuracy": "pixel accuracy %"},
        evidence=lambda part: np.asarray(part["confusion"]),
        compare=partial(compare_statistics, score=mean_iou),
        details=lambda outcome, confusions: {"held_out": outcome.held_out, "iou": _class_ious(confusions[0], data.classes)},
        sizes={"train": len(data.train), "test": len(data.test_rows)},
        paper=PAPER_ROWS,
        notes=[*_notes(settings, num_train=len(data.train)), *_picture(job, data)],
    )


def _class_ious(confusions: NDArray[Any], classes: tuple[str, ...]) -> dict[str, float | None]:
    total = confusions.sum(axis=0).astype(np.float64)
    both, union = np.diag(total), total.sum(axis=0) + total.sum(axis=1) - np.diag(total)
    return {name: float(b / u) if u else None for name, b, u in zip(classes, both, union, strict=True)}


def _notes(settings: SegmentationSettings, *, num_train: int) -> list[str]:
    view = f"the {settings.crop_px} px centre crop (BYOL's)" if settings.test_view == "crop" else "the full size (MoCo's)"
    other = "full" if settings.test_view == "crop" else "crop"
    norms = (
        "each rank's own statistics" if settings.encoder_rate else "the frozen encoder's running statistics, in the head each rank's own"
    )
    return [
        f"tested on {view}; figures of the other protocol (--test_view {other}) are not strictly comparable",
        f"the paper does not state momentum, batch-norm mode, ignored pixels and upsampling: here {settings.momentum:g}, {norms}, 255, bilinear",
        *(held_out_notes(num_train, settings.held_out) if len(settings.lrs) > 1 else ()),
    ]


def _picture(job: Job, data: _Data) -> list[str]:
    def image_and_truth(at: int) -> tuple[NDArray[np.uint8], Any]:
        image, labels = data.test.test(int(data.test_rows[at]))
        return image.permute(1, 2, 0).numpy(), labels.numpy()

    def draw(axes: Any, cell: Any) -> None:
        axes.imshow(coloured(cell[1]), interpolation="nearest")

    return picture_notes(job, num_test=len(data.test_rows), image_and_truth=image_and_truth, draw=draw)


def plan(job: Job, settings: SegmentationSettings) -> list[str]:
    data = _open(job, settings)
    subject = job.subjects[0]
    network = prepared(build_network(subject, len(data.classes), settings, data.train, job.seed), job)
    return plan_training(
        job,
        network,
        optimizer=_optimizer(network, settings),
        loss_of=partial(_loss, subject),
        source=data.train,
        collate=stacked,
        size_px=settings.crop_px,
        trainings=len(job.subjects) * (settings.seeds + (len(settings.lrs) if len(settings.lrs) > 1 else 0)),
        settings=settings,
        num_test=len(data.test_rows),
    )


TASKS = {
    "segmentation": Task(
        title="VOC segmentation",
        what="a dilated encoder with the paper's head, fine-tuned; mean IoU",
        versions={"paper": SegmentationSettings(), "quick": QUICK},
        run=run,
        plan=plan,
        paths=lambda job, _: [voc_folder(job.data, year=YEAR), *sbd_folders(job.data)],
    )
}
