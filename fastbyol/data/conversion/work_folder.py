"""The hidden work folder of a conversion, its journal, from which an interrupted conversion resumes, and the move to the final name.

Files are only appended to. A journal entry has the length of each file at one point of the work and is written after these files are on disk.
So after a crash, a full disk or a kill, each file is cut to its length in the last entry, and the work continues from there. If everything
that follows depends only on the content of the files, the result is byte-identical to that of an uninterrupted conversion.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, Self

from fastbyol.config.arguments import require_name
from fastbyol.config.errors import UserError
from fastbyol.data.formats.manifest import TAR_MANIFEST, sha256_of
from fastbyol.data.formats.regular_files import require_regular
from fastbyol.host.durable_files import flush_to_disk, locked_file, write_durably

_SETTINGS, _JOURNAL, _LOCK = "settings.json", "journal.json", "lock"
_COMPLETE = "complete"
"""Name, in the work folder, of a complete output that only has to be moved out."""
_INSIDE = ".partial"
"""Name of the work folder inside an output folder that existed before."""
UNFINISHED = ("continue", "require", "restart")
_BUFFER_BYTES = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class GrowingFile(io.BufferedWriter):
    """A file that is only appended to; `size` includes what is still in the buffer, which `flush` passes to the operating system."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "a"), _BUFFER_BYTES)
        self.size = self.seek(0, os.SEEK_END)

    def write(self, data: bytes, /) -> int:
        self.size += len(data)
        return super().write(data)


