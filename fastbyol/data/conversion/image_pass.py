"""The main loop of both converters: one pass over the images in a given order, which can be resumed at any point with the same result."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.console import say
from fastbyol.config.errors import Lost, RunError, UserError
from fastbyol.data.conversion.encode import UNREACHABLE, UNREADABLE, DroppedImage, EncodedImage, Outcome
from fastbyol.data.conversion.encoding_pool import EncodingPool
from fastbyol.data.conversion.encoding_worker import Encoded
from fastbyol.data.conversion.estimate import estimate_conversion, require_space
from fastbyol.data.conversion.task import Task
from fastbyol.data.conversion.touched_images import TouchedImages, touched_line
from fastbyol.data.conversion.work_folder import WorkFolder
from fastbyol.host.progress import Progress
from fastbyol.host.quantities import bytes_text, duration_text
from fastbyol.host.signals import DeferredStop, OrderlyStop, Stopped

ROW = np.dtype(
    [("index", "<u8"), ("outcome", "u1"), ("mode", "u1"), ("has_icc", "u1"), ("shard", "<u4"), ("offset", "<u8"), ("size", "<u8"),
     ("crc32", "<u4"), ("height", "<u2"), ("width", "<u2"), ("source_bytes", "<u8")]
)  # fmt: skip
"""Record of one converted or dropped image: outcome and location. The file of rows has one per image, in the order of conversion."""
ROWS, TOUCHED = "rows", "touched.jsonl"
UNREADABLE_IN_A_ROW = 20
"""After this many consecutive files that cannot be read, the disk is assumed to be lost, and the conversion stops."""


class BadImage(RunError):
    """Raised, under --strict, for an image that cannot be kept."""

    exit_code = 1


class Output(ABC):
    """Interface of an output format, to which kept images are appended."""

    bytes_per_image: int
    """Approximate overhead per image, beside the image's own bytes."""

    @abstractmethod
    def resume(self, rows: NDArray[np.void]) -> None:
        """Continues after these rows, which an earlier run has written; with no rows, starts a new output."""

    @abstractmethod
    def add(self, index: int, label: int, image: EncodedImage) -> tuple[int, int]:
        """Stores an image; returns the number of its shard and the offset of its first byte there."""


def convert_images(task: Task, output: Output, work: WorkFolder, *, stop: DeferredStop) -> NDArray[np.void]:
    """Converts all images that an earlier run has not converted; returns the rows of all images.

    After any of these errors, the same call continues where it stopped.

    Raises:
        UserError: too little disk space, a full disk, a lost source disk, or workers that die repeatedly.
        BadImage: under `strict`, the first image that cannot be kept.
        Lost: a store of the images no longer answers.
        Stopped: a signal arrived.
    """
    total = len(task.order)
    rows = _rows_before(task, work)
    output.resume(rows)
    if work.done < total:
        with EncodingPool(task.options.encode, workers=task.workers, stop=stop) as pool:
            remaining = task.order[work.done :]
            estimate = estimate_conversion(pool, remaining, task.sizes, job=task.job, bytes_per_image=output.bytes_per_image)
            share = len(estimate.dropped) / estimate.sampled
            # Fail now rather than after hours: most of the sample cannot be kept, which is more than may be dropped.
            if not task.options.strict and share > 0.5 and share * estimate.images > task.options.dropped_allowed(total):
                raise UserError(
                    f"{task.listing.root}: {len(estimate.dropped)} of a sample of {estimate.sampled} images cannot be kept, the first "
                    f"{estimate.dropped[0]}; are these the images and settings that you want? --max-dropped 1 converts the others"
                )
            free = require_space(work.path.parent, estimate)
            needs = f"about {bytes_text(estimate.bytes)} and {duration_text(estimate.seconds)}"
            many = "worker process" if task.workers == 1 else "worker processes"
            told = f"{estimate.images:,} images to go: {needs} with {task.workers} {many}; {bytes_text(free)} are free"
            say(f"{task.out.name}: {told}", file=sys.stderr)
            with stop.deferred(), Progress(task.out.name, total, unit="images", done=work.done) as progress:
                _Pass(task, output, work, progress).run(pool)
    task.listing.require_unchanged()
    return np.fromfile(work.path / ROWS, dtype=ROW)


