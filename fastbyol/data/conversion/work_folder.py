"""The hidden folder in which a conversion grows beside its output, and the journal that says up to where its files are good.

Files only grow. A journal entry names the length of each at one point of the work and is written after the files themselves are on disk; so
after a crash, a full disk or a kill, each is cut to its length in the last entry and the work goes on from there. Everything that comes
later must be a function of what is in the files: then the result is the same, byte for byte, as without the interruption.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any, Self

from fastbyol.config.errors import UserError
from fastbyol.data.manifest import TAR_MANIFEST

_SETTINGS, _JOURNAL, _LOCK = "settings.json", "journal.json", "lock"
COMPLETE = "complete"
"""What an output is called that only has to be moved out of the work folder."""
UNFINISHED = ("continue", "require", "restart")
_BUFFER_BYTES = 1 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


class GrowingFile:
    """A file that is only appended to."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self._file = io.BufferedWriter(io.FileIO(path, "a"), _BUFFER_BYTES)
        self.size = self._file.seek(0, os.SEEK_END)

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self.size += len(data)

    def hand_over(self) -> None:
        """Hands everything to the system: who reads the file finds it."""
        self._file.flush()

    def flush(self) -> int:
        """Hands everything to the system; gives a descriptor of its own to whoever puts it on disk."""
        self.hand_over()
        return os.dup(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def abandon(self) -> None:
        """Closes without another attempt to write what could not be written."""
        try:
            self._file.close()
        except OSError:
            self._file.raw.close()


class WorkFolder:
    """Locked for one process. `done` is how many images a former run left finished here; 0: this is a new beginning."""

    def __init__(
        self, path: Path, *, output: Path, identity: Mapping[str, Any], unfinished: str = "continue", flush_every_s: float = 10.0
    ) -> None:
        """Takes up what is at `path`, or makes it.

        Args:
            path: of the folder; the same for every run of the same conversion.
            output: what is being made, for messages.
            identity: everything that the result depends on, as plain values.
            unfinished: what to do about what a former run left: 'continue' it, 'require' it, or 'restart' without it.
            flush_every_s: time between journal entries.

        Raises:
            UserError: another process is at work here; what is there was made with another identity, or is damaged; nothing is there that
                could be continued, and it is required.
        """
        self.path, self._output, self._flush_every_s = path, output, flush_every_s
        self._lock = _locked(path, output)
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="fastbyol-flush")
        self._files: dict[str, GrowingFile] = {}
        self._sizes: dict[str, int] = {}
        self._pending: list[Future[None]] = []
        self._is_open = True
        self._flushed_at = time.monotonic()
        try:
            if unfinished == "restart":
                _empty(path)
            elif unfinished == "require" and not (path / _JOURNAL).exists():
                raise UserError(f"{output}: no unfinished conversion of it is there to be resumed; leave out --resume to begin one")
            self._check_identity(identity)
            self.done, self.notes = self._load_journal()
        except BaseException:
            self.close()
            raise

    def open(self, name: str, *, size: int = 0) -> GrowingFile:
        """A file of this folder, to go on with. name: relative to the folder, with at most one folder in it; size: that it must have."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as file:
            file.truncate(size)
        self._files[name] = GrowingFile(path, name)
        return self._files[name]

    def size_of(self, name: str) -> int:
        """Of a file, in the last entry that a former run made; 0 if it had none."""
        return self._sizes.get(name, 0)

    def close_file(self, file: GrowingFile) -> None:
        """No more will be added to it; its length goes into every later entry."""
        self._sizes[file.name] = file.size
        self._pending.append(self._flusher.submit(_fsync, [file.flush()]))
        file.close()
        del self._files[file.name]

    def flush_due(self, done: int) -> None:
        """Makes a journal entry in the background if it is time, the last one being finished."""
        if time.monotonic() - self._flushed_at >= self._flush_every_s and all(one.done() for one in self._pending):
            self._start_flush(done)

    def flush(self, done: int) -> None:
        """Makes a journal entry: the first `done` images are in the files. Returns when it is on disk."""
        self._start_flush(done)
        self._finish_flush()

    def discard(self) -> None:
        """Removes the folder: the output is complete."""
        self._let_go(keep=False)

    def close(self) -> None:
        """Lets go of the files and the lock. What the journal knows of stays for the next run; without any entry nothing does."""
        self._let_go(keep=(self.path / _JOURNAL).exists())

    def _let_go(self, *, keep: bool) -> None:
        if not self._is_open:
            return
        self._is_open = False
        for file in self._files.values():
            file.abandon()
        self._flusher.shutdown(wait=True)
        if not keep:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)  # last: from here on the path may be another's

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_flush(self, done: int) -> None:
        self._finish_flush()
        descriptors = [file.flush() for file in self._files.values()]
        sizes = self._sizes | {name: file.size for name, file in self._files.items()}
        self._flushed_at = time.monotonic()
        entry = {"done": done, "sizes": sizes, "notes": dict(self.notes)}
        self._pending.append(self._flusher.submit(self._put_on_disk, descriptors, entry))

    def _finish_flush(self) -> None:
        while self._pending:
            self._pending.pop().result()

    def _put_on_disk(self, descriptors: list[int], entry: dict[str, Any]) -> None:
        _fsync(descriptors)
        write_durably(self.path / _JOURNAL, json.dumps(entry))

    def _check_identity(self, identity: Mapping[str, Any]) -> None:
        path = self.path / _SETTINGS
        if not (path.exists() and (self.path / _JOURNAL).exists()):  # nothing in it is worth a complaint
            _empty(self.path)
            write_durably(path, json.dumps(identity, indent=1))
            return
        before = self._read(_SETTINGS)
        changed = [name for name in (*identity, *before) if before.get(name) != identity.get(name)]
        if changed:
            name = changed[0]
            raise UserError(
                f"{self._output}: an unfinished conversion lies in {self.path}, made with {name} = {before.get(name)} and not "
                f"{identity.get(name)}; repeat its settings to continue it, or throw it away with --restart"
            )

    def _load_journal(self) -> tuple[int, dict[str, Any]]:
        """Cuts every file to its length in the journal, and removes what is not in it."""
        entry = self._read(_JOURNAL) if (self.path / _JOURNAL).exists() else {"done": 0, "sizes": {}, "notes": {}}
        if not _is_journal_entry(entry):
            raise UserError(f"{self.path / _JOURNAL}: damaged, or not a journal of this program; begin anew with --restart")
        known = {_SETTINGS, _JOURNAL, _LOCK, *entry["sizes"]}
        for file in self.path.rglob("*"):
            if not file.is_dir() and str(file.relative_to(self.path)) not in known:
                file.unlink()
        for name, size in entry["sizes"].items():
            file = self.path / name
            found = file.stat().st_size if file.exists() else 0
            if found < size:
                raise UserError(f"{file}: {found:,} bytes, its journal says {size:,}: damaged; begin anew with --restart")
            os.truncate(file, size)
        self._sizes = dict(entry["sizes"])
        return entry["done"], entry["notes"]

    def _read(self, name: str) -> dict[str, Any]:
        try:
            values = json.loads((self.path / name).read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise ValueError("no JSON object")
            return values
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path / name}: not readable ({error}); begin anew with --restart") from error


def _is_journal_entry(entry: dict[str, Any]) -> bool:
    """Whether these are counts, lengths of files of this folder alone, and notes: files are cut to what it says."""
    done, sizes, notes = (entry.get(name) for name in ("done", "sizes", "notes"))
    if not (type(done) is int and done >= 0 and isinstance(sizes, dict) and isinstance(notes, dict)):
        return False
    inside = all(".." not in PurePath(name).parts and not PurePath(name).is_absolute() for name in sizes)
    return inside and all(type(size) is int and size >= 0 for size in sizes.values())


def clear_if_finished(folder: Path, *, data: str, output: Path) -> None:
    """Removes the work folder of a conversion that was killed when its `data` had just taken its final place, or was about to."""
    moving = (folder / COMPLETE).exists()
    moved = folder.parent != output and output.exists() and (folder / _JOURNAL).exists() and not (folder / data).exists()
    if moving or moved:
        lock = _locked(folder, output)
        if moving:
            empty_into(folder / COMPLETE, output)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def empty_into(complete: Path, output: Path) -> None:
    """Moves all files of a folder into another one of the same disk, the manifest last: it says that the others are there."""
    for file in sorted(complete.iterdir(), key=lambda file: file.name == TAR_MANIFEST):
        flush_to_disk(output)
        os.replace(file, output / file.name)
    flush_to_disk(output)


def write_durably(path: Path, text: str) -> None:
    """Replaces a small file in one step, on disk when this returns."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    flush_to_disk(path.parent)


def flush_to_disk(path: Path) -> None:
    """Forces a file, or a folder's list of names, to disk: a rename must not outrun the data."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: OSError) -> bool:
    """Whether the disk, the quota or the largest allowed file is full."""
    return error.errno in _FULL


def _fsync(descriptors: list[int]) -> None:
    try:
        for descriptor in descriptors:
            os.fsync(descriptor)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _locked(folder: Path, output: Path) -> int:
    """A descriptor that holds the folder's lock: the system lets go of it however we end."""
    while True:
        folder.mkdir(exist_ok=True)
        path = folder / _LOCK
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)  # NFS locks only what is open for writing
        except FileNotFoundError:
            continue  # the folder was removed by another run that has just finished
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:  # else: a file system without locks, where nobody watches over this
                os.close(descriptor)
                raise UserError(
                    f"{output}: another conversion is writing it at this moment (it holds {folder}); wait for it, or end it"
                ) from None
        if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
            return descriptor
        os.close(descriptor)


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()