class WorkFolder:
    """A work folder, locked for one process. `done` is the number of images that an earlier run finished here; 0 for a new conversion."""

    def __init__(
        self,
        path: Path,
        *,
        output: Path,
        identity: Mapping[str, Any],
        unfinished: str = "continue",
        flush_every_s: float = 10.0,
        patience_s: float = 0.0,
    ) -> None:
        """Opens the folder at `path` to continue in it, or makes it.

        Args:
            path: path of the folder, the same for every run of the same conversion.
            output: path of the output, for messages.
            identity: everything that the result depends on, as plain values.
            unfinished: treatment of an earlier run's files: 'continue' with them, 'require' them, or 'restart' without them.
            flush_every_s: time between journal entries.
            patience_s: time to wait for another process that is working here.

        Raises:
            UserError: another process is working here; the earlier run had another identity, or its files are damaged; or an earlier run is
                required and there is none.
        """
        self.path, self._output, self._flush_every_s = path, output, flush_every_s
        self._lock = _locked(path, output, patience_s=patience_s)
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="fastbyol-flush")
        self.digests = BackgroundDigests(self)
        self._files: dict[str, GrowingFile] = {}
        self._sizes: dict[str, int] = {}
        self._pending: list[Future[None]] = []
        self._flushed_at = time.monotonic()
        try:
            if unfinished == "restart":
                _empty(path)
            elif unfinished == "require" and not (path / _JOURNAL).exists():
                raise UserError(f"{output}: there is no unfinished conversion to resume; omit --resume to start one")
            self.done, self.notes = self._load(identity)
        except BaseException:
            self.close()
            raise

    def open(self, name: str, *, begins_with: int = 0) -> GrowingFile:
        """Opens a file of this folder for appending. name: relative path, at most one folder deep; begins_with: zero bytes of a new file."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        if name not in self._sizes:  # others have been cut to their length in the journal
            with path.open("wb") as file:
                file.truncate(begins_with)
        self._files[name] = GrowingFile(path)
        return self._files[name]

    def close_file(self, name: str) -> None:
        """Closes a finished file and starts its fsync; its size is part of every later journal entry."""
        file = self._files.pop(name)
        file.close()
        self._sizes[name] = file.size
        self._pending.append(self._flusher.submit(flush_to_disk, self.path / name))

    def flush_due(self, done: int) -> None:
        """Starts a journal entry in the background if `flush_every_s` has passed and the last entry is finished."""
        if time.monotonic() - self._flushed_at >= self._flush_every_s and all(one.done() for one in self._pending):
            self._start_flush(done)

    def flush(self, done: int) -> None:
        """Writes a journal entry saying that the first `done` images are in the files. Returns when it is on disk."""
        self._start_flush(done)
        self._pending.pop().result()

    def discard(self) -> None:
        """Marks the folder, once the output is complete and moved out, as one that `close` removes."""
        (self.path / _JOURNAL).unlink(missing_ok=True)

    def close(self) -> None:
        """Closes the files and releases the lock. The folder is kept for the next run if there is a journal, else removed."""
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # its buffer cannot be written
                file.raw.close()
        self.digests.close()
        self._flusher.shutdown(wait=True)
        if not (self.path / _JOURNAL).exists():
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)  # last: once the lock is released, another process may use the path

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_flush(self, done: int) -> None:
        while self._pending:
            self._pending.pop().result()
        for file in self._files.values():
            file.flush()
        sizes = self._sizes | {name: file.size for name, file in self._files.items()}
        self._flushed_at = time.monotonic()
        entry = {"done": done, "sizes": sizes, "notes": dict(self.notes)}
        self._pending.append(self._flusher.submit(self._put_on_disk, tuple(self._files), entry))

    def _put_on_disk(self, names: Sequence[str], entry: dict[str, Any]) -> None:
        for name in names:  # before the journal, which may only name bytes that are on disk
            flush_to_disk(self.path / name)
        write_durably(self.path / _JOURNAL, json.dumps(entry))

    def _load(self, identity: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        """Returns the number of finished images and the notes of the earlier run; 0 and {} without one. UserError if its identity differs.

        Cuts every file to its length in the journal and removes files that are not in it.
        """
        settings, journal = self.path / _SETTINGS, self.path / _JOURNAL
        if not (settings.exists() and journal.exists()):  # without a journal there is nothing to lose: start again
            _empty(self.path)
            write_durably(settings, json.dumps(identity, indent=1))
            return 0, {}
        before = self._read(_SETTINGS)
        if changed := [name for name in (*identity, *before) if before.get(name) != identity.get(name)]:
            name = changed[0]
            raise UserError(
                f"{self._output}: an unfinished conversion is in {self.path}, made with {name} = {before.get(name)} and not "
                f"{identity.get(name)}; repeat its settings to continue it, or throw it away with --restart"
            )
        entry = self._read(_JOURNAL)
        if not _is_journal_entry(entry):
            raise UserError(f"{journal}: damaged, or not a journal of this program; start again with --restart")
        known = {_SETTINGS, _JOURNAL, _LOCK, *entry["sizes"]}
        for file in self.path.rglob("*"):
            if not file.is_dir() and str(file.relative_to(self.path)) not in known:
                file.unlink()
        for name, size in entry["sizes"].items():
            file = self.path / name
            found = file.stat().st_size if file.exists() else 0
            if found < size:
                raise UserError(f"{file}: {found:,} bytes, its journal says {size:,}: damaged; start again with --restart")
            os.truncate(file, size)
        self._sizes = dict(entry["sizes"])
        return entry["done"], entry["notes"]

    def _read(self, name: str) -> dict[str, Any]:
        try:
            require_regular(self.path / name)
            values = json.loads((self.path / name).read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("no JSON object")
            return values
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path / name}: not readable ({error}); start again with --restart") from error


class BackgroundDigests:
    """SHA-256 digests of a work folder's files or of byte ranges of them, computed in a thread while the data is still in the page cache.

    Reading it again later would take minutes. The digests are stored in the folder's notes, so a resumed conversion finds those that the
    journal has.
    """

    def __init__(self, work: WorkFolder) -> None:
        self._work = work
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastbyol-sha256")
        self._pending: dict[str, Future[str]] = {}

    def begin(self, name: str, *, start: int = 0, size: int | None = None) -> None:
        """Starts the digest of bytes that will not change any more. size: number of bytes from `start`; None means to the end."""
        note = _note(name, start)
        if note not in self._work.notes and note not in self._pending:
            path = self._work.path / name
            self._pending[note] = self._thread.submit(lambda: self._work.notes.setdefault(note, sha256_of(path, start=start, size=size)))

    def result(self, name: str, *, start: int = 0, size: int | None = None) -> str:
        """Returns the hexadecimal digest; starts it, or waits for it, if necessary."""
        self.begin(name, start=start, size=size)
        note = _note(name, start)
        return self._work.notes.get(note) or self._pending[note].result()

    def close(self) -> None:
        """Ends the thread; digests that it has not begun are dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def _note(name: str, start: int) -> str:
    return f"sha256 of {name}" + (f"@{start}" if start else "")


