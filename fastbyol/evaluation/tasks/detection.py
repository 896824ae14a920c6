"""Object detection on VOC with Faster R-CNN: the paper's frozen variant and MoCo's protocol, scored by VOC's and COCO's average precision.

Grill et al., section 4 and appendix D.5; MoCo's detection code. Data in VOC's layout (`dense/voc.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastbyol.config.errors import (
    UserError,
    require,
    require_at_least,
    require_between,
    require_choice,
    require_positive,
    require_probability,
)
from fastbyol.data.traversal import Indices
from fastbyol.evaluation.result_file import TaskResult
from fastbyol.evaluation.tasks.dense.average_precision import (
    Detections,
    Objects,
    class_scores,
    coco_metric,
    coco_scores,
    compare_matches,
    kept_matches,
    match_class,
    mean_average_precision,
)
from fastbyol.evaluation.tasks.dense.batches import all_samples, moved
from fastbyol.evaluation.tasks.dense.files import read_image
from fastbyol.evaluation.tasks.dense.pictures import draw_boxes, keep_predictions, picture_notes, sample_rows
from fastbyol.evaluation.tasks.dense.plan import plan_training
from fastbyol.evaluation.tasks.dense.trials import (
    Trial,
    calibration_images,
    check_drops,
    drop_without_effect,
    run_trials,
    spread_rows,
    train_trial,
    trial_result,
)
from fastbyol.evaluation.tasks.dense.voc import BoxedImage, boxed_images, class_names, read_boxes, voc_folder, year_and_list
from fastbyol.evaluation.tasks.job import Job, Subject
from fastbyol.evaluation.tasks.registry import Task
from fastbyol.evaluation.tasks.soundness import require_sound
from fastbyol.models import use_all_ranks
from fastbyol.models.backbone import backbone_of
from fastbyol.models.faster_rcnn import Detector, build_detector
from fastbyol.models.view_batchnorm import convert_to_view_batchnorm
from fastbyol.ranks.process_group import gather_everywhere
from fastbyol.run.precision import autocast, use_switches

HEADS = ("c4", "fpn")
FROZEN = ("none", "backbone", "encoder")
NORMS = ("fixed", "rank", "all_ranks")
EDGES = ("longest", "shortest")


@dataclass(frozen=True)
class DetectionSettings:
    """Settings of detection; the defaults are the paper's (section 4, appendix D.5), as far as it states them."""

    train_sets: tuple[str, ...] = ("2007_trainval",)
    """lists to train on, LIST or YEAR_LIST"""
    test_set: str = "2007_test"
    """list to test on, LIST or YEAR_LIST"""
    test_images: int = 0
    """number of images to test on, spread evenly over the list; 0: all"""
    steps: int = 1_500_000
    """length of the training"""
    # The paper trains asynchronously with 9 workers and does not state their batch, momentum and weight decay.
    batch_images: int = 1
    """images of all ranks in a step (the paper: one worker's, not stated)"""
    lr: float = 1e-3
    """learning rate"""
    drop_at: tuple[float, ...] = (2 / 3, 0.8)
    """points at which the rate is multiplied by drop, as shares of the training"""
    drop: float = 0.1
    """factor of the rate at each drop_at"""
    warmup_steps: int = 0
    """steps of a linear warm-up from a thousandth of the rate"""
    momentum: float = 0.9
    """momentum of SGD (the paper does not state it)"""
    weight_decay: float = 1e-4
    """weight decay of the trained parameters (the paper does not state it)"""
    decay_norms: bool = True
    """whether weight decay also applies to scale and offset of batch norms (not in detectron2, and so not in MoCo)"""
    seeds: int = 1
    """trainings with different seeds, whose mean is reported"""
    frozen: str = "backbone"
    """part of the encoder that is not trained. none; backbone: up to conv4, while conv5 is trained with the box head; encoder: all of it"""
    norms: str = "fixed"
    """statistics of the encoder's batch norms. fixed: its running ones; rank: of each rank's images; all_ranks: of all ranks' images"""
    extra_norm: bool = False
    """a batch norm behind conv5, as in MoCo's protocol"""
    head: str = "c4"
    """c4: conv5 is the box head; fpn: a feature pyramid with two fully connected layers"""
    edge: str = "longest"
    """which edge of the image is resized"""
    train_px: tuple[int, ...] = tuple(range(480, 1025))
    """lengths of that edge in training, one of which is drawn for each image"""
    test_px: int = 1024
    """length of that edge in tests (the paper does not state it)"""
    longest_px: int = 1333
    """largest length of the longest edge, with --edge shortest"""
    flip_p: float = 0.0
    """probability that a training image is mirrored"""
    anchor_px: tuple[int, ...] = (32, 64, 128, 256, 512)
    """sides of the anchors; with --head fpn, one for each feature map"""
    anchor_aspects: tuple[float, ...] = (0.5, 1.0, 2.0)
    """heights over widths of the anchors"""
    region_px: int = 14
    """side of a pooled region (fpn: usually 7)"""
    proposals: tuple[int, ...] = (12_000, 2000, 6000, 1000)
    """four numbers of proposals: before and after non-maximum suppression, in training and then in tests"""
    rpn_images: int = 256
    """anchors per image in the loss of the proposals"""
    box_images: int = 512
    """regions per image in the loss of the boxes"""
    detections: int = 100
    """largest number of detections per image"""

    def __post_init__(self) -> None:
        at_least_1 = ("steps", "batch_images", "seeds", "test_px", "longest_px", "region_px", "rpn_images", "box_images", "detections")
        for name in at_least_1:
            require_at_least(f"--{name}", getattr(self, name), 1)
        for name in ("test_images", "warmup_steps", "weight_decay"):
            require_at_least(f"--{name}", getattr(self, name), 0)
        require_positive("--lr", self.lr)
        check_drops(self.drop_at, self.drop)
        require_between("--momentum", self.momentum, 0.0, 1.0)
        require_probability("--flip_p", self.flip_p)
        for name, choices in (("frozen", FROZEN), ("norms", NORMS), ("head", HEADS), ("edge", EDGES)):
            require_choice(f"--{name}", getattr(self, name), choices)
        for name in ("train_sets", "train_px", "anchor_px", "anchor_aspects"):
            require(bool(getattr(self, name)), f"--{name}", getattr(self, name), "at least one value")
        for name in ("train_px", "anchor_px", "anchor_aspects", "proposals"):
            require(min(getattr(self, name)) > 0, f"--{name}", getattr(self, name), "positive numbers")
        require(len(self.proposals) == 4, "--proposals", self.proposals, "four numbers: before and after, in training, then in tests")
        require(self.head == "c4" or not self.extra_norm, "--extra_norm", "yes", "no with --head fpn, which has no conv5 in its head")

    def without_effect(self, _: Sequence[str]) -> dict[str, str]:
        """Returns why each option that these settings don't use has no effect."""
        return ({"longest_px": "with --edge longest"} if self.edge == "longest" else {}) | drop_without_effect(self.drop_at)


