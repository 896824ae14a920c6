"""A file or folder at a URL, used where the rest of the code has a `Path`: by its name, size, bytes and children.

It holds the URL without secrets, which is also its text, so it can go into any message or file. Every request is retried (`stores`).
"""

from __future__ import annotations

import hashlib
import io
import posixpath
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast
from urllib.parse import quote, unquote

from fastbyol.config.errors import UserError
from fastbyol.config.urls import Secrets, is_url, keep_secrets, public_text, secrets_of
from fastbyol.host.stores import Absent, Refused, retried, store_of
from fastbyol.host.web_reading import web_bytes

REQUESTS = 32
"""Number of requests that run at a time where many files are asked for: most of the time is network latency."""
LISTINGS = 8
"""Folders that are listed at a time."""
BLOCK_BYTES = 8 << 20
"""Bytes that are fetched at a time where a file is read from front to back."""
_VERSION_FIELDS = ("ETag", "etag", "blob_id", "generation", "md5Hash", "Last-Modified", "LastModified", "updated", "mtime", "created")
"""Fields of fsspec's file information that change when a file is replaced; each store has some of them."""
_FILE_SUFFIXES = (".tar", ".parquet", ".beton", ".json", ".txt", ".csv", ".tsv", ".lst", ".npz", ".npy")
Item = TypeVar("Item")
Answer = TypeVar("Answer")


class StoreStatus(NamedTuple):
    """size: in bytes. version: a number that changes with the content; 0 if the store reports only the size."""

    size: int
    version: int


class StoreEntry(NamedTuple):
    """name: relative to the folder that was listed, with '/'. size: -1 if the listing does not state it."""

    name: str
    size: int


