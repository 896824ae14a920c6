"""What both converters share: one pass over the images in a given order, resumable at any point, whose result depends on nothing else."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.console import say
from fastbyol.config.errors import RunError, UserError
from fastbyol.config.interrupts import Stopped
from fastbyol.data.conversion.encode import UNREADABLE, DroppedImage, EncodedImage, Outcome
from fastbyol.data.conversion.encoding_pool import EncodingPool
from fastbyol.data.conversion.encoding_worker import Encoded
from fastbyol.data.conversion.estimate import Estimate, estimate_conversion, require_space
from fastbyol.data.conversion.stop_signals import OrderlyStop, StopRequest
from fastbyol.data.conversion.task import Task
from fastbyol.data.conversion.work_folder import WorkFolder
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
UNREADABLE_IN_A_ROW = 20
"""So many files that cannot be read are a lost disk, not bad images."""


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
            say(f"{task.out.name}: {estimate.text(workers=task.workers, free_bytes=free)}", file=sys.stderr)
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
    try:
        return [json.loads(line) for line in (work.path / TOUCHED).read_text(encoding="ascii").splitlines()]
    except ValueError as error:
        raise UserError(f"{work.path / TOUCHED}: damaged ({error}); begin anew with --restart") from error