# MoCo's configs/coco... pascal_voc_R_50_C4_24k_moco.yaml: VOC07+12, everything trained. For trainval2007 alone: --train_sets 2007_trainval
# --steps 9000 --seeds 5.
MOCO = DetectionSettings(
    train_sets=("2007_trainval", "2012_trainval"),
    steps=24_000,
    batch_images=16,
    lr=0.02,
    drop_at=(0.75, 22 / 24),
    warmup_steps=100,
    decay_norms=False,
    frozen="none",
    norms="all_ranks",
    extra_norm=True,
    edge="shortest",
    train_px=tuple(range(480, 801, 32)),
    test_px=800,
    flip_p=0.5,
)
# For 48 px and a small encoder of stride 4 in front of its last group; frozen as the paper's.
QUICK = DetectionSettings(
    train_sets=("train",),
    test_set="val",
    test_images=400,
    steps=400,
    batch_images=8,
    lr=0.05,
    drop_at=(0.7, 0.9),
    warmup_steps=50,
    norms="rank",
    train_px=(44, 48, 52, 56),
    test_px=48,
    anchor_px=(20, 28, 36),
    anchor_aspects=(1.0,),
    region_px=6,
    proposals=(200, 50, 100, 30),
    rpn_images=64,
    box_images=32,
    detections=10,
)
PAPER_ROWS = {
    "paper, BYOL ResNet-50": {"voc_ap50": 77.5},
    "paper, SimCLR (reproduced)": {"voc_ap50": 75.2},
    "paper, supervised ImageNet": {"voc_ap50": 74.4},
    "paper, MoCo": {"voc_ap50": 74.9},
}
COLUMNS = {"voc_ap50": "VOC07 AP50 %", "ap": "AP %", "ap50": "AP50 %", "ap75": "AP75 %"}


