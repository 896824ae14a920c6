"""Outputs for a URL: made in a folder of this machine, uploaded when they are complete, compared, and only then removed here.

A command that was stopped, while it made the output or while it uploaded it, goes on when it is repeated.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from fastbyol.config.errors import UserError, first_line, shown
from fastbyol.host.cache_files import cache_folder
from fastbyol.host.durable_files import locked_file, write_durably
from fastbyol.host.progress import Progress
from fastbyol.host.store_path import StorePath
from fastbyol.host.stores import Absent, retried

_SETTINGS, _MADE, _LOCK = ".settings.json", ".made.json", ".lock"


class StagedOutput:
    """An output for a URL while it is made. A context manager, which holds a lock; the files are kept unless `upload` has returned.

    Attributes:
        path: where to make the output on this machine: in an existing folder of its own, named as the URL is.
        is_made: True if an earlier command has made it, and it only has to be uploaded.
    """

    def __init__(
        self, out: StorePath, *, settings: Mapping[str, Any], part: str = "", unfinished: str = "continue", option: str = "--out"
    ) -> None:
        """Opens the folder of this URL, or makes it, and checks that the URL can be written.

        Args:
            out: file or folder to write.
            part: name of the part of `out` that is made, if several commands share it.
            settings: everything that the output depends on; a command with other settings may not continue it.
            unfinished: 'continue' an earlier command's work, or 'restart' without it.
            option: name of the option behind `out`, for messages.

        Raises:
            UserError: the store cannot be written, another process is writing to the URL, or the earlier command had other settings.
        """
        if out.is_web:
            raise UserError(f"{option} {out}: a web server cannot be written to; give s3://, gs:// or hf://, or a path")
        self._out, self._option = out, option
        self.path = staging_path(out, part=part)
        self.folder = self.path.parent
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self._lock = locked_file(self.folder / _LOCK)
        except BlockingIOError as error:
            raise UserError(f"{option} {out}: {error.strerror} is writing there; wait for it, or give another URL") from error
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written ({error.strerror}); set XDG_CACHE_HOME to another folder") from error
        try:
            if unfinished == "restart":
                self._empty()
            self._take_up(json.loads(json.dumps(dict(settings))))
            self.is_made = (self.folder / _MADE).exists()
            self._try_to_write()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def url_of(self, path: Path) -> StorePath:
        """Returns where a file of this folder is uploaded to."""
        return self._out.parent / path.relative_to(self.folder).as_posix()

    def made(self) -> None:
        """Marks the output as complete: from now on a repeated command only uploads it."""
        write_durably(self.folder / _MADE, "{}")
        self.is_made = True

    def upload(self, last: Callable[[Path], int] = lambda path: 0) -> tuple[int, int]:
        """Uploads all files and removes them here; returns their number and bytes. A file that the store already has with its size and in
        the version that an earlier call has uploaded is left as it is.

        last: the files are uploaded in ascending order of this, then of their names, so that what says 'complete' comes last.

        Raises UserError if the store refuses, and Lost if it does not answer: nothing is removed then.
        """
        files = [path for path in self.folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
        files.sort(key=lambda path: (last(path), path))
        sizes = {path: path.stat().st_size for path in files}
        uploaded = json.loads((self.folder / _MADE).read_text(encoding="utf-8"))
        with Progress(f"uploading to {self._out}", sum(sizes.values())) as progress:
            for path in files:
                name = path.relative_to(self.folder).as_posix()
                place = self.url_of(path)
                if name not in uploaded or uploaded[name] != _status_of(place):
                    self._put(path, place, size=sizes[path])
                    uploaded[name] = _status_of(place)
                    write_durably(self.folder / _MADE, json.dumps(uploaded))
                progress.advance(sizes[path])
        shutil.rmtree(self.folder, ignore_errors=True)
        return len(files), sum(sizes.values())

    def _put(self, path: Path, place: StorePath, *, size: int) -> None:
        fs, target = place.store()
        retried(lambda: fs.put_file(str(path), target), str(place))
        if (found := place.stat().size) != size:
            raise UserError(f"{self._option} {place}: {found:,} of {size:,} bytes are in the store; the same command uploads it again")

    def _take_up(self, settings: dict[str, Any]) -> None:
        path = self.folder / _SETTINGS
        if not path.exists():
            write_durably(path, json.dumps(settings))
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({first_line(error)}); remove its folder") from error
        if changed := [name for name in (*settings, *before) if before.get(name) != settings.get(name)]:
            name = changed[0]
            raise UserError(
                f"{self._option} {self._out}: its unfinished output is in {self.folder}, made with {name} = {shown(before.get(name))} and not "
                f"{shown(settings.get(name))}; repeat that command to go on, or remove the folder"
            )

    def _try_to_write(self) -> None:
        """Raises UserError, now and not after hours, if the store does not let us write there."""
        probe = self._out.with_name(f".{self._out.name}.fastbyol-write-test")
        fs, path = probe.store()
        try:
            retried(lambda: fs.pipe_file(path, b"written to find out whether it can be"), str(probe))
            retried(lambda: fs.rm_file(path), str(probe))
        except Absent:
            raise UserError(
                f"{self._option} {self._out}: the store has no place for it; make the bucket first, or correct the name"
            ) from None
        except NotImplementedError:
            raise UserError(
                f"{self._option} {self._out}: this kind of store cannot be written to; give s3://, gs:// or hf://, or a path"
            ) from None

    def _empty(self) -> None:
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()


def staging_path(out: StorePath, *, part: str = "") -> Path:
    """Returns the path at which an output for this URL is made on this machine, the same for every process."""
    digest = hashlib.sha256(f"{out.url}\0{part}".encode()).hexdigest()[:12]
    return cache_folder() / "uploads" / f"{digest}-{out.name}" / out.name


def _status_of(place: StorePath) -> list[int] | None:
    """Returns size and version of a file, or None if it is not there."""
    try:
        return list(place.stat())
    except Absent:
        return None
