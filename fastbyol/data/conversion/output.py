"""Paths of an unfinished output, and its move to its final name. An existing output is replaced only when the new one is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastbyol.config.errors import UserError
from fastbyol.data.conversion.work_folder import COMPLETE, empty_into, is_full
from fastbyol.host.durable_files import flush_to_disk

_INSIDE = ".partial"
"""Name of the work folder inside an output folder that existed before."""


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Context manager that turns an OSError into a UserError."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if is_full(error) else error.strerror or str(error)
        at = f" at {error.filename}" if error.filename else ""
        raise UserError(f"{out}: not finished: {reason}{at}; once that is fixed, the same command continues") from error


def require_free_name(out: Path, *, overwrite: str, marker: str = "") -> None:
    """Raises UserError if `out` exists and may not be replaced, is a folder without the file `marker`, or has no parent folder.

    marker: for an output that is a folder, the name of a file by which ours are recognised. An empty folder is accepted too.
    """
    if marker and _is_unused(out):
        return
    if out.is_dir() and not (marker and (out / marker).is_file()):
        raise UserError(f"{out}: is a folder that no conversion made, it will not be replaced; give another --out")
    if out.exists() and overwrite != "replace":
        raise UserError(f"{out}: exists already; give another --out, or --overwrite to replace it")
    if out.is_mount():
        raise UserError(f"{out}: is a mounted volume, which cannot be replaced as a whole; empty it first, or give a folder in it")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder to write {out.name} in; make it first")


def _is_unused(folder: Path) -> bool:
    """Returns True if the folder has no files of the user: it is empty, a new volume, or only has an unfinished conversion."""
    return folder.is_dir() and {entry.name for entry in folder.iterdir()} <= {"lost+found", _INSIDE}


def work_path(out: Path) -> Path:
    """Returns the work folder for `out`: beside it, or inside it if it is an existing folder, which may be on another disk."""
    return out / _INSIDE if _is_unused(out) or (out / _INSIDE).is_dir() else out.with_name(f".{out.name}.partial")


def put_in_place(new: Path, out: Path) -> None:
    """Moves a complete file or folder to its final name. An old output stays intact until the new one is there, and is removed only then.

    If the work folder is inside `out`, the files are moved one by one into `out`.
    """
    if new.is_dir() and new.parent.parent == out:
        os.replace(new, new.with_name(COMPLETE))
        flush_to_disk(new.parent)
        empty_into(new.with_name(COMPLETE), out)
        return
    old = out.with_name(f".{out.name}.replaced")
    if new.is_dir() and out.exists():  # a folder cannot be renamed onto one that is not empty
        shutil.rmtree(old, ignore_errors=True)  # left by a run that was killed before it removed this
        os.replace(out, old)
    os.replace(new, out)
    flush_to_disk(out.parent)
    if old.is_dir():
        shutil.rmtree(old)
