"""What both writers share: options, the summary of the images, progress, and an output that appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastbyol.config.errors import UserError, require_at_least
from fastbyol.data.encode import EncodedImage, default_processes, encode_in_order
from fastbyol.data.image_folder import ImageFolder
from fastbyol.data.manifest import Manifest, Shard, software_versions

_SECONDS_BETWEEN_LINES = 10.0


class ImageSummary:
    """Collects what the manifest says about the images."""

    def __init__(self) -> None:
        self._num = self._bytes = self._transcoded = 0
        self._sides: dict[str, list[int]] = {"height": [1 << 30, 0, 0], "width": [1 << 30, 0, 0]}

    def add(self, image: EncodedImage) -> None:
        self._num += 1
        self._bytes += len(image.jpeg)
        self._transcoded += image.transcoded
        for name, side in (("height", image.height), ("width", image.width)):
            low, total, high = self._sides[name]
            self._sides[name] = [min(low, side), total + side, max(high, side)]

    def as_dict(self) -> dict[str, float]:
        sides = {
            f"{name}_{which}": value
            for name, (low, total, high) in self._sides.items()
            for which, value in (("min", low), ("mean", round(total / self._num, 2)), ("max", high))
        }
        return sides | {"bytes": self._bytes, "transcoded": self._transcoded}


def encoded_samples(listing: ImageFolder, order: Iterable[int], *, workers: int, what: str) -> Iterator[tuple[int, EncodedImage]]:
    """(sample index, image) in the given order, encoded by worker processes (0: one per core), with progress shown."""
    require_at_least("workers", workers, 0)
    order = list(order)
    paths = [listing.path(index) for index in order]
    images = encode_in_order(paths, workers=min(workers or default_processes(), len(paths)))
    yield from zip(order, _with_progress(images, len(order), what), strict=True)


def make_manifest(kind: str, listing: ImageFolder, summary: ImageSummary, shards: list[Shard], settings: dict[str, int | str]) -> Manifest:
    """The manifest of a finished conversion."""
    counts = Counter(listing.labels)
    return Manifest(
        kind=kind,
        num_samples=len(listing.files),
        class_names=listing.class_names,
        class_counts=tuple(counts[label] for label in range(len(listing.class_names))),
        images=summary.as_dict(),
        settings=settings,
        source={"folder": str(listing.root), "listing_sha256": listing.digest()},
        shards=tuple(shards),
        software=software_versions(),
    )


@contextmanager
def appears_whole(out: Path, *, overwrite: bool, marker: str = "") -> Iterator[Path]:
    """Gives a temporary name beside `out`; on success what was written there takes the name `out`, on any failure it is removed.

    A folder is only ever replaced if it holds the file `marker`, which shows that it is ours. UserError if `out` exists and is not to be
    replaced, or its parent folder is missing.
    """
    if out.exists() and not overwrite:
        raise UserError(f"{out}: exists already; give another --out, or --overwrite to replace it")
    if out.is_dir() and not (marker and (out / marker).is_file()):
        raise UserError(f"{out}: is a folder that no conversion made, it will not be replaced; give another --out")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder to write {out.name} in; make it first")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_dir() and out.exists():  # a folder cannot be renamed onto one that is not empty
            _remove(out)
        os.replace(temporary, out)
        flush_to_disk(out.parent)
    finally:
        _remove(temporary)


def finished_shard(path: Path, *, name: str, samples: int) -> Shard:
    """The manifest's entry of a file that is complete."""
    with path.open("rb") as file:
        return Shard(name=name, samples=samples, bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def flush_to_disk(path: Path) -> None:
    """Forces a file, or a folder's list of names, to disk: a rename must not outrun the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _with_progress(images: Iterable[EncodedImage], total: int, what: str) -> Iterator[EncodedImage]:
    """Passes the images through: a moving bar on a terminal, a plain line now and then in a log."""
    yield from _with_bar(images, total, what) if sys.stderr.isatty() else _with_lines(images, total, what)


def _with_bar(images: Iterable[EncodedImage], total: int, what: str) -> Iterator[EncodedImage]:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{task.completed:,.0f} of {total:,} images, {task.speed or 0:,.0f} images/s")

    columns = (*Progress.get_default_columns()[:2], RateColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        for image in images:
            yield image
            progress.advance(task)


def _with_lines(images: Iterable[EncodedImage], total: int, what: str) -> Iterator[EncodedImage]:
    start = last = time.monotonic()
    for done, image in enumerate(images, start=1):
        yield image
        now = time.monotonic()
        if now - last >= _SECONDS_BETWEEN_LINES or done == total:
            rate = done / max(now - start, 1e-9)
            print(f"{what}: {done:,} of {total:,} images, {rate:,.0f} images/s, {(total - done) / rate:,.0f} s left", file=sys.stderr)
            last = now
