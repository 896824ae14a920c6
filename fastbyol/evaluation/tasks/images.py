"""The labelled images of a classification task: train and test of a data folder."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from fastbyol.config.errors import UserError
from fastbyol.config.views import ViewPair, ViewSpec
from fastbyol.data import build_crop_loader, build_image_loader
from fastbyol.data.backends.source import Indices
from fastbyol.data.loader import CropLoader, ImageLoader
from fastbyol.data.traversal import seeded_permutation
from fastbyol.evaluation.splits import renumbered, split_paths
from fastbyol.evaluation.subjects import CALIBRATION_IMAGES
from fastbyol.evaluation.tasks.job import Job
from fastbyol.evaluation.tasks.soundness import require_decodable

_SAMPLE_STREAM = 0x73616D70  # "samp" in ASCII, so that this permutation is independent of others with the same seed


def crop_and_flip(views: ViewPair, *, smallest: float = 0.08) -> ViewPair:
    """Returns the views with only random crops and flips: the paper's augmentation for training with labels (appendix C.1).

    smallest: crop, as a share of the image's area.
    """
    spec = ViewSpec(crop_area=(smallest, 1.0), crop_aspect=(3 / 4, 4 / 3), flip_p=0.5, jitter_p=0.0, gray_p=0.0, blur_p=0.0, solarize_p=0.0)
    return replace(views, view1=spec, view2=spec)


def divided_batch(global_batch: int, num_images: int, *, ranks: int) -> int:
    """Returns the images of a step: at most those that there are, and equally many on each rank; 0 where there are fewer images than ranks."""
    return min(global_batch, num_images) // ranks * ranks


def batch_notes(job: Job, global_batch: int, nums: Iterable[int]) -> list[str]:
    """Returns a sentence for each batch that the ranks don't divide, so that steps are smaller than those of one process.

    nums: numbers of images that were trained on.
    """
    ranks = job.process.world_size
    batches = dict.fromkeys((min(global_batch, num), divided_batch(global_batch, num, ranks=ranks)) for num in nums)
    return [
        f"note: a step had {taken:,} images, not {whole:,}, because that does not divide among {ranks} ranks: rates and steps are those of this batch"
        for whole, taken in batches
        if taken != whole
    ]


@dataclass(frozen=True)
class LabelledImages:
    """Labelled images of a data folder.

    train_path: for other loaders of the same images. train: all training images, centre-cropped; test: those that are scored once.
    labels: (num_train,) int64 class of each training image by index, numbered as class_names; -1: of no class.
    """

    train_path: str
    views: ViewPair
    train: ImageLoader
    test: ImageLoader
    labels: Indices
    class_names: tuple[str, ...]

    @property
    def labelled_rows(self) -> Indices:
        """(N,) indices of the training images that have a label."""
        return np.flatnonzero(self.labels >= 0)

    @property
    def test_labels(self) -> Indices:
        """(num_test,) class of each test image by index, as `labels`."""
        return renumbered(torch.from_numpy(self.test.labels), self.test.class_names, self.class_names).numpy()

    @property
    def test_rows(self) -> Indices:
        """(N,) indices of the test images that have a label."""
        return np.flatnonzero(self.test_labels >= 0)

    def label_of(self, loader_label: torch.Tensor, *, test: bool = False) -> torch.Tensor:
        """Returns labels of a batch of either loader as numbers of `class_names`."""
        return renumbered(loader_label, (self.test if test else self.train).class_names, self.class_names)

    def crops(self, job: Job, rows: Indices, *, global_batch: int, views: ViewPair, seed: int | None = None) -> CropLoader:
        """Returns a loader of random views of these training images, in this rank's share of a batch; a batch larger than the images is
        reduced to their number.
        """
        ranks = job.process.world_size
        batch = divided_batch(global_batch, len(rows), ranks=ranks)
        if not batch:
            raise UserError(f"--data {job.data}: {len(rows)} labelled training images are fewer than the {ranks} ranks")
        return build_crop_loader(
            self.train_path,
            views=views,
            seed=job.seed if seed is None else seed,
            global_batch=batch,
            rows=rows,
            rank=job.process.rank,
            world_size=ranks,
            device=job.process.device,
            workers=job.workers,
        )

    def require_decodable(self, job: Job, held_out: Indices) -> None:
        """Decodes the test images and these training images before the first training of the job; see `soundness.require_decodable`."""
        require_decodable(job, "images", ("val images", self.test, self.test_rows), ("held-out images", self.train, held_out))

    def sample(self, rows: Indices, *, seed: int = 0) -> torch.Tensor:
        """Returns a random sample of these training images, centre-cropped (N, 3, S, S): for the batch norms of an untrained encoder."""
        order = seeded_permutation(len(rows), _SAMPLE_STREAM, seed)
        chosen = rows[order[:CALIBRATION_IMAGES]]
        return torch.cat([batch.image for batch in self.train.batches_of(chosen)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.train.close()
        self.test.close()


def open_labelled(job: Job, views: ViewPair) -> LabelledImages:
    """Opens DIR/train and DIR/val of the job's data. Raises UserError if one is missing or has no labels, or fewer than two classes are in
    both.
    """
    train_path, test_path = split_paths(job.data)
    if not test_path:
        raise UserError(f"--data {job.data}: no val images; expected {job.data}/val or {job.data}/val.beton beside train")
    with ExitStack() as opened:
        train, test = (
            opened.enter_context(build_image_loader(path, views=views, batch=job.batch, workers=job.workers, option="--data"))
            for path in (train_path, test_path)
        )
        for name, loader in (("train", train), ("val", test)):
            if not loader.class_names or (loader.labels < 0).all():
                raise UserError(f"--data {job.data}: its {name} images have no labels, so there is nothing to score")
        for name, loader, other in (("train", train, test), ("val", test, train)):
            # A class left out would change the score without a word.
            if lacking := sorted(set(loader.class_names) - set(other.class_names)):
                raise UserError(
                    f"--data {job.data}: {len(lacking)} classes have images in {name} only, the first is {lacking[0]!r}; both need the same classes"
                )
        names = train.class_names
        if len(names) < 2:
            raise UserError(f"--data {job.data}: has only the class {''.join(names)!r}; at least two are needed")
        labels = renumbered(torch.from_numpy(train.labels), train.class_names, names).numpy()
        counts = np.bincount(labels[labels >= 0], minlength=len(names))
        if (counts == 0).any():
            empty = [name for name, count in zip(names, counts.tolist(), strict=True) if not count]
            raise UserError(f"--data {job.data}: no training image of the class {empty[0]!r} ({len(empty)} such classes)")
        opened.pop_all()
    return LabelledImages(train_path, views, train, test, labels, names)