# ---- images


@dataclass(frozen=True)
class DetectionImages:
    """Resized images with their objects; `batches.Source`."""

    images: tuple[BoxedImage, ...]
    settings: DetectionSettings

    def __len__(self) -> int:
        return len(self.images)

    def _resize(self, length_px: int) -> Any:
        from torchvision.transforms import v2

        if self.settings.edge == "longest":
            return v2.Resize(None, max_size=length_px, antialias=True)
        # RandomShortestSize and not Resize, which refuses a limit below the length of the short edge.
        return v2.RandomShortestSize([length_px], max_size=self.settings.longest_px, antialias=True)

    def _pair(self, index: int) -> tuple[Any, Any]:
        from torchvision import tv_tensors

        item = self.images[index]
        boxes = torch.tensor(item.boxes, dtype=torch.float32).reshape(-1, 4)
        return (
            tv_tensors.Image(read_image(item.image)),
            tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=item.size),  # type: ignore[call-overload]
        )

    def train(self, index: int) -> tuple[Tensor, Tensor, Tensor, int]:
        """Returns uint8 (3, H, W), boxes (n, 4) in its px, labels (n,), and a random number for the network's own draws.

        Difficult objects are trained on, as in detectron2.
        """
        from torchvision.transforms import v2

        lengths = self.settings.train_px
        length_px = lengths[int(torch.randint(len(lengths), ()))]
        view = v2.Compose([self._resize(length_px), v2.RandomHorizontalFlip(self.settings.flip_p), v2.ClampBoundingBoxes()])
        image, boxes = view(*self._pair(index))
        boxes, labels = boxes.as_subclass(Tensor), torch.tensor(self.images[index].labels, dtype=torch.int64)
        return image.as_subclass(Tensor), boxes, labels, int(torch.randint(2**31, ()))

    def test(self, index: int) -> Tensor:
        """Returns the resized image, uint8 (3, H, W)."""
        return self._resize(self.settings.test_px)(self._pair(index)[0]).as_subclass(Tensor)

    def objects(self, index: int) -> Objects:
        """Returns the true objects in px of the original image."""
        item = self.images[index]
        boxes = np.array(item.boxes, dtype=np.float32).reshape(-1, 4)
        return Objects(boxes, np.array(item.labels, dtype=np.int64), np.array(item.difficult, dtype=bool))


Batch = tuple[list[Tensor], list[dict[str, Tensor]], int]


def listed(samples: list[tuple[Tensor, Tensor, Tensor, int]]) -> Batch:
    """Returns images, targets, and the first one's random number."""
    return [each[0] for each in samples], [{"boxes": boxes, "labels": labels} for _, boxes, labels, _ in samples], samples[0][3]


@dataclass(frozen=True)
class _Data:
    train: DetectionImages
    test: DetectionImages
    test_rows: Indices
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def _open(job: Job, settings: DetectionSettings) -> _Data:
    names: tuple[str, ...] = ()
    parts, empty = [], []
    for each in (*settings.train_sets, settings.test_set):
        year, name = year_and_list(each)
        folder = voc_folder(job.data, year=year)
        names = names or class_names(folder)
        pairs = boxed_images(folder, name)
        items: list[BoxedImage] = require_sound(job, f"annotations of {each}", pairs, partial(_read_pair, classes=names))
        parts.append(items)
        empty += [xml for (_, xml), item in zip(pairs, items, strict=True) if not item.boxes]
    notes = []
    if empty:
        notes.append(f"{len(empty):,} images have no objects and count as background, such as {empty[0]}")
        job.announce(notes[0])
    train = DetectionImages(tuple(item for items in parts[:-1] for item in items), settings)
    if not any(item.boxes for item in train.images):
        raise UserError(f"--data {job.data}: no training image has an object")
    test = DetectionImages(tuple(parts[-1]), settings)
    return _Data(train, test, spread_rows(len(test), settings.test_images), names, tuple(notes))


