"""One file of a store, read in byte ranges; each read is complete or an error."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from fastbyol.config.errors import UserError
from fastbyol.config.urls import shown_url
from fastbyol.host.stores import retried, store_of

READ_TIMEOUT_S = 60.0
"""Time for one range of a few MiB: a server that accepts connections but does not answer would otherwise hold a thread for minutes."""
_PIECE_BYTES = 8 << 20


def url_in(folder: str, name: str) -> str:
    """Returns the URL of a file in a folder's URL, whose query it keeps: in signed URLs that is the signature."""
    path, mark, query = folder.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


class StoreFile:
    """A file at a URL, which may be read from several threads.

    Attributes:
        shown: the URL as messages show it.
    """

    def __init__(self, url: str, *, option: str) -> None:
        """Raises UserError if the URL's scheme needs a package that is not installed. Asks the store for nothing."""
        self.shown = shown_url(url)
        self._files, self._path = store_of(url, option=option)

    def size(self) -> int:
        """Returns the file's size in bytes, asking again while the store is in trouble. Raises UserError if the store does not tell it."""
        size = self._facts().get("size")
        if size is None:
            raise UserError(
                f"{self.shown}: the store tells no size; use one that knows its files, such as S3 or a web server of static files"
            )
        return int(size)

    def version(self) -> str:
        """Returns a text that changes if the file is replaced, as far as the store tells."""
        facts = self._facts()
        return repr([facts.get(name) for name in ("size", "ETag", "LastModified", "mtime", "created")])

    def read(self, start: int, end: int) -> bytes:
        """Returns the bytes [start, end), asking once. Raises an error of the store's library, or OSError if the body is cut."""
        data = self._read(start, end)
        if len(data) > end - start:
            raise UserError(f"{self.shown}: the server sends the whole file where a part is asked for; use one that knows byte ranges")
        if len(data) < end - start:
            raise OSError(f"the store sent {len(data):,} of {end - start:,} bytes")
        return data

    def head(self, at_most: int) -> bytes:
        """Returns the first `at_most` bytes, or all of a shorter file, asking again while the store is in trouble."""
        return retried(lambda: self._read(0, at_most), self.shown)[:at_most]

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Yields the bytes [start, end) in pieces, each asked for again while the store is in trouble."""
        for at in range(start, end, _PIECE_BYTES):
            yield retried(partial(self.read, at, min(at + _PIECE_BYTES, end)), self.shown)

    def _facts(self) -> dict[str, Any]:
        return retried(lambda: self._asked("info", self._path), self.shown)

    def _read(self, start: int, end: int) -> bytes:
        return self._asked("cat_file", self._path, start=start, end=end) if end > start else b""

    def _asked(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Returns what a method of the file system returns, within a time limit where it has one."""
        if not getattr(self._files, "async_impl", False):
            return getattr(self._files, method)(*arguments, **options)
        from fsspec.asyn import sync

        return sync(self._files.loop, getattr(self._files, f"_{method}"), *arguments, timeout=READ_TIMEOUT_S, **options)
