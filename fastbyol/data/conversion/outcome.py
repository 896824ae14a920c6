"""The end of a conversion: checks that not too many images were dropped, and makes report and manifest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.data.conversion.encode import Outcome
from fastbyol.data.conversion.image_pass import touched_images
from fastbyol.data.conversion.report import make_report, report_text
from fastbyol.data.conversion.task import Task
from fastbyol.data.conversion.work_folder import WorkFolder
from fastbyol.data.formats.manifest import Manifest, Shard, software_versions
from fastbyol.data.inputs.listing import ImageListing, names_digest
from fastbyol.host.durable_files import write_durably


def finish_report(task: Task, rows: NDArray[np.void], work: WorkFolder) -> Path:
    """Writes the report to the work folder and returns its path. Raises UserError if too many images were dropped; report and data are kept."""
    path = work.path / "report.json"
    report = make_report(task.listing, rows, touched_images(work))
    write_durably(path, report_text(report))
    require_few_dropped(task, rows, report=path)
    return path


def require_few_dropped(task: Task, rows: NDArray[np.void], *, report: Path) -> None:
    """Raises UserError if too many images were dropped, or all images of a class. The converted data is kept for a run that allows it."""
    allowed = task.options.dropped_allowed(len(rows))
    dropped = int((rows["outcome"] == Outcome.DROPPED).sum())
    advice = f"{report} names them. Nothing is lost: fix the images and start again with --restart, or allow it with"
    if dropped == len(rows):
        raise UserError(f"{task.listing.root}: none of the {len(rows):,} images can be kept; {report} says why")
    if dropped > allowed:
        raise UserError(
            f"{dropped:,} of {len(rows):,} images were dropped, {allowed:,} may be; {advice} --max-dropped {_share(dropped, len(rows))}"
        )
    lost = Counter(task.listing.labels).keys() - _class_counts(task.listing, rows).keys()
    if lost and task.options.max_dropped != 1 and len(rows) == len(task.listing.files):
        raise UserError(f"class {task.listing.class_names[min(lost)]} lost all of its images; {advice} --max-dropped 1")


def _share(part: int, whole: int) -> str:
    """Returns the share as a decimal number, rounded up, so that it works as a value of --max-dropped."""
    return f"{math.ceil(1e4 * part / whole) / 1e4:g}"


def make_manifest(kind: str, task: Task, rows: NDArray[np.void], shards: list[Shard], settings: Mapping[str, Any]) -> Manifest:
    """Returns the manifest of a finished conversion. rows: one per image, in sample order."""
    listing = task.listing
    kept = rows[rows["outcome"] != Outcome.DROPPED]
    counts = _class_counts(listing, rows)
    return Manifest(
        kind=kind,
        num_samples=len(kept),
        class_names=listing.class_names,
        class_counts=tuple(counts[label] for label in range(len(listing.class_names))),
        images=_summary(kept),
        settings=dict(settings),
        source={"folder": str(listing.root), "listing_sha256": task.listing_sha256},
        shards=tuple(shards),
        software=software_versions(),
        dropped=tuple(sorted(rows["index"][rows["outcome"] == Outcome.DROPPED].tolist())),
        names_sha256=names_digest(listing.files[index] for index in kept["index"].tolist()),
    )


def _class_counts(listing: ImageListing, rows: NDArray[np.void]) -> Counter[int]:
    return Counter(listing.labels[index] for index in rows["index"][rows["outcome"] != Outcome.DROPPED].tolist())


def _summary(kept: NDArray[np.void]) -> dict[str, float]:
    sides: dict[str, float] = {}
    for name in ("height", "width"):
        side = kept[name].astype(np.int64)
        sides |= {f"{name}_min": int(side.min()), f"{name}_mean": round(float(side.mean()), 2), f"{name}_max": int(side.max())}
    return sides | {"bytes": int(kept["size"].sum()), "transcoded": int((kept["outcome"] == Outcome.TRANSCODED).sum())}
