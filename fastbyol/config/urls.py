"""Separates URLs from their secrets: user name, password and query are kept in memory only, and all other code sees the rest.

A command takes the secrets out of its arguments before anything else reads them, and code that opens the URL gets them back here. So no
message, log, provenance or written file can hold them.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SEPARATOR = re.compile(r"::(?![0-9A-Fa-f:.]*\])")
"""'::' between several sources in one text, but not inside an IPv6 address such as [::1]."""
_END_IN_MESSAGE = re.compile(r"[\s'\"<>]")
_SHORTEST_SECRET = 4
"""Shorter texts are not looked for in messages: they would be found in ordinary words."""


class Secrets(NamedTuple):
    """The parts of a URL that are kept in memory only and shown nowhere."""

    user_info: str
    """'user:password', or ''."""
    query: str
    """The query with its '?', or the fragment with its '#'; '' if the URL has neither."""


_known: dict[str, Secrets] = {}
"""Secrets, by the URL without them; user name and password also by scheme and host."""


def is_url(text: object) -> bool:
    """Returns True if the text begins with a scheme and '://'."""
    return bool(_URL.match(str(text)))


def shown_url(url: str) -> str:
    """Returns the URL without user name, password, query and fragment: these may hold credentials."""
    return _parts(url)[0]


def separated(text: str) -> list[str]:
    """Returns the sources that '::' separates."""
    return _SEPARATOR.split(text)


def public_text(text: str, *, queries: dict[str, str] | None = None) -> str:
    """Returns an argument or setting with each URL in it as `shown_url` shows it, and keeps what is left out for `full_url`.

    queries: those of earlier arguments of the same command, by URL; this text's are added.

    Raises ValueError if it is not clear where a secret ends, or if two URLs differ only in their query.
    """
    queries = {} if queries is None else queries
    shown, rest = "", text
    while start := _URL.search(rest):
        end = _SEPARATOR.search(rest, start.end())
        url, after = (rest[start.start() : end.start()], rest[end.start() :]) if end else (rest[start.start() :], "")
        public, secrets = _parts(url)
        if secrets.query and after and not re.match(r"::([A-Za-z][A-Za-z0-9+.-]*://|[./~])", after):
            raise ValueError(f"{public}: its query holds '::', which separates sources; write %3A%3A")
        if _port_is_no_number(public):
            raise ValueError(f"the {public.partition(':')[0]}:// URL has a password with a '/' or '@' in it; write %2F or %40")
        if secrets.query and queries.setdefault(public, secrets.query) != secrets.query:
            raise ValueError(f"{public}: is given with two different queries; fetch one of the files first")
        if secrets != Secrets("", ""):
            keep_secrets(public, secrets)
        shown += rest[: start.start()] + public
        rest = after
    return shown + rest


def full_url(public: str) -> str:
    """Returns the URL with the secrets that `public_text` took out of it, out of a folder above it, or out of another URL of the same host."""
    scheme, _, after = public.partition("://")
    _, (user_info, query) = secrets_of(public)
    return f"{scheme}://{user_info}{'@' if user_info else ''}{after}{query}"


def secrets_of(public: str) -> tuple[str, Secrets]:
    """Returns the URL for which secrets are kept (this one, a folder above it, or its host), and those secrets, which `full_url` puts back."""
    at = public if public in _known else public.removesuffix(".json")  # the manifest beside a file
    while at not in _known and at.count("/") > 2:
        at = at.rstrip("/").rpartition("/")[0]
    return at, _known.get(at, Secrets("", ""))


def keep_secrets(public: str, secrets: Secrets) -> None:
    """Keeps secrets, which `full_url` puts back into this URL and those below it; user name and password also into all URLs of its host."""
    _known[public] = secrets
    if secrets.user_info:
        _known[_origin(public)] = Secrets(secrets.user_info, "")


def without_credentials(text: str) -> str:
    """Returns a message with each URL in it as `shown_url` shows it, and with '***' for secrets that `public_text` keeps."""
    if "://" in text:
        shown, rest = "", text
        while start := _URL.search(rest):
            ends = [found.start() for found in (_END_IN_MESSAGE.search(rest, start.end()), _SEPARATOR.search(rest, start.end())) if found]
            end = min(ends, default=len(rest))
            shown, rest = shown + rest[: start.start()] + shown_url(rest[start.start() : end]), rest[end:]
        text = shown + rest
    for secrets in _known.values():
        for secret in (secrets.user_info, secrets.user_info.partition(":")[2], secrets.query[1:]):
            if len(secret) >= _SHORTEST_SECRET:
                text = text.replace(secret, "***")
    return text


def _parts(url: str) -> tuple[str, Secrets]:
    """Returns the URL without its secrets, and the secrets."""
    scheme, _, after = url.partition("://")
    place = re.split(r"[?#]", after, maxsplit=1)[0]
    host, slash, path = place.partition("/")
    user_info, _, host = host.rpartition("@")
    return f"{scheme}://{host}{slash}{path}", Secrets(user_info, after[len(place) :])


def _port_is_no_number(public: str) -> bool:
    """Returns True if the port is not a number, as in 'https://user:a/b@host/x': a password with '/' or '@' was cut at the wrong place."""
    host = public.partition("://")[2].partition("/")[0]
    return "@" in public and ":" in host and not re.fullmatch(r"(\[[^\]]*\]|[^:]*):\d*", host)


def _origin(public: str) -> str:
    scheme, _, after = public.partition("://")
    return f"{scheme}://{after.partition('/')[0]}"