def _read_pair(pair: tuple[Path, Path], *, classes: tuple[str, ...]) -> BoxedImage:
    return read_boxes(*pair, classes=classes)


# ---- the task


def build_network(subject: Subject, classes: int, settings: DetectionSettings, images: DetectionImages, seed: int) -> Detector:
    """Returns a new network of the subject in training mode, on the CPU; its heads are random by the seed."""
    square = min(settings.test_px, 512)

    def square_image(row: int) -> Tensor:
        from torchvision.transforms import v2

        return v2.Resize((square, square), antialias=True)(images.test(row))

    def calibration() -> Tensor:
        return calibration_images(square_image, subject, num_train=len(images), seed=seed, size_px=square)

    backbone = backbone_of(subject.encoder(calibration))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_detector(
            backbone,
            classes=classes,
            head=settings.head,
            frozen=settings.frozen,
            fixed_norms=settings.norms == "fixed",
            extra_norm=settings.extra_norm,
            anchor_px=settings.anchor_px,
            anchor_aspects=settings.anchor_aspects,
            region_px=settings.region_px,
            proposals=settings.proposals,  # type: ignore[arg-type]
            rpn_images=settings.rpn_images,
            box_images=settings.box_images,
            detections=settings.detections,
            mean=subject.views.mean,
            std=subject.views.std,
        )
    if settings.norms == "all_ranks":
        convert_to_view_batchnorm(network, views=1)
        use_all_ranks(network)
    return network.train()


def _paths(job: Job, settings: DetectionSettings) -> list[Path]:
    years = dict.fromkeys(year_and_list(text)[0] for text in (*settings.train_sets, settings.test_set))
    return list(dict.fromkeys(voc_folder(job.data, year=year) for year in years))


def _optimizer(network: nn.Module, settings: DetectionSettings) -> torch.optim.Optimizer:
    norms = {id(parameter) for module in network.modules() if isinstance(module, _BatchNorm) for parameter in module.parameters()}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [parameter for parameter in trained if id(parameter) not in norms]},
        {"params": [parameter for parameter in trained if id(parameter) in norms]},
    ]
    if not settings.decay_norms:
        groups[1]["weight_decay"] = 0.0
    return torch.optim.SGD(groups, lr=0.0, momentum=settings.momentum, weight_decay=settings.weight_decay)


def _loss(network: nn.Module, batch: Batch) -> Tensor:
    images, targets, draw = batch
    device = images[0].device
    # torchvision samples anchors and regions from the global generator. Seeded by the batch's number, a resumed training draws the same.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(draw)
        return network([image.float() / 255 for image in images], targets)


def _train_and_test(job: Job, settings: DetectionSettings, data: _Data, subject: Subject, trial: Trial) -> dict[str, Any]:
    start = time.monotonic()
    network = build_network(subject, len(data.classes), settings, data.train, trial.seed)
    network = _placed(network, job)
    figures = train_trial(
        job,
        trial,
        settings,
        network=network,
        optimizer=_optimizer(network, settings),
        loss_of=_loss,
        source=data.train,
        collate=listed,
        warmup_steps=settings.warmup_steps,
    )
    found = _test(job, network, data, key=trial.key)
    objects = [data.test.objects(int(row)) for row in data.test_rows]
    matches = [match_class(found, objects, label=label) for label in range(1, len(data.classes) + 1)]
    return {
        "scores": {"voc_ap50": mean_average_precision(matches), **coco_scores(found, objects)},
        "seconds": time.monotonic() - start,
        "images_per_s": figures.images_per_s,
        "by_class": class_scores(matches, data.classes),
        "matches": [{name: value.tolist() for name, value in vars(each).items()} for each in matches],
    }


