"""Writes the demo ImageFolder, train/ and val/ of JPEG files, with a pool of processes, under a temporary name that is then renamed."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from fastbyol.config.errors import UserError, require_at_least
from fastbyol.host.cores import default_workers
from fastbyol.host.progress import Progress

MANIFEST = "demo_data.json"
SPLITS = ("train", "val")
_PARTIAL = ".partial-"
JPEG_QUALITY = 92


@dataclass(frozen=True)
class DemoSettings:
    """Numbers of images per class, and the seed."""

    train_per_class: int = 1000
    val_per_class: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least("train-per-class", self.train_per_class, 1)
        require_at_least("val-per-class", self.val_per_class, 1)
        require_at_least("seed", self.seed, 0)

    def per_class(self, split: str) -> int:
        return self.train_per_class if split == "train" else self.val_per_class


class ClassWriter(Protocol):
    """Interface of a picklable piece of work for the pool: writes the images of one class in one split."""

    @property
    def num_images(self) -> int: ...

    def write(self, root: Path) -> None:
        """Writes the images to `root`/<split>/<class>/, and nothing outside `root`."""
        ...


def image_rng(seed: int, split: str, label: int, index: int) -> np.random.Generator:
    """Returns the random generator of one image. It does not depend on the number of images, and differs between train and val."""
    return np.random.default_rng([seed, SPLITS.index(split), label, index])


def save_jpeg(image: np.ndarray, path: Path) -> None:
    """Writes a uint8 (H, W, 3) image as JPEG without chroma subsampling, which would blur colours at these sizes."""
    Image.fromarray(image).save(path, quality=JPEG_QUALITY, subsampling=0)


def write_image_folder(out: Path, *, kind: str, class_writers: Sequence[ClassWriter], settings: DemoSettings, overwrite: bool) -> None:
    """Runs every class writer and moves the finished folder to `out`, with a manifest of its settings.

    Nothing appears at `out` before everything is written.

    Raises:
        UserError: `out` exists and may not be replaced, or can't be written.
    """
    total, workers = sum(writer.num_images for writer in class_writers), min(default_workers(), len(class_writers))
    with (
        _renamed_when_complete(out.resolve(), overwrite=overwrite) as folder,
        Progress(kind, total, unit="images") as progress,
        # spawn, because forking a process that already runs torch or BLAS threads may deadlock
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        # The largest first, so that the cores finish at about the same time.
        ordered = sorted(class_writers, key=lambda writer: writer.num_images, reverse=True)
        # The workers start here and inherit the blocked signal: only this process receives Ctrl-C, and then ends them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            pending = {pool.submit(writer.write, folder): writer.num_images for writer in ordered}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        try:
            for done in as_completed(pending):
                done.result()
                progress.advance(pending[done])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        (folder / MANIFEST).write_text(json.dumps({"kind": kind, **asdict(settings)}, indent=2) + "\n")


def check_output(out: Path, *, overwrite: bool) -> None:
    """Raises UserError if something is at `out` that may not be replaced."""
    if os.path.lexists(out) and not _is_unused(out):
        # A folder without our manifest is the user's own: no option may delete it.
        if not (out / MANIFEST).is_file():
            raise UserError(f"--out {out}: exists and was not made by demo_data.py; choose another folder")
        if not overwrite:
            raise UserError(f"--out {out}: exists already; add --overwrite to replace it, or choose another folder")


def _is_unused(out: Path) -> bool:
    """Returns True for an empty folder or a new volume, apart from what a killed run of ours has left."""
    return out.is_dir() and all(entry.name == "lost+found" or entry.name.startswith(_PARTIAL) for entry in out.iterdir())


@contextmanager
def _renamed_when_complete(out: Path, *, overwrite: bool) -> Iterator[Path]:
    unused = _is_unused(out)
    # Inside an existing folder, not beside it: it may be a mounted volume, and files cannot be renamed to another disk.
    partial = (out if unused else out.parent) / f"{_PARTIAL}{out.name}-{os.getpid()}"
    try:
        check_output(out, overwrite=overwrite)
        partial.mkdir(parents=True)
        yield partial
        if unused:
            for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == MANIFEST):
                entry.rename(out / entry.name)
            return
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise UserError(f"--out {out}: can't be written ({error.strerror or error}); choose a folder on a disk with room") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
