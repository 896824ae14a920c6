"""Files at URLs, in object stores and on web servers, through fsspec: s3://, gs://, hf://, https:// and the other schemes that it knows.

Nothing here is imported, and fsspec is not needed, until a URL is given. Credentials come from where each store's own library looks for
them (environment, configuration files), or from the URL; messages show a URL by `shown_url` only.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from fastbyol.config.console import say
from fastbyol.config.errors import Lost, UserError, first_line
from fastbyol.config.urls import full_url, shown_url, without_credentials

WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds between tries: a store that answers again within a minute costs a run nothing but the wait."""
CONNECT_S, SILENT_S = 10.0, 30.0
"""A try fails if no connection is made, or nothing arrives, for so long."""
_PAGE_S = 600.0
"""Longest request to a web server for a page of links, or for the size of a file; others have a limit of their own (`web_reading`)."""
_OWN_RETRIES = 2
"""Tries of s3fs within each of ours; its default of 5, each of 5 of botocore's, would take an hour to find that a server is dead."""
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_LIBRARIES = ("aiohttp", "botocore", "aiobotocore", "fsspec", "s3fs", "gcsfs", "huggingface_hub", "requests", "urllib3", "httpx", "google")
_BUSY = (408, 425, 429)
"""HTTP's codes below 500 that a second try may change."""
Result = TypeVar("Result")


class Absent(UserError):
    """The store answers that there is no such file."""


class Refused(UserError):
    """The store refuses access."""


def store_of(url: str, *, option: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL, and the path in it.

    Raises UserError, naming the option, if fsspec or the store's own library is missing, or if no library knows the scheme.
    """
    url = full_url(url)
    scheme = urlsplit(url).scheme
    try:
        import fsspec
        import fsspec.core

        if scheme in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=_PAGE_S, sock_connect=CONNECT_S, sock_read=SILENT_S)
            # trust_env: proxies, and names and passwords of ~/.netrc.
            return fsspec.core.url_to_fs(url, client_kwargs={"timeout": timeout, "trust_env": True})
        # No cache of listings: it would hide what other processes write.
        options: dict[str, Any] = {"use_listings_cache": False}
        if scheme == "s3":
            place = urlsplit(url)
            options["config_kwargs"] = {"connect_timeout": CONNECT_S, "read_timeout": SILENT_S, "retries": {"total_max_attempts": 1}}
            if place.username:
                options |= {"key": unquote(place.username), "secret": unquote(place.password or "")}
                url = url.replace(place.netloc, place.netloc.rpartition("@")[2], 1)
        if scheme in ("file", "local"):
            options["auto_mkdir"] = True  # stores have no folders that must be there before a file
        fs, path = fsspec.core.url_to_fs(url, **options)
        if scheme == "s3":
            fs.retries = _OWN_RETRIES
        return fs, path
    except ImportError as error:
        package = {"gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "abfs": "adlfs", "az": "adlfs"}.get(scheme, "'fastbyol[remote]'")
        raise UserError(
            f"{option} = {shown_url(url)}: reading {scheme}:// needs a package ({first_line(error)}): pip install {package}"
        ) from None
    except ValueError:
        known = "s3, gs, hf, http and https"
        raise UserError(f"{option} = {shown_url(url)}: fsspec knows no scheme '{scheme}'; use {known}, or another that it lists") from None


def print_wait(text: str) -> None:
    """Prints why a store is asked again."""
    say(f"fastbyol: {text}", file=sys.stderr)


on_wait: Callable[[str], None] = print_wait
"""Called with a line for each wait for a store. A worker process, whose stderr nobody reads, puts another function here."""


def retried(call: Callable[[], Result], what: str, *, waits_s: tuple[float, ...] | None = None) -> Result:
    """Returns what `call` returns, tried again after each of `waits_s` (None: WAITS_S) where the store does not answer.

    `what` names the file for messages, already without credentials. Raises Absent or Refused if the store answers that the file is not there
    or that access is refused, which no second try would change, and Lost if the last try fails too.
    """
    waits_s = WAITS_S if waits_s is None else waits_s
    for wait_s in (*waits_s, None):
        try:
            return call()
        except Exception as error:
            if isinstance(error, UserError) or not _is_of_the_store(error):
                raise
            reason = without_credentials(first_line(_cause_of(error)))
            status = _status_of(error)
            if isinstance(_cause_of(error), _ABSENT) or status in (404, 410):
                raise Absent(f"{what}: no such file in the store; check the address") from None
            if isinstance(error, PermissionError) or status in (401, 403, 407) or "Credentials" in type(error).__name__:
                raise Refused(f"{what}: the store refuses access ({reason}); check the credentials of this machine") from None
            if status and status < 500 and status not in _BUSY:
                raise UserError(f"{what}: the store refuses the request ({reason}); check the address") from None
            if wait_s is None:
                raise Lost(f"{what}: the store did not answer in {len(waits_s) + 1} tries ({reason}); the same command continues") from None
            on_wait(f"{what}: {reason}; tried again in {wait_s:g} s")
            time.sleep(wait_s)
    raise AssertionError("unreachable: the last wait is None")


def _is_of_the_store(error: Exception) -> bool:
    """Returns True for what stores raise when they refuse, are slow, busy or away; their libraries have exceptions of their own."""
    known = isinstance(error, (OSError, TimeoutError, asyncio.TimeoutError))
    return known or type(error).__module__.partition(".")[0] in _LIBRARIES


def _cause_of(error: BaseException) -> Exception:
    """Returns the error behind fsspec's FileNotFoundError: its HTTP file system raises that for any failure of a HEAD request."""
    while isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception) and _status_of(error.__cause__) not in (404, 410):
        error = error.__cause__
    assert isinstance(error, Exception)
    return error


def _status_of(error: Exception) -> int:
    """Returns the HTTP status that the store answered, as its library keeps it, or 0."""
    error = _cause_of(error)
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        metadata = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        for status in (getattr(each, "status", 0), getattr(response, "status_code", 0), metadata.get("HTTPStatusCode", 0)):
            if isinstance(status, int) and 400 <= status < 600:
                return status
    return 0
