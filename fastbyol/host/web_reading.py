"""Reads files of web servers, or parts of them: never more than was asked for, and not for ever if a server sends a byte now and then."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

from fastbyol.config.errors import UserError
from fastbyol.host.stores import CONNECT_S, SILENT_S

GRACE_S = 60.0
"""Seconds that every request may take; beyond them it has to bring SLOWEST_BYTES_S."""
SLOWEST_BYTES_S = 32 << 10
"""Bytes per second: 32 requests at a time bring this over a line of 8 Mbit/s."""


def web_bytes(fs: Any, url: str, *, shown: str, start: int = 0, size: int | None = None) -> bytes:
    """Returns `size` bytes from `start`, fewer if the file ends there; the whole file if `size` is None.

    Args:
        fs: fsspec's file system of the URL.
        url: the URL with its secrets; `shown` is without, for messages.

    Raises:
        UserError: the server sends more than the part that was asked for, or knows no parts.
        OSError: it sends too slowly. The errors of aiohttp besides.
    """
    import fsspec.asyn

    return cast(bytes, fsspec.asyn.sync(fs.loop, _fetched, fs, url, shown, start, size))


async def _fetched(fs: Any, url: str, shown: str, start: int, size: int | None) -> bytes:
    import aiohttp

    begun, session = time.monotonic(), await fs.set_session()
    headers = {} if size is None else {"Range": f"bytes={start}-{start + size - 1}"}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENT_S)
    try:
        async with asyncio.timeout(GRACE_S):
            answer = await session.get(fs.encode_url(url), headers=headers, timeout=timeout)
    except TimeoutError as error:  # fsspec would take its text away
        raise OSError(str(error) or f"no answer in {GRACE_S:g} s") from None
    async with answer:
        if answer.status == 416:  # the file ends before the part
            return b""
        answer.raise_for_status()
        is_part = answer.status == 206 or answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        if start and not is_part:
            raise UserError(f"{shown}: the server sends the whole file when a part is asked for; fetch the file first")
        pieces, arrived = list[bytes](), 0
        # Read some 100 kB at a time, and stop where the part should end: a server may send more, or the whole file for a part at its start.
        while (size is None or arrived <= size) and (piece := await answer.content.readany()):
            pieces.append(piece)
            arrived += len(piece)
            if (taken_s := time.monotonic() - begun) > GRACE_S + arrived / SLOWEST_BYTES_S:
                raise OSError(f"{arrived:,} bytes arrived in {taken_s:.0f} s")
    if size is not None and arrived > size and is_part:
        raise UserError(f"{shown}: the server sends more than the {size:,} bytes that it is asked for; fetch the file first")
    return b"".join(pieces)[:size]