def _is_journal_entry(entry: dict[str, Any]) -> bool:
    """Returns True if the entry is valid and its files are all in this folder. Checked because files will be cut to the lengths in it."""
    done, sizes, notes = (entry.get(name) for name in ("done", "sizes", "notes"))
    if not (type(done) is int and done >= 0 and isinstance(sizes, dict) and isinstance(notes, dict)):
        return False
    inside = all(".." not in PurePath(name).parts and not PurePath(name).is_absolute() for name in sizes)
    return inside and all(type(size) is int and size >= 0 for size in sizes.values())


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Context manager that turns an OSError into a UserError."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in _FULL else error.strerror or str(error)
        at = f" at {error.filename}" if error.filename else ""
        raise UserError(f"{out}: not finished: {reason}{at}; once that is fixed, the same command continues") from error


def require_free_name(out: Path, *, data: str, overwrite: str, marker: str = "") -> None:
    """Raises UserError if `out` exists and may not be replaced, is a folder without the file `marker`, or has no parent folder.

    Before that, it finishes a conversion to `out` that was killed while its `data` was moved to the final place: its output is no obstacle.

    Args:
        data: name of the file or folder in the work folder that becomes `out`.
        marker: for an output that is a folder, the name of a file by which ours are recognised. An empty folder is accepted too.
    """
    folder = work_path(out)
    moving = (folder / _COMPLETE).exists()
    if moving or (folder.parent != out and out.exists() and (folder / _JOURNAL).exists() and not (folder / data).exists()):
        lock = _locked(folder, out)
        if moving:
            _empty_into(folder / _COMPLETE, out)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
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
    if _is_unused(out) or (out / _INSIDE).is_dir():
        return out / _INSIDE
    require_name(out)
    return out.with_name(f".{out.name}.partial")


def put_in_place(new: Path, out: Path) -> None:
    """Moves a complete file or folder to its final name. An old output stays intact until the new one is there, and is removed only then.

    If the work folder is inside `out`, the files are moved one by one into `out`.
    """
    if new.is_dir() and new.parent.parent == out:
        # The new name tells `require_free_name` that everything is written and only moves remain.
        os.replace(new, new.with_name(_COMPLETE))
        flush_to_disk(new.parent)
        _empty_into(new.with_name(_COMPLETE), out)
        return
    old = out.with_name(f".{out.name}.replaced")
    if new.is_dir() and out.exists():  # a folder cannot be renamed onto one that is not empty
        shutil.rmtree(old, ignore_errors=True)  # left by a run that was killed before it removed this
        os.replace(out, old)
    os.replace(new, out)
    flush_to_disk(out.parent)
    if old.is_dir():
        shutil.rmtree(old)


def _empty_into(complete: Path, output: Path) -> None:
    """Moves all files of a folder into another one on the same disk; the manifest last, because its presence means that all are there."""
    for file in sorted(complete.iterdir(), key=lambda file: file.name == TAR_MANIFEST):
        flush_to_disk(output)
        os.replace(file, output / file.name)
    flush_to_disk(output)


@contextmanager
def locked_work(folder: Path, *, output: Path, patience_s: float) -> Iterator[None]:
    """Context manager that holds the lock of a work folder and then removes the folder; after an error only if it holds nothing else.

    Raises UserError if another process works there.
    """
    lock, is_done = _locked(folder, output, patience_s=patience_s), False
    try:
        yield
        is_done = True
    finally:
        if is_done or [entry.name for entry in folder.iterdir()] == [_LOCK]:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)  # last: once the lock is released, another process may use the path


def _locked(folder: Path, output: Path, *, patience_s: float = 0.0) -> int:
    """Makes the folder and returns a descriptor that holds its lock. Raises UserError if another process holds it."""
    try:
        return locked_file(folder / _LOCK, patience_s=patience_s)
    except BlockingIOError:
        raise UserError(f"{output}: another conversion is writing it at this moment (it holds {folder}); wait for it, or end it") from None


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()