@dataclass(frozen=True, slots=True, order=True)
class StorePath:
    """A file or folder at a URL. `StorePath.of` makes one of what a user typed."""

    url: str
    """The URL, from which user name, password and query are taken out."""

    @classmethod
    def of(cls, text: str, *, queries: dict[str, str] | None = None) -> StorePath:
        """Returns the place of a URL as typed; its secrets are kept in memory. queries: as `public_text` has it."""
        try:
            public = public_text(text, queries=queries)
        except ValueError as error:
            raise UserError(str(error)) from None
        # Slashes at the end are a habit of typing; those inside a URL are part of names in a store.
        scheme, _, place = public.partition("://")
        return cls(f"{scheme}://{place.rstrip('/')}")

    def __reduce__(self) -> tuple[Callable[[str, str, Secrets], StorePath], tuple[str, str, Secrets]]:
        # A worker process needs the secrets too. They are sent beside the URL, where '#' and '?' in an object's name would be taken for their start.
        return _with_secrets, (self.url, *secrets_of(self.url))

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> StorePath:
        return StorePath(f"{self.url}/{quote(name) if self.is_web else name}")

    @property
    def is_web(self) -> bool:
        """True for a plain web server, which cannot be written to, and lists folders only as pages of links."""
        return self.url.startswith(("http://", "https://"))

    @property
    def name(self) -> str:
        name = self.url.rpartition("/")[2]
        return unquote(name) if self.is_web else name

    @property
    def local_name(self) -> str:
        """The name, for a copy on this machine. Raises UserError if no file can have it."""
        if "/" in self.name or "\0" in self.name:
            raise UserError(f"{self}: its name holds a '/' (written %2F) or a zero byte, which no file of this machine can have; rename it")
        return self.name

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> StorePath:
        return StorePath(self.url.rpartition("/")[0]) if self.url.count("/") > 2 else self

    @property
    def as_path(self) -> str:
        """The URL as an absolute path, '/s3/bucket/folder', by which names relative to another place are formed."""
        scheme, _, place = self.url.partition("://")
        return f"/{scheme}/{unquote(place) if self.is_web else place}"

    def above(self, path: str) -> StorePath:
        """Returns the folder of the same store that has this `as_path`."""
        place = path.split("/", 3)[2:]
        return StorePath(f"{self.url.partition('://')[0]}://{'/'.join([place[0], *map(quote if self.is_web else str, place[1:])])}")

    def with_name(self, name: str) -> StorePath:
        return self.parent / name

    def with_suffix(self, suffix: str) -> StorePath:
        return self.with_name(posixpath.splitext(self.name)[0] + suffix)

    def absolute(self) -> StorePath:
        return self

    def store(self) -> tuple[Any, str]:
        """Returns fsspec's file system and the path in it."""
        return store_of(self.url, option="URL")

    def stat(self) -> StoreStatus:
        """Returns size and version. Raises UserError if there is no such file, or its size is not told."""
        info = self._info()
        if not isinstance(info.get("size"), int):
            raise UserError(f"{self}: the server does not say how large it is; fetch the file first")
        told = "\0".join(f"{name}={info[name]}" for name in _VERSION_FIELDS if info.get(name))
        version = int.from_bytes(hashlib.sha256(told.encode()).digest()[:6], "big") if told else 0
        return StoreStatus(info["size"], version)

    def exists(self) -> bool:
        """Returns False if nothing is there, or the store does not let us know: S3 refuses access to a missing file where listing is refused."""
        try:
            self._info()
        except (Absent, Refused):
            return False
        return True

    def is_file(self) -> bool:
        return self.exists() and not self.is_dir()

    def is_dir(self) -> bool:
        if self.suffix.lower() in _FILE_SUFFIXES:
            return False
        try:
            info = self._info()
        except (Absent, Refused):
            return False
        # fsspec takes every URL for a file, and would fetch it whole to look for links in it.
        return info.get("mimetype") == "text/html" if self.is_web else info.get("type") == "directory"

    def _info(self) -> dict[str, Any]:
        fs, path = self.store()
        return retried(lambda: fs.info(path), str(self))

    def read(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset`, all of them."""
        return b"" if not size else retried(lambda: self.read_once(offset, size), str(self))

    def read_once(self, offset: int, size: int) -> bytes:
        """Returns what `read` does, asking once. Raises an error of the store's library, or OSError if the body is cut."""
        fs, path = self.store()
        end = offset + size
        data = web_bytes(fs, path, shown=str(self), start=offset, size=size) if self.is_web else fs.cat_file(path, start=offset, end=end)
        if len(data) != size:
            raise OSError(f"{len(data):,} of {size:,} bytes arrived")
        return data

    def read_bytes(self) -> bytes:
        """Returns the whole file."""
        fs, path = self.store()
        return retried(lambda: web_bytes(fs, path, shown=str(self)) if self.is_web else fs.cat_file(path), str(self))

    def open(self, mode: str = "rb") -> BinaryIO:
        """Returns the file for reading, fetched in large blocks."""
        assert mode == "rb"
        return cast(BinaryIO, io.BufferedReader(_StoreFile(self), BLOCK_BYTES))

    def children(self) -> tuple[list[StoreEntry], list[str]]:
        """Returns the files directly in this folder, and the names of the folders in it, sorted."""
        fs, path = self._listable()
        found = retried(lambda: fs.ls(path, detail=True), str(self))
        folders = {_relative(entry["name"], path, web=self.is_web) for entry in found if entry["type"] == "directory"}
        return sorted(_entries(found, path, web=self.is_web)), sorted(name for name in folders if name)

    def walk(self) -> Iterator[StoreEntry]:
        """Yields all files below this folder. Its folders are listed separately, a few at a time, because a store's answer takes a kilobyte of
        memory for each file.
        """
        files, folders = self.children()
        yield from files
        for folder, found in zip(folders, at_once(lambda name: (self / name)._all_below(), folders, requests=LISTINGS), strict=True):
            yield from (StoreEntry(f"{folder}/{name}", size) for name, size in found)

    def _all_below(self) -> list[StoreEntry]:
        fs, path = self._listable()
        # fsspec leaves out folders that cannot be listed, unless it is told not to; stores that list all at once know no such option.
        strict = {"on_error": "raise"} if self.is_web else {}
        found = retried(lambda: fs.find(path, detail=True, **strict), str(self))
        return sorted(_entries(found.values(), path, web=self.is_web))

    def _listable(self) -> tuple[Any, str]:
        fs, path = self.store()
        if self.is_web and "?" in path:
            raise UserError(f"{self}: a folder of a web server cannot be listed by a URL with a query; give a list of the files' URLs")
        return fs, f"{path}/" if self.is_web else path


Place = Path | StorePath


def place_of(text: str) -> Place:
    """Returns the place that a path or URL names."""
    return StorePath.of(text) if is_url(text) else Path(text)


def known_place(text: str) -> Place:
    """Returns the place of a path or URL that we wrote ourselves: '#' and '?' belong to its name, unlike in one that a user typed."""
    return StorePath(text) if is_url(text) else Path(text)


def open_unbuffered(place: Place) -> BinaryIO:
    """Returns the file for reading: a local one unbuffered, since tables and headers are read where they lie; one at a URL in large blocks."""
    return place.open() if isinstance(place, StorePath) else cast(BinaryIO, open(place, "rb", buffering=0))


def at_once(call: Callable[[Item], Answer], items: Sequence[Item], *, requests: int = REQUESTS) -> Iterator[Answer]:
    """Yields the results of the calls, in order; up to `requests` run at a time."""
    with ThreadPoolExecutor(min(requests, max(1, len(items))), thread_name_prefix="fastbyol-store") as pool:
        try:
            yield from pool.map(call, items)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _with_secrets(url: str, kept_for: str, secrets: Secrets) -> StorePath:
    """Returns the place of a URL whose secrets another process has."""
    if any(secrets):
        keep_secrets(kept_for, secrets)
    return StorePath(url)


def _entries(found: Iterable[dict[str, Any]], root: str, *, web: bool) -> Iterator[StoreEntry]:
    for entry in found:
        name = _relative(entry["name"], root, web=web)
        # Links with a query sort the page; an empty file named 'folder/' is how some programs make a folder.
        if entry["type"] == "file" and name and not name.endswith("/") and not (web and "?" in entry["name"]):
            yield StoreEntry(name, entry["size"] if isinstance(entry.get("size"), int) else -1)


def _relative(name: str, root: str, *, web: bool) -> str:
    name = name.removeprefix(root.rstrip("/")).strip("/")
    return unquote(name) if web else name


class _StoreFile(io.RawIOBase):
    """Reads a file at a URL as Python's own files are read; each read is one request."""

    def __init__(self, place: StorePath) -> None:
        self._place, self._at, self._size = place, 0, place.stat().size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        buffer[:wanted] = self._place.read(self._at, wanted)
        self._at += wanted
        return wanted