def _placed(network: Detector, job: Job) -> Detector:
    """Moves the network to the device, channels last.

    Not by `prepare_model`: it compiles for one size of image, and on a CPU keeps freed memory, which grows where every batch has another
    size.
    """
    use_switches(job.precision)
    return network.to(job.process.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.inference_mode()
def _test(job: Job, network: Detector, data: _Data, *, key: str) -> list[Detections]:
    """Returns the detections of each test image in the order of the rows, in px of the original image, on every rank."""
    network.eval()
    drawn, kept, found = sample_rows(len(data.test_rows), ranks=job.process.world_size), {}, {}
    place = {int(row): at for at, row in enumerate(data.test_rows)}
    batch = max(1, min(job.batch, 32 if data.test.settings.test_px <= 128 else 4))
    for samples in all_samples(job, data.test, rows=data.test_rows, batch=batch):
        images = [moved(image, job.process.device).float() / 255 for _, image in samples]
        with autocast(job.precision, device=job.process.device):
            results = network(images)
        for (row, image), result in zip(samples, results, strict=True):
            each = _in_original_px(result, image, data.test.images[row].size)
            found[place[row]] = each
            if place[row] in drawn:
                kept[place[row]] = np.column_stack([each.boxes, each.labels, each.scores]).astype(np.float32)
    network.train()
    keep_predictions(job, key, kept)
    everywhere = {at: value for part in gather_everywhere(found) for at, value in part.items()}
    return [everywhere[at] for at in range(len(data.test_rows))]


def _in_original_px(result: dict[str, Tensor], image: Tensor, size: tuple[int, int]) -> Detections:
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import functional

    canvas = (image.shape[-2], image.shape[-1])
    boxes = tv_tensors.BoundingBoxes(result["boxes"].float().cpu(), format="XYXY", canvas_size=canvas)  # type: ignore[call-overload]
    back = functional.resize(boxes, list(size)).as_subclass(Tensor)
    return Detections(back.numpy(), result["labels"].cpu().numpy(), result["scores"].float().cpu().numpy())


def run(job: Job, settings: DetectionSettings) -> TaskResult:
    coco_metric()  # a missing package is reported before the training
    data = _open(job, settings)
    outcomes = run_trials(
        job,
        lrs=(settings.lr,),
        seeds=settings.seeds,
        num_train=len(data.train),
        selected_by="voc_ap50",
        run=partial(_train_and_test, job, settings, data),
    )
    return trial_result(
        job,
        outcomes,
        columns=COLUMNS,
        evidence=kept_matches,
        compare=compare_matches,
        details=lambda outcome, _: {"by_class": outcome.parts[0]["by_class"]},
        sizes={"train": len(data.train), "test": len(data.test_rows)},
        paper=PAPER_ROWS,
        notes=[*data.notes, *_notes(settings), *_picture(job, data)],
    )


def _notes(settings: DetectionSettings) -> list[str]:
    return [
        "VOC07 AP50: 11 points, difficult objects ignored, the paper's measure; AP, AP50 and AP75 are COCO's, in which they count as crowds",
        "the paper trains asynchronously with 9 workers and states neither their batch, momentum and weight decay nor which parts are frozen: "
        f"here {settings.batch_images} images a step, {settings.momentum:g}, {settings.weight_decay:g}, frozen: {settings.frozen}",
    ]


def _picture(job: Job, data: _Data) -> list[str]:
    def image_and_truth(at: int) -> tuple[NDArray[np.uint8], Any]:
        row = int(data.test_rows[at])
        truth = data.test.objects(row)
        image = read_image(data.test.images[row].image)
        return image.permute(1, 2, 0).numpy(), np.column_stack([truth.boxes, truth.labels, np.full(len(truth.labels), np.nan)])

    draw = partial(draw_boxes, classes=data.classes)
    return picture_notes(job, num_test=len(data.test_rows), image_and_truth=image_and_truth, draw=draw)


def plan(job: Job, settings: DetectionSettings) -> list[str]:
    data = _open(job, settings)
    network = _placed(build_network(job.subjects[0], len(data.classes), settings, data.train, job.seed), job)
    return plan_training(
        job,
        network,
        optimizer=_optimizer(network, settings),
        loss_of=_loss,
        source=data.train,
        collate=listed,
        size_px=settings.test_px,
        trainings=len(job.subjects) * settings.seeds,
        settings=settings,
        num_test=len(data.test_rows),
    )


TASKS = {
    "detection": Task(
        title="VOC detection",
        what="Faster R-CNN on the encoder; VOC's and COCO's average precision",
        versions={"paper": DetectionSettings(), "moco": MOCO, "quick": QUICK},
        run=run,
        plan=plan,
        paths=_paths,
    )
}
