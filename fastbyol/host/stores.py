"""Files at URLs, in object stores and on web servers, through fsspec: s3://, gs://, hf://, https:// and the other schemes that it knows.

Nothing here is imported, and fsspec is not needed, until a URL is given. Credentials come from where each store's own library looks for
them (environment, configuration files), or from the URL; messages show a URL by `shown_url` only.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from fastbyol.config.console import say
from fastbyol.config.errors import Lost, UserError, first_line

WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds between tries: a store that answers again within a minute costs a run nothing but the wait."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
Result = TypeVar("Result")


def is_url(text: object) -> bool:
    """Returns True if the text begins with a scheme and '://'."""
    return bool(_URL.match(str(text)))


def shown_url(url: str) -> str:
    """Returns the URL without user name, password, query and fragment: these may hold credentials."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def store_of(url: str, *, option: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL, and the path in it.

    Raises UserError, naming the option, if fsspec or the store's own library is missing, or if no library knows the scheme.
    """
    scheme = urlsplit(url).scheme
    try:
        import fsspec
        import fsspec.core

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(
            f"{option} = {shown_url(url)}: reading {scheme}:// needs a package ({first_line(error)}): pip install 'fastbyol[remote]'"
        ) from None
    except ValueError:
        known = "s3, gs, hf, http and https"
        raise UserError(f"{option} = {shown_url(url)}: fsspec knows no scheme '{scheme}'; use {known}, or another that it lists") from None


def retried(call: Callable[[], Result], what: str, *, waits_s: tuple[float, ...] = WAITS_S) -> Result:
    """Returns what `call` returns, tried again after each of `waits_s` where the store does not answer.

    `what` names the file for messages, already without credentials. Raises UserError if the store answers that the file is not there or
    that access is refused, which no second try would change, and Lost if the last try fails too.
    """
    for wait_s in (*waits_s, None):
        try:
            return call()
        except _ABSENT:
            raise UserError(f"{what}: no such file in the store; check the address") from None
        except PermissionError as error:
            raise UserError(f"{what}: the store refuses access ({_without_urls(error)}); check the credentials of this machine") from None
        except Exception as error:
            if not _is_trouble(error):
                raise
            if wait_s is None:
                raise Lost(f"{what}: the store did not answer in {len(waits_s) + 1} tries ({_without_urls(error)})") from None
            say(f"{what}: {_without_urls(error)}; tried again in {wait_s:g} s")
            time.sleep(wait_s)
    raise AssertionError("unreachable: the last wait is None")


def _is_trouble(error: Exception) -> bool:
    """Returns True for what stores raise when they are slow, busy or away; their libraries have exceptions of their own."""
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, (OSError, TimeoutError, asyncio.TimeoutError)) or module in (
        "aiohttp",
        "botocore",
        "aiobotocore",
        "fsspec",
        "s3fs",
        "gcsfs",
    )


def _without_urls(error: Exception) -> str:
    """Returns the error's first line with each URL in it as `shown_url` shows it."""
    return re.sub(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\")>]+", lambda match: shown_url(match.group()), first_line(error))
