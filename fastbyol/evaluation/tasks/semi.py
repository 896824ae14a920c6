"""Semi-supervised learning: the whole network fine-tuned with a fraction of the labels (section 4, tables 2 and 8; appendix C.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastbyol.config.errors import UserError, require
from fastbyol.data.backends.source import Indices
from fastbyol.data.inputs.listing import ImageListing
from fastbyol.data.inputs.subset import draw_fraction, list_digest, read_subset, restrict
from fastbyol.evaluation.result_file import TaskResult
from fastbyol.evaluation.tasks.finetune import QUICK, FinetuneSettings, LabelledPart, plan_parts, tune_parts
from fastbyol.evaluation.tasks.images import LabelledImages
from fastbyol.evaluation.tasks.job import Job
from fastbyol.evaluation.tasks.registry import Task

SIZE_TOLERANCE = 0.2
"""A list may have so much more or fewer images than its share of the data: SimCLR's of 1 % has 12,811, one less than 1 %."""


@dataclass(frozen=True)
class SemiSettings(FinetuneSettings):
    """Which labels are used, and how the network is fine-tuned with them; the defaults are the paper's (appendix C.1)."""

    fractions: tuple[float, ...] = (0.01, 0.1)
    """Shares of the labels to train with, separately for each share; 1: all labels."""
    lists: tuple[str, ...] = ()
    """Which images have labels: a folder with 1percent.txt and 10percent.txt, as SimCLR published them, or a list of names for each of
    --fractions below 1, separated by commas (default: a class-balanced choice by --seed, as python -m fastbyol subset makes it).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        fractions = self.fractions
        require(len(fractions) > 0 and len(set(fractions)) == len(fractions), "fractions", fractions, "one or several different shares")
        for fraction in fractions:
            require(0 < fraction <= 1, "fractions", fraction, "in (0, 1]")

    def without_effect(self, encoders: Sequence[str]) -> dict[str, str]:
        """Returns why each option that these settings don't use has no effect."""
        lists = {"lists": "on all labels: give a share below 1 in --fractions"} if min(self.fractions) == 1 else {}
        return super().without_effect(encoders) | lists

    def contents(self) -> dict[str, list[str]]:
        """Returns a digest of each list; {} without --lists."""
        digests = [list_digest(file) for file in lists_for(self).values()]
        return {"lists_sha256": digests} if digests else {}


def labelled_parts(job: Job, settings: SemiSettings, images: LabelledImages) -> list[LabelledPart]:
    """Returns the images of each fraction, from the lists or, without, chosen at random. Raises UserError for a list that does not fit the
    data, and for a class without an image.
    """
    # The names of images without a label (-1) count when a list is matched.
    listing = ImageListing(
        root=Path(images.train_path),
        class_names=images.class_names,
        files=tuple(images.train.image_names()),
        labels=tuple(images.labels.tolist()),
    )
    labelled = listing.restricted(images.labelled_rows.tolist())
    row_of = {name: row for row, name in enumerate(listing.files)}
    lists, parts = lists_for(settings), []
    for fraction in settings.fractions:
        file = lists.get(fraction)
        chosen = _listed(job, file, listing, fraction) if file else draw_fraction(labelled, fraction, seed=job.seed)
        rows = np.sort(np.array([row_of[name] for name in chosen.files], dtype=np.int64))
        _require_every_class(rows, images, fraction, file)
        parts.append(LabelledPart(percent(fraction), fraction, rows))
    return parts


def percent(fraction: float) -> str:
    return f"{100 * fraction:g} %"


def lists_for(settings: SemiSettings) -> dict[float, Path]:
    """Returns the file of names for each fraction below 1; none without --lists. Raises UserError if a file is missing or one too many."""
    wanted, given = [fraction for fraction in settings.fractions if fraction < 1], [Path(text).expanduser() for text in settings.lists]
    if not given:
        return {}
    if len(given) == 1 and given[0].is_dir():
        given = [given[0] / f"{100 * fraction:g}percent.txt" for fraction in wanted]
    typed = f"--lists {','.join(settings.lists)}"
    for file in given:
        if not file.is_file():
            raise UserError(f"{typed}: no such file: {file}")
    if len(given) != len(wanted):
        raise UserError(
            f"{typed}: {len(given)} given where {len(wanted)} are wanted ({', '.join(map(percent, wanted))}); give one for each fraction, "
            "or a folder that holds 1percent.txt and so on"
        )
    return dict(zip(wanted, given, strict=True))


def _listed(job: Job, file: Path, listing: ImageListing, fraction: float) -> ImageListing:
    """Returns the labelled images that a list names. Raises UserError if a name is none of the images, or there are too many or too few for
    the fraction.
    """
    names = read_subset(file)
    try:
        named = restrict(listing, names, source=file)
    except UserError as error:
        hint = (
            "; a .beton and tar shards keep no names: evaluate the folder that they were made from" if listing.files[0].isdecimal() else ""
        )
        raise UserError(f"--lists {error}{hint}") from error
    chosen = named.restricted(np.flatnonzero(np.array(named.labels) >= 0).tolist())
    if left_out := len(named.files) - len(chosen.files):
        job.announce(f"{file}: {left_out:,} of its {len(named.files):,} images are left out: they have no label")
    available = sum(label >= 0 for label in listing.labels)
    if abs(len(chosen.files) - fraction * available) > max(SIZE_TOLERANCE * fraction * available, len(listing.class_names)):
        raise UserError(
            f"--lists {file}: names {len(chosen.files):,} of {available:,} labelled training images, which is not {percent(fraction)}; "
            "give the lists in the order of --fractions"
        )
    return chosen


def _require_every_class(rows: Indices, images: LabelledImages, fraction: float, file: Path | None) -> None:
    counts = np.bincount(images.labels[rows], minlength=len(images.class_names))
    if empty := [name for name, count in zip(images.class_names, counts.tolist(), strict=True) if not count]:
        source = f"--lists {file}" if file else f"--fractions {fraction:g}"
        raise UserError(
            f"{source}: no image of the class {empty[0]!r} ({len(empty)} such classes); a classifier needs at least one of each, take another list"
        )


def _run(job: Job, settings: SemiSettings) -> TaskResult:
    return tune_parts(job, settings, lambda images: labelled_parts(job, settings, images))


def _plan(job: Job, settings: SemiSettings) -> list[str]:
    return plan_parts(job, settings, lambda images: labelled_parts(job, settings, images))


TASKS = {
    "semi": Task(
        title="semi-supervised",
        what="the whole network fine-tuned with 1 % and 10 % of the labels",
        versions={"paper": SemiSettings(), "quick": SemiSettings(epochs=(15,), **QUICK)},
        run=_run,
        plan=_plan,
    )
}
