"""Printing that is safe whatever a name contains: no escape sequence reaches the terminal, and no encoding error ends the command.

File and class names may hold any bytes: escape sequences that hide a line or change the window's title, a line break that forges a
message, bytes that are not UTF-8. Everything that is printed or logged goes through `printable`, which also takes the secrets out of URLs.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import unicodedata
from pathlib import Path
from typing import Any, TextIO

from fastbyol.config.urls import without_credentials

_ESCAPED = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode categories of control characters, lone surrogates, and line and paragraph separators."""
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that change the writing direction and can make a line read differently from what it contains."""


def printable(text: str) -> str:
    r"""Returns the text as one line that is safe to show: '\x1b[8m' for an escape sequence, '\n' for a line break, 'caf\xe9' for a
    non-UTF-8 byte. URLs are without user name, password and query.
    """
    text = without_credentials(text)
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # Python decodes non-UTF-8 bytes of a name to these (surrogateescape)
        return f"\\x{ord(character) - 0xDC00:02x}"
    escaped = unicodedata.category(character) in _ESCAPED or character in _DIRECTIONS
    return character.encode("unicode_escape").decode() if escaped else character


def say(*lines: str, file: TextIO | None = None) -> None:
    """Prints each text as one printable line, to stdout or the given file; flushes at once if that is stderr."""
    for line in lines:
        print(printable(line), file=file, flush=file is sys.stderr)


def accept_any_text() -> None:
    """Makes stdout and stderr escape characters that their encoding lacks; otherwise a name under LANG=C would raise UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a program or a test may have replaced it with another object
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:  # prints the warnings of commands that have not set up logging
        logging.lastResort.setFormatter(PrintableFormatter())


def in_utf8(folder: Path) -> str:
    """Returns a path to an existing folder for libraries that accept UTF-8 only. A name that is not UTF-8 is reached through an open
    descriptor (Linux).
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        return f"/proc/self/fd/{os.open(folder, os.O_RDONLY)}"  # stays open: we are not told when the library is done
    return str(folder)


class PrintableFormatter(logging.Formatter):
    """Formats a log record as one printable line; a traceback below it keeps its line breaks."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # the name is logging's
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(printable, super().formatException(ei).split("\n")))
