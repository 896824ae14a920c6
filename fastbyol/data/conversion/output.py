"""Where an output grows, and how it takes its name: nothing is replaced before what comes in its place is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastbyol.config.errors import UserError
from fastbyol.data.conversion.work_folder import flush_to_disk, is_full


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """What the system refuses becomes a UserError."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if is_full(error) else error.strerror or str(error)
        at = f" at {error.filename}" if error.filename else ""
        raise UserError(f"{out}: not finished: {reason}{at}; when that is mended the same command continues") from error


def require_free_name(out: Path, *, overwrite: str, marker: str = "") -> None:
    """UserError if `out` exists and is not to be replaced, is a folder without the file `marker`, or has no parent folder."""
    if out.exists() and overwrite != "replace":
        raise UserError(f"{out}: exists already; give another --out, or --overwrite to replace it")
    if out.is_dir() and not (marker and (out / marker).is_file()):
        raise UserError(f"{out}: is a folder that no conversion made, it will not be replaced; give another --out")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder to write {out.name} in; make it first")


def work_path(out: Path) -> Path:
    """Where the conversion to `out` grows."""
    return out.with_name(f".{out.name}.partial")


def put_in_place(new: Path, out: Path) -> None:
    """Gives a complete file or folder its name. What had it before is whole until the new one is there, and removed only then."""
    old = out.with_name(f".{out.name}.replaced")
    if new.is_dir() and out.exists():  # a folder cannot be renamed onto one that is not empty
        shutil.rmtree(old, ignore_errors=True)  # of a former run that was killed just before it had removed this
        os.replace(out, old)
    os.replace(new, out)
    flush_to_disk(out.parent)
    if old.is_dir():
        shutil.rmtree(old)
