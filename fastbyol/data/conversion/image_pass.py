"""What both converters share: one pass over the images in a given order, resumable at any point, whose result depends on nothing else."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import RunError, UserError, require, require_at_least, require_choice
from fastbyol.config.interrupts import Stopped
from fastbyol.data.conversion.encode import UNREADABLE, DroppedImage, EncodedImage, EncodeSettings, Outcome, find_turbojpeg
from fastbyol.data.conversion.encoding_pool import EncodingPool, default_workers
from fastbyol.data.conversion.encoding_worker import Encoded, Job
from fastbyol.data.conversion.estimate import Estimate, estimate_conversion, require_space
from fastbyol.data.conversion.report import make_report, report_text
from fastbyol.data.conversion.stop_signals import OrderlyStop, StopRequest
from fastbyol.data.conversion.work_folder import UNFINISHED, WorkFolder, write_durably
from fastbyol.data.inputs.images import list_images
from fastbyol.data.inputs.listing import ImageListing
from fastbyol.data.manifest import Manifest, Shard, software_versions
from fastbyol.data.progress import Progress

ROW = np.dtype(
    [
        ("index", "<u8"),
        ("outcome", "u1"),
        ("mode", "u1"),
        ("has_icc", "u1"),
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("crc32", "<u4"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("source_bytes", "<u8"),
    ]
)
"""One per image of the listing, in the order of conversion, dropped ones too: what became of it, and where it lies."""
ROWS, TOUCHED = "rows", "touched.jsonl"
DROPPED_ALLOWED, DROPPED_SHARE_ALLOWED = 20, 0.01
UNREADABLE_IN_A_ROW = 20
"""So many files that cannot be read are a lost disk, not bad images."""


Images = Path | ImageListing | Callable[[], ImageListing]
"""What is converted: a folder or tar, its listing, or what makes the listing when all else has been found in order."""


@dataclass(frozen=True)
class ConversionOptions:
    """How to convert. Only `encode` has an influence on the result."""

    encode: EncodeSettings = field(default_factory=EncodeSettings)
    strict: bool = False
    """Stop at the first image that cannot be kept."""
    max_dropped: float | None = None
    """Largest share of images that may be dropped; 1: any, and classes may lose all of theirs. None: 1 %, or 20 images if that is more."""
    unfinished: str = "continue"
    """What to do about an unfinished conversion to the same output: 'continue' if there is one, 'require' one, or 'restart' without it."""
    flush_every_s: float = 10.0
    """What is converted is put on disk so often: a crash costs at most as much work."""

    def __post_init__(self) -> None:
        if self.max_dropped is not None:
            require(0.0 <= self.max_dropped <= 1.0, "max-dropped", self.max_dropped, "a share in [0, 1]")
        require_choice("unfinished", self.unfinished, UNFINISHED)
        require_at_least("flush-every", self.flush_every_s, 0.0)

    def dropped_allowed(self, images: int) -> int:
        """How many of them."""
        if self.max_dropped is None:
            return max(DROPPED_ALLOWED, int(DROPPED_SHARE_ALLOWED * images))
        return math.floor(self.max_dropped * images + 1e-6)


class BadImage(RunError):
    """An image cannot be kept, and the user wants none dropped."""

    exit_code = 1


class Output(ABC):
    """Where kept images go, one after another."""

    bytes_per_image: int
    """Beside the image itself, about."""

    @abstractmethod
    def resume(self, rows: NDArray[np.void]) -> None:
        """Goes on after these rows, which a former run has written; without any, begins."""

    @abstractmethod
    def add(self, index: int, label: int, image: EncodedImage) -> tuple[int, int]:
        """Stores an image; gives its shard and its first byte there."""


@dataclass(frozen=True)
class Task:
    """What is to be converted."""

    listing: ImageListing
    order: NDArray[np.int64]
    """Positions in the listing."""
    sizes: NDArray[np.int64]
    """Bytes of every file of the listing."""
    listing_sha256: str
    out: Path
    options: ConversionOptions
    workers: int

    def job(self, index: int) -> Job:
        return Job(index, self.listing.location(index))

    def with_largest(self, stored_bytes: int) -> Task:
        """The task for an output that takes no larger image."""
        encode = replace(self.options.encode, max_stored_bytes=stored_bytes)
        return replace(self, options=replace(self.options, encode=encode))


def as_listing(data: Images) -> ImageListing:
    """The listing, made if it is not there yet."""
    if isinstance(data, Path):
        return list_images(data)
    return data if isinstance(data, ImageListing) else data()


def make_task(listing: ImageListing, *, order: NDArray[np.int64], out: Path, options: ConversionOptions, workers: int) -> Task:
    """workers: processes; 0: one per core."""
    require_at_least("workers", workers, 0)
    sizes = np.array([listing.num_bytes(index) for index in range(len(listing.files))], dtype=np.int64)
    return Task(listing, order, sizes, listing.digest(), out, options, min(workers or default_workers(), len(order)))


def open_work(path: Path, task: Task, *, kind: str, settings: Mapping[str, Any]) -> WorkFolder:
    """The folder in which the output grows. Its identity is all that the result depends on."""
    names = chain(task.listing.class_names, task.listing.files, map(str, task.listing.labels))
    identity = {"kind": kind, "images": len(task.listing.files), "names_and_labels": names_digest(names), **settings, **software_versions()}
    options = task.options
    return WorkFolder(path, output=task.out, identity=identity, unfinished=options.unfinished, flush_every_s=options.flush_every_s)


def encode_settings_as_plain(settings: EncodeSettings) -> dict[str, int | str | float]:
    """For the manifest: what differs from plain pass-through, and always the quality of what is transcoded."""
    plain: dict[str, int | str | float] = {
        "transcode_quality": settings.quality,
        "exif": settings.exif,
        "max_pixels": settings.max_pixels,
        "checked_by": "TurboJPEG" if find_turbojpeg() else "Pillow",
    }
    if settings.max_side_px is not None:
        plain["max_side_px"] = settings.max_side_px
    if settings.raw_fraction:
        plain["raw_fraction"] = settings.raw_fraction
    return plain


def convert_images(task: Task, output: Output, work: WorkFolder, *, stop: StopRequest) -> NDArray[np.void]:
    """Brings the output to its last image, from wherever a former run left it; gives all rows.

    Raises:
        UserError: not enough room, a full disk, a lost source, workers that die again and again.
        BadImage: under `strict`, the first image that cannot be kept.
        Stopped: by a signal. After this and all errors the same call continues.
    """
    total = len(task.order)
    rows = _rows_before(task, work)
    output.resume(rows)
    if work.done < total:
        with EncodingPool(task.options.encode, workers=task.workers, stop=stop) as pool:
            remaining = task.order[work.done :]
            estimate = estimate_conversion(pool, remaining, task.sizes, job=task.job, bytes_per_image=output.bytes_per_image)
            _refuse_lost_cause(task, estimate)
            free = require_space(work.path.parent, estimate)
            print(f"{task.out.name}: {estimate.text(workers=task.workers, free_bytes=free)}", file=sys.stderr, flush=True)
            with stop.deferred(), Progress(task.out.name, total, unit="images", done=work.done) as progress:
                _Pass(task, output, work, progress).run(pool)
    return np.fromfile(work.path / ROWS, dtype=ROW)


def _refuse_lost_cause(task: Task, estimate: Estimate) -> None:
    """UserError if most of the sample cannot be kept, where not so many may be dropped: better now than after hours."""
    share = len(estimate.dropped) / estimate.sampled
    if task.options.strict or share <= 0.5 or share * estimate.images <= task.options.dropped_allowed(len(task.order)):
        return
    raise UserError(
        f"{task.listing.root}: {len(estimate.dropped)} of a sample of {estimate.sampled} images cannot be kept, the first {estimate.dropped[0]}; "
        "are these the images and settings that you want? --max-dropped 1 converts the others"
    )


class _Pass:
    """The loop over the images, with what it writes down about each."""

    def __init__(self, task: Task, output: Output, work: WorkFolder, progress: Progress) -> None:
        self._task, self._output, self._work, self._progress = task, output, work, progress
        self._rows = work.open(ROWS, size=work.done * ROW.itemsize)
        self._touched = work.open(TOUCHED, size=work.size_of(TOUCHED))
        self._done = work.done
        self._unreadable = 0

    def run(self, pool: EncodingPool) -> None:
        total = len(self._task.order)
        indices = self._task.order[self._done :].tolist()
        try:
            for index, encoded in zip(indices, pool.encode(map(self._task.job, indices)), strict=True):
                self._take(index, encoded)
                if not self._unreadable:  # what a lost disk did is not for keeps
                    self._work.flush_due(self._done)
        except Stopped as stopped:
            if isinstance(stopped, OrderlyStop):
                self._keep()
            message = f"{self._task.out}: stopped at {self._done:,} of {total:,} images; the same command continues"
            raise Stopped(stopped.signal_number, message) from None
        except (UserError, BadImage):
            self._keep()
            raise
        self._work.flush(self._done)

    def _keep(self) -> None:
        """Puts on disk what was done, if anything was."""
        if self._done > self._work.done and not self._unreadable:
            self._work.flush(self._done)

    def _take(self, index: int, encoded: Encoded) -> None:
        if isinstance(encoded, DroppedImage):
            self._refuse_drop(index, encoded)
            row = (index, Outcome.DROPPED, 0, 0, 0, 0, 0, 0, 0, 0, encoded.source_bytes)
            self._note(index, "dropped", encoded.reason, encoded.detail)
            size = 0
        else:
            self._unreadable = 0
            shard, offset = self._output.add(index, self._task.listing.labels[index], encoded)
            size = len(encoded.data)
            place = (encoded.outcome, encoded.mode, encoded.has_icc, shard, offset, size)
            row = (index, *place, encoded.crc32, encoded.height, encoded.width, encoded.source_bytes)
            if encoded.reason:
                self._note(index, "transcoded", encoded.reason, "")
            for what, detail in encoded.notes:
                self._note(index, "noted", what, detail)
        self._rows.write(np.array([row], dtype=ROW).tobytes())
        self._done += 1
        self._progress.advance(stored_bytes=size, dropped=int(isinstance(encoded, DroppedImage)))

    def _refuse_drop(self, index: int, dropped: DroppedImage) -> None:
        name = self._task.listing.files[index]
        if self._task.options.strict:
            raise BadImage(f"{name}: {dropped.reason} ({dropped.detail}); mend or remove it, or go on without --strict, which drops it")
        self._unreadable = self._unreadable + 1 if dropped.reason == UNREADABLE else 0
        if self._unreadable >= UNREADABLE_IN_A_ROW:
            raise UserError(
                f"{self._task.listing.root}: {self._unreadable} files in a row cannot be read, the last {name} ({dropped.detail}); is the "
                "disk still there? The same command tries them again"
            )

    def _note(self, index: int, outcome: str, reason: str, detail: str) -> None:
        self._touched.write((json.dumps({"index": index, "outcome": outcome, "reason": reason, "detail": detail}) + "\n").encode())


def _rows_before(task: Task, work: WorkFolder) -> NDArray[np.void]:
    """What a former run has done; UserError if the images that it took have changed since."""
    path = work.path / ROWS
    rows = np.fromfile(path, dtype=ROW) if path.exists() else np.zeros(0, dtype=ROW)
    if len(rows) != work.done or (rows["index"] != task.order[: len(rows)]).any():
        raise UserError(f"{work.path}: its records do not fit together; begin anew with --restart")
    changed = np.flatnonzero((rows["source_bytes"] != task.sizes[rows["index"].astype(np.int64)]) & (rows["source_bytes"] > 0))
    if len(changed):
        name = task.listing.files[int(rows["index"][changed[0]])]
        raise UserError(f"{name}: has changed since the unfinished conversion in {work.path} took it; begin anew with --restart")
    return rows


def touched_images(work: WorkFolder) -> list[dict[str, Any]]:
    """What was noted of each image that was not simply passed through, in the order of conversion."""
    return [json.loads(line) for line in (work.path / TOUCHED).read_text(encoding="ascii").splitlines()]


def finish_report(task: Task, rows: NDArray[np.void], work: WorkFolder) -> Path:
    """The report, written in the work folder. UserError if too many images were dropped: what is converted stays, and so does the report."""
    path = work.path / "report.json"
    report = make_report(task.listing, rows, touched_images(work))
    write_durably(path, report_text(report))
    require_few_dropped(task, rows, report=path)
    return path


def require_few_dropped(task: Task, rows: NDArray[np.void], *, report: Path) -> None:
    """UserError if too many images were dropped, or all of a class. What is converted is left for a run that allows it."""
    allowed = task.options.dropped_allowed(len(rows))
    dropped = int((rows["outcome"] == Outcome.DROPPED).sum())
    advice = f"{report} names them. Nothing is lost: mend the images and begin anew with --restart, or allow it with"
    if dropped == len(rows):
        raise UserError(f"{task.listing.root}: none of the {len(rows):,} images can be kept; {report} says why")
    if dropped > allowed:
        raise UserError(
            f"{dropped:,} of {len(rows):,} images were dropped, {allowed:,} may be; {advice} --max-dropped {_share(dropped, len(rows))}"
        )
    lost = Counter(task.listing.labels).keys() - _class_counts(task.listing, rows).keys()
    if lost and task.options.max_dropped != 1 and len(rows) == len(task.listing.files):
        raise UserError(f"class {task.listing.class_names[min(lost)]} lost all of its images; {advice} --max-dropped 1")


def names_digest(names: Iterable[str]) -> str:
    """sha256 of the names in order, each ended by a zero byte."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


def _share(part: int, whole: int) -> str:
    """As a decimal that is not below the exact share."""
    return f"{math.ceil(1e4 * part / whole) / 1e4:g}"


def make_manifest(kind: str, task: Task, rows: NDArray[np.void], shards: list[Shard], settings: Mapping[str, Any]) -> Manifest:
    """The manifest of a finished conversion; rows: in the order of the samples."""
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
