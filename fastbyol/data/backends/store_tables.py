"""Brings the tables of converted data in a store (manifest, sample table, the tables of a .beton) onto local disk; the images stay there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.data.backends.block_cache import BlockCache
from fastbyol.data.formats.beton import MIN_PAGE_BYTES, copy_tables
from fastbyol.data.formats.manifest import MAX_MANIFEST_BYTES, TAR_MANIFEST, beton_manifest_path, read_manifest
from fastbyol.data.formats.tar_shards import SAMPLE_TABLE, largest_sample_table
from fastbyol.data.inputs.listing import Stamp, stamp_of
from fastbyol.host.cache_files import cache_folder
from fastbyol.host.durable_files import durable_file, flush_to_disk, locked_file, write_all
from fastbyol.host.store_path import BLOCK_BYTES, StorePath

log = logging.getLogger("fastbyol")
Opened = TypeVar("Opened")
_PATIENCE_S = 3600.0
"""Longest wait for another rank that is copying the tables."""


def cache_root(folder: str) -> Path:
    """Returns the folder of the cache: the one given, or, if that is '', fastbyol/data in the user's cache folder."""
    return Path(folder) if folder else cache_folder() / "data"


class StoreTables:
    """Converted data at a URL whose tables are on local disk.

    Attributes:
        path: what the backend opens: the folder with manifest and sample table, or a .beton with holes in place of its images.
    """

    def __init__(self, url: str, *, root: Path, limit_bytes: int, option: str) -> None:
        """Copies the tables, unless an earlier run has, into a folder in `root`, the cache of images, whose size is limited.

        option: name of the option that gave the URL, for messages.

        Raises:
            UserError: there are no converted data there, a package is missing, or the cache cannot be written.
            Lost: the store does not answer.
        """
        self._place, self._root, self._limit_bytes, self._option = StorePath.of(url), root, limit_bytes, option
        self._copy()

    @property
    def _is_beton(self) -> bool:
        return self._place.suffix == ".beton"

    def cache(
        self,
        names: Sequence[str],
        *,
        file: NDArray[np.integer],
        offset: NDArray[np.int64],
        size: NDArray[np.integer],
        crc32: NDArray[np.uint32],
    ) -> BlockCache:
        """Returns the cache of these files of the store, given the place and checksum of each sample."""
        return BlockCache(
            [self._place if self._is_beton else self._place / name for name in names],
            file=file,
            offset=offset,
            size=size,
            crc32=crc32,
            folder=self._folder,
            root=self._root,
            limit_bytes=self._limit_bytes,
        )

    def opened(self, make: Callable[[Path], Opened]) -> Opened:
        """Returns what `make` returns for `path`; its errors name the URL. If it refuses the tables, they are fetched once more: the copy may
        have been damaged on its way or here.
        """
        refused = stamp_of(self._table.stat())
        try:
            return make(self.path)
        except UserError as error:
            if str(self.path) not in str(error):
                raise
            log.warning("%s; the tables are fetched again", error)
        self._copy(refused=refused)
        with self._named(self.path):
            return make(self.path)

    @contextmanager
    def _named(self, path: Path) -> Iterator[None]:
        """Lets errors about the copied tables, at this path, name the URL."""
        try:
            yield
        except UserError as error:
            raise UserError(str(error).replace(str(path), str(self._place))) from error

    @property
    def _table(self) -> Path:
        return self.path if self._is_beton else self.path / SAMPLE_TABLE

    def _lacks_table(self, refused: Stamp | None) -> bool:
        """Returns True if the table has to be fetched: there is none, or only the refused one, which no other rank has replaced yet."""
        return not self._table.exists() or stamp_of(self._table.stat()) == refused

    def _copy(self, *, refused: Stamp | None = None) -> None:
        """Copies the tables. refused: stamp of a copy of the table that is not used again."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            if self._is_beton:
                self._copy_beton(refused)
            else:
                self._copy_shards(refused)
        except OSError as error:
            raise UserError(f"data.cache = {self._root}: cannot be written ({error.strerror or error}); give another folder") from error

    def _copy_shards(self, refused: Stamp | None) -> None:
        try:
            manifest = _head(self._place / TAR_MANIFEST, MAX_MANIFEST_BYTES + 1)
        except UserError as error:
            raise UserError(
                f"{self._option} = {self._place}: no converted data there ({error}); give a .beton file or a folder of tar shards written by "
                "python -m fastbyol convert"
            ) from error
        self._folder = self.path = self._folder_for(manifest)
        with self._copying():
            self._write(self.path / TAR_MANIFEST, [manifest])
            with self._named(self.path):
                samples = read_manifest(self.path / TAR_MANIFEST).num_samples
            if self._lacks_table(refused):
                table = self._place / SAMPLE_TABLE
                # One byte more than the largest table is enough for its reader to see that this is another file.
                self._write(self._table, _pieces(table, 0, min(table.stat().size, largest_sample_table(samples) + 1)))

    def _copy_beton(self, refused: Stamp | None) -> None:
        name = self._place.local_name
        manifest, status = b"", self._place.stat()
        with suppress(UserError):  # a .beton without a manifest: its reader warns of that
            manifest = _head(self._place.with_name(f"{name}.json"), MAX_MANIFEST_BYTES + 1)
        # A file that replaces this one later differs in what the store says about it, or in the beginning of its table.
        self._folder = self._folder_for(repr(tuple(status)).encode(), self._place.read(0, min(status.size, 1 << 16)), manifest)
        self.path = self._folder / name
        with self._copying():
            if self._lacks_table(refused):
                if manifest:
                    self._write(beton_manifest_path(self.path), [manifest])
                unfinished = self._folder / "tables.unfinished"
                with self._named(unfinished):
                    copy_tables(partial(_pieces, self._place), status.size, unfinished)
                flush_to_disk(unfinished)
                unfinished.replace(self.path)
                flush_to_disk(self._folder)

    def _folder_for(self, *facts: bytes) -> Path:
        """Returns the folder for the tables of this URL's data; `facts` distinguish the data from earlier or later ones at the same URL."""
        digest = hashlib.sha256(json.dumps([str(self._place), MIN_PAGE_BYTES]).encode())
        for fact in facts:
            digest.update(hashlib.sha256(fact).digest())
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", self._place.name)[:40].strip(".")
        return self._root / f"{name or 'data'}-{digest.hexdigest()[:12]}"

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Lets one process at a time copy the tables."""
        descriptor = locked_file(self._folder / "lock", patience_s=_PATIENCE_S)
        try:
            yield
        finally:
            os.close(descriptor)

    def _write(self, path: Path, pieces: Iterator[bytes] | Sequence[bytes]) -> None:
        with durable_file(path) as file:
            for piece in pieces:
                write_all(file, piece)


def _head(place: StorePath, at_most: int) -> bytes:
    """Returns the first `at_most` bytes, or all of a shorter file."""
    return place.read(0, min(place.stat().size, at_most))


def _pieces(place: StorePath, start: int, end: int) -> Iterator[bytes]:
    """Yields the bytes [start, end) in pieces."""
    for at in range(start, end, BLOCK_BYTES):
        yield place.read(at, min(BLOCK_BYTES, end - at))