class _Pass:
    """The loop over the images, which also records what happened to each."""

    def __init__(self, task: Task, output: Output, work: WorkFolder, progress: Progress) -> None:
        self._task, self._output, self._work, self._progress = task, output, work, progress
        self._rows, self._touched = work.open(ROWS), work.open(TOUCHED)
        self._done = work.done
        self._unreadable = 0

    def run(self, pool: EncodingPool) -> None:
        total = len(self._task.order)
        indices = self._task.order[self._done :].tolist()
        try:
            for index, encoded in zip(indices, pool.encode(map(self._task.job, indices)), strict=True):
                self._take(index, encoded)
                if not self._unreadable:  # don't save images as dropped if the disk may be lost: the next run retries them
                    self._work.flush_due(self._done)
        except Stopped as stopped:
            if isinstance(stopped, OrderlyStop):
                self._keep()
            message = f"{self._task.out}: stopped at {self._done:,} of {total:,} images; the same command continues"
            raise Stopped(stopped.signal_number, message) from None
        except (UserError, BadImage, Lost):
            self._keep()
            raise
        self._work.flush(self._done)

    def _keep(self) -> None:
        """Saves the images done since the last saved point, if there are any."""
        if self._done > self._work.done and not self._unreadable:
            self._work.flush(self._done)

    def _take(self, index: int, encoded: Encoded) -> None:
        if isinstance(encoded, DroppedImage):
            if encoded.reason == UNREACHABLE:
                raise Lost(f"{self._task.out}: stopped at {self._done:,} of {len(self._task.order):,} images: {encoded.detail}")
            name, told = self._task.listing.files[index], f"{encoded.reason} ({encoded.detail})"
            if self._task.options.strict:
                raise BadImage(f"{name}: {told}; repair or remove it, or omit --strict to drop it")
            self._unreadable = self._unreadable + 1 if encoded.reason == UNREADABLE else 0
            if self._unreadable >= UNREADABLE_IN_A_ROW:
                raise UserError(
                    f"{self._task.listing.root}: {self._unreadable} files in a row cannot be read, the last {name} ({encoded.detail}); is the "
                    "disk still there? The same command tries them again"
                )
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

    def _note(self, index: int, outcome: str, reason: str, detail: str) -> None:
        self._touched.write(touched_line(index, outcome, reason, detail))


def _rows_before(task: Task, work: WorkFolder) -> NDArray[np.void]:
    """Returns the rows of an earlier run. Raises UserError if its images have changed since."""
    path = work.path / ROWS
    rows = np.fromfile(path, dtype=ROW) if path.exists() else np.zeros(0, dtype=ROW)
    if len(rows) != work.done or (rows["index"] != task.order[: len(rows)]).any():
        raise UserError(f"{work.path}: its records contradict each other; start again with --restart")
    changed = np.flatnonzero((rows["source_bytes"] != task.sizes[rows["index"].astype(np.int64)]) & (rows["source_bytes"] > 0))
    if len(changed):
        name = task.listing.files[int(rows["index"][changed[0]])]
        raise UserError(f"{name}: has changed since the unfinished conversion in {work.path} read it; start again with --restart")
    return rows


def kept_rows(rows: NDArray[np.void]) -> NDArray[np.void]:
    """Returns the rows of the images that were not dropped."""
    return rows[rows["outcome"] != Outcome.DROPPED]


def touched_images(task: Task, work: WorkFolder) -> TouchedImages:
    """Returns the notes on images that were transcoded, dropped or unusual. Raises UserError if their file is damaged."""
    return TouchedImages({work.path / TOUCHED: "start again with --restart"}, images=len(task.listing.files))
