"""A cache on local disk for blocks of files in a store. Its size is limited, and the processes of a machine share it.

A block holds the images that begin within 8 MiB of one file, as in a local traversal (`data/traversal.py`), and is one file in the cache. It
is read with one range request, its size and the CRC-32 of each of its images are compared with the tables of the conversion, and it gets its
name when it is complete. A full cache first removes blocks that are not needed any more, oldest first, then the block needed latest.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import Lost, UserError
from fastbyol.data.formats.beton import MIN_PAGE_BYTES
from fastbyol.data.traversal import Indices, group_into_blocks
from fastbyol.host.durable_files import UNFINISHED, flush_to_disk
from fastbyol.host.store_path import StorePath
from fastbyol.host.stores import retried

BLOCK_SUFFIX = ".block"
_LOCKS = 64
"""Lock files of a data set: a block's number chooses its lock, so that two processes seldom wait for each other's blocks."""
_ABANDONED_S = 3600.0
"""Age from which an unfinished file counts as left by a killed process."""
_SLACK = 50
"""A full cache frees 1/50 of its size at once, because finding blocks to remove reads the whole folder."""


class BlockCache:
    """The blocks of one data set. Methods may be called from several threads.

    Args:
        files: the data set's files in the store.
        file, offset, size, crc32: (num_samples,) each: number of the file that holds a sample, place and CRC-32 of its bytes.
        folder: the data set's own folder, in `root`.
        root: folder of the cache, to which the limit applies.
        limit_bytes: size that all blocks in `root` may have together.

    Attributes:
        blocks: how samples are grouped. block_of: (num_samples,) number of each sample's block. bytes: (num_blocks,) size of each.
        next_use: returns when each block will be needed next, (num_blocks,), in any unit; with True, blocks that only the
            batches in preparation may still need count as no longer needed. None: not known.
    """

    def __init__(
        self,
        files: Sequence[StorePath],
        *,
        file: NDArray[np.integer],
        offset: NDArray[np.int64],
        size: NDArray[np.integer],
        crc32: NDArray[np.uint32],
        folder: Path,
        root: Path,
        limit_bytes: int,
    ) -> None:
        self._files, self._offset, self._size, self._crc32 = files, offset, size, crc32
        self._folder, self._root, self.limit_bytes = folder, root, limit_bytes
        self.blocks = blocks = group_into_blocks(file, offset, block_bytes=MIN_PAGE_BYTES, window_bytes=0)
        self.block_of = np.empty(len(offset), dtype=np.int64)
        self.block_of[blocks.sample] = blocks.number
        firsts = np.flatnonzero(np.diff(blocks.number, prepend=-1))
        self._file, self._start = file[blocks.sample[firsts]], offset[blocks.sample[firsts]]
        self._end = np.maximum.reduceat((offset + size)[blocks.sample], firsts)
        self.bytes = self._end - self._start
        self.next_use: Callable[[bool], NDArray[np.float64]] | None = None
        self._one_in_need = threading.Lock()
        self._lost: Lost | None = None
        with _disk_errors(root):
            (folder / "locks").mkdir(parents=True, exist_ok=True)

    def open_files(self) -> list[CachedFile]:
        """Returns readers of the data set's files."""
        firsts = np.searchsorted(self._file, np.arange(len(self._files) + 1)).tolist()
        return [
            CachedFile(self, first, self._start[first:beyond], shown=str(file))
            for file, first, beyond in zip(self._files, firsts[:-1], firsts[1:], strict=True)
        ]

    def require_room(self, *, window: int) -> None:
        """Raises UserError if the cache is too small for a traversal. window: number of blocks that it mixes; 0: all of them (random)."""
        total, gib = int(self.bytes.sum()), 2.0**30
        limit = self.limit_bytes / gib
        if not window and total > self.limit_bytes:
            raise UserError(
                f"data.traversal = 'random': reads all {total / gib:.3g} GiB in random order, and data.cache_gib = {limit:.3g} holds less; take "
                "data.traversal local, which needs only a part of it at a time, or a larger cache"
            )
        # All blocks of the current window are in use, and those of the next one must arrive meanwhile.
        needed = int(np.sort(self.bytes)[::-1][: 2 * window].sum()) if window else total
        if needed > self.limit_bytes:
            raise UserError(
                f"data.cache_gib = {limit:.3g}: two windows of data.window_mib need up to {needed / gib:.3g} GiB; give that much, or smaller windows"
            )
        free = shutil.disk_usage(self._root).free + sum(size for _, size, _ in _kept_files(self._root))
        if free < (wanted := min(total, self.limit_bytes)):
            raise UserError(
                f"data.cache = {self._root}: has room for {free / gib:.3g} GiB, the cache may need {wanted / gib:.3g}; make room, give another "
                "folder, or a smaller data.cache_gib"
            )

    def holds(self, block: int) -> bool:
        """Returns True if the cache has the whole block."""
        try:
            return self._path(block).stat().st_size == self.bytes[block]
        except FileNotFoundError:
            return False

    def read(self, block: int, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset` of the block's file in the store, and fetches the block first if it is not in the cache.

        Raises UserError if the store's copy is missing or damaged, Lost if the store does not answer.
        """
        start, end = offset - int(self._start[block]), offset - int(self._start[block]) + size
        data = self._cached(block, start, end)
        if data is not None:
            return data
        return self._fetched_in_need(block)[start:end]

    def drop(self, block: int) -> None:
        """Removes a block whose bytes have changed on the disk."""
        self._path(block).unlink(missing_ok=True)

    def claim(self, block: int) -> Path | None:
        """Makes room for a block and returns the unfinished file that reserves it; None if all cached blocks are needed sooner."""
        return self._claim(block, in_need=False)

    def fetch(self, block: int, unfinished: Path) -> None:
        """Reads a block from the store, without retries, into the file that `claim` returned, and gives it its final name."""
        with self._locked(f"{block % _LOCKS:02d}"):
            if self.holds(block):
                unfinished.unlink(missing_ok=True)
            else:
                self._keep(block, self._from_store(block), unfinished)

    def _path(self, block: int) -> Path:
        return self._folder / f"{block:08d}{BLOCK_SUFFIX}"

    def _cached(self, block: int, start: int, end: int) -> bytes | None:
        try:
            descriptor = os.open(self._path(block), os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            data = os.pread(descriptor, end - start, start)
        finally:
            os.close(descriptor)
        return data if len(data) == end - start else None

    def _fetched_in_need(self, block: int) -> bytes:
        """Returns a block that a batch waits for; retries while the store has trouble. Raises Lost if it does not recover."""
        # One thread at a time: the others would meet the same trouble, and report it too.
        with self._one_in_need:
            if self._lost is not None:
                raise self._lost
            with self._locked(f"{block % _LOCKS:02d}"):
                if self.holds(block) and (data := self._cached(block, 0, int(self.bytes[block]))) is not None:
                    return data  # fetched meanwhile, by the thread that reads ahead or by another process
                try:
                    data = retried(lambda: self._from_store(block), str(self._files[self._file[block]]))
                except Lost as error:
                    self._lost = Lost(f"{error} from the last checkpoint")  # completes retried's text 'the same command continues'
                    raise self._lost from None
                unfinished = self._claim(block, in_need=True)
                assert unfinished is not None
                self._keep(block, data, unfinished)
                return data

    def _from_store(self, block: int) -> bytes:
        """Returns a block's bytes, compared with the conversion's checksums. Raises UserError if they differ twice."""
        file = self._files[self._file[block]]
        damaged = 0
        for _ in range(2):
            data = memoryview(file.read_once(int(self._start[block]), int(self.bytes[block])))
            for sample in self.blocks.members(block).tolist():
                start = int(self._offset[sample] - self._start[block])
                if zlib.crc32(data[start : start + int(self._size[sample])]) != self._crc32[sample]:
                    damaged = sample
                    break
            else:
                return bytes(data)
        raise UserError(
            f"{file}: image {damaged} has other bytes in the store than after the conversion (read twice); copy the file there again"
        )

    def _keep(self, block: int, data: bytes, unfinished: Path) -> None:
        with _disk_errors(self._root):
            try:
                with unfinished.open("r+b") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                unfinished.replace(self._path(block))
            finally:
                unfinished.unlink(missing_ok=True)
            flush_to_disk(self._folder)

    def _claim(self, block: int, *, in_need: bool) -> Path | None:
        """Returns an unfinished file of the block's size; None if there is no room. A block in need gets its room in any case."""
        size = int(self.bytes[block])
        unfinished = self._folder / f"{block:08d}{UNFINISHED}{os.getpid()}-{threading.get_ident()}"
        account = self._root / "bytes"
        with _disk_errors(self._root), self._locked("room"):
            # All processes share a file with the bytes in use. It is corrected whenever the folder itself is read.
            try:
                used = int(account.read_text())
            except (FileNotFoundError, ValueError):
                used = self.limit_bytes
            if used + size > self.limit_bytes:
                used = self._make_room(block, size, in_need=in_need)
            fits = in_need or used + size <= self.limit_bytes
            if fits:
                with unfinished.open("wb") as file:
                    os.truncate(file.fileno(), size)  # its size counts from now on, for others who read the folder
            account.write_text(str(used + size if fits else used))
        return unfinished if fits else None

    def _make_room(self, block: int, size: int, *, in_need: bool) -> int:
        """Removes blocks, those needed latest first, until this one fits; returns the bytes that remain.

        Only blocks that are needed later than this one are removed; for a block in need, any may be.
        """
        uses = np.full(len(self.bytes), np.inf) if self.next_use is None else self.next_use(in_need)
        needed = -1.0 if in_need else float(uses[block])
        used, may_leave = 0, []
        for path, bytes_, age in _kept_files(self._root):
            used += bytes_
            if path.suffix == BLOCK_SUFFIX:
                own = path.parent == self._folder and path.stem.isdecimal() and int(path.stem) < len(uses)
                use = float(uses[int(path.stem)]) if own else np.inf
                if use > needed:
                    may_leave.append((-use, -age, bytes_, path))
        wanted = max(0, min(self.limit_bytes - size, self.limit_bytes - self.limit_bytes // _SLACK))
        for _, _, bytes_, path in sorted(may_leave, key=lambda row: row[:2]):
            if used <= wanted:
                break
            path.unlink(missing_ok=True)
            used -= bytes_
        return used

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Keeps other threads and processes out, as far as the file system has locks; without them a block may be fetched twice."""
        path = self._root / name if name == "room" else self._folder / "locks" / name
        with _disk_errors(self._root):
            file = path.open("ab")
        with file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


class CachedFile:
    """Byte ranges of one file of a store, through its cache; used like a `RangeReader`."""

    def __init__(self, cache: BlockCache, first: int, starts: Indices, *, shown: str) -> None:
        """first: number of the file's first block. starts: offset at which each of its blocks begins. shown: its URL for messages."""
        self.path = shown
        self._cache, self._first, self._starts = cache, first, starts

    def read(self, offset: int, size: int) -> bytes:
        return self._cache.read(self._block(offset), offset, size)

    def read_again(self, offset: int, size: int) -> bytes:
        """Fetches the block anew, because the cached bytes have changed, and returns the bytes."""
        block = self._block(offset)
        self._cache.drop(block)
        return self._cache.read(block, offset, size)

    def _block(self, offset: int) -> int:
        return self._first + int(np.searchsorted(self._starts, offset, side="right")) - 1

    def read_ahead(self, start: int, end: int) -> None:
        """Does nothing: `FetchAhead` fetches what a store holds."""

    def close(self) -> None:
        """Does nothing: no file stays open."""


def _kept_files(root: Path) -> Iterator[tuple[Path, int, float]]:
    """Yields path, size and age in seconds of each block and unfinished file in the cache; removes what killed processes left."""
    now = time.time()
    for folder in [entry.path for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False)]:
        for entry in os.scandir(folder):
            is_block = entry.name.endswith(BLOCK_SUFFIX)
            if not is_block and UNFINISHED not in entry.name:
                continue
            try:
                facts = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # it was just renamed or removed
                continue
            if not is_block and now - facts.st_mtime > _ABANDONED_S:
                Path(entry.path).unlink(missing_ok=True)
                continue
            yield Path(entry.path), facts.st_size, now - facts.st_mtime


@contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    """Turns an error of the cache's disk into a UserError, so that `retried` does not take it for an error of the store."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"data.cache = {root}: cannot be written ({error.strerror or error}); make room, give another folder, or a smaller data.cache_gib"
        ) from error
