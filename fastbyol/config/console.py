"""What a command says, on a terminal or in a log: no name can give the terminal orders, and no encoding can end the command.

File and class names hold whatever bytes their author chose: escape sequences that hide a line or change the window's title, a line break that
forges a message, bytes that are not UTF-8. Everything that is printed or logged passes `printable`.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import unicodedata
from pathlib import Path
from typing import Any, TextIO

_ESCAPED = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode's categories of control characters, lone surrogates, and separators of lines and paragraphs."""
_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Marks that change the direction of writing, and so what a reader takes a line for."""


def printable(text: str) -> str:
    r"""The text in one line that is safe to show: '\x1b[8m' for an escape sequence, '\n' for a line break, 'caf\xe9' for a byte that is no UTF-8."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # how Python holds a byte of a name that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    escaped = unicodedata.category(character) in _ESCAPED or character in _DIRECTIONS
    return character.encode("unicode_escape").decode() if escaped else character


def say(*lines: str, file: TextIO | None = None) -> None:
    """Prints each text as one printable line, on stdout or what else is given, and hands it on at once where that is stderr."""
    for line in lines:
        print(printable(line), file=file, flush=file is sys.stderr)


def accept_any_text() -> None:
    """Lets stdout and stderr escape what their encoding lacks: a name, or a sign of ours under LANG=C, would raise UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not where a program or a test has put another object there
            stream.reconfigure(errors="backslashreplace")
    if logging.lastResort is not None:  # what prints a warning of a command that keeps no log
        logging.lastResort.setFormatter(PrintableFormatter())


def in_utf8(folder: Path) -> str:
    """Returns a path to an existing folder for libraries that take UTF-8 only; for a name that is none, a way through the open folder (Linux)."""
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        return f"/proc/self/fd/{os.open(folder, os.O_RDONLY)}"  # open as long as the process: who writes there does not say when it ends
    return str(folder)


class PrintableFormatter(logging.Formatter):
    """Formats a log record as one printable line; a traceback below it keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # logging's name
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return "\n".join(map(printable, super().formatException(ei).split("\n")))
