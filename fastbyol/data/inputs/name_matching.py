"""Matches a list of names to images. A list made elsewhere may have other folders in front of the names, or none."""

from __future__ import annotations

import codecs
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice

from fastbyol.config.errors import UserError
from fastbyol.data.inputs.listing import EXTENSIONS, why_too_long
from fastbyol.host.store_path import Place, StorePath, open_unbuffered

MISSING, AMBIGUOUS = -1, -2
"""Results in place of an image's index: no image has this name, or several could be meant."""
_PIECE = 1 << 20
_LARGEST_FILE = 1 << 28
"""Largest list that is read, in bytes; ImageNet's largest has 8 MB."""
_BYTE_ORDER_MARKS = {  # UTF-32's before UTF-16's, which are the beginning of them
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


class NameIndex:
    """Index of a listing's images that finds them by names from other sources.

    A name matches, in this order:
    - the image whose name is the end of it: '/data/train/a/1.jpg' matches 'a/1.jpg' (if there are several, the longest);
    - the image whose name ends with it: '1.jpg' matches 'a/1.jpg';
    - the only image that shares the longest possible end with it, if the listing has no folder of the name's folder: 'val/x.jpg' matches
      'n01440764/x.jpg', but 'cat/1.jpg' does not match 'dog/1.jpg' if there is a folder 'cat'.
    The same rules apply to names without an extension.
    """

    def __init__(self, files: Sequence[str], root: Place) -> None:
        self._files = files
        self._roots = (f"{root}/",) if isinstance(root, StorePath) else tuple({os.path.abspath(root) + "/", os.path.realpath(root) + "/"})
        self._full = _places((name, place) for place, name in enumerate(files))
        self._loose: dict[int, str] = {}

    def find(self, name: str) -> int:
        """Returns the image's index in the listing, or MISSING or AMBIGUOUS."""
        if name in self._full:
            return self._full[name]
        place = self._find(name)
        if place == MISSING and name != name.strip():
            place = self._find(name.strip())
        return self._find(name.replace("\\", "/")) if place == MISSING and "\\" in name else place

    def _find(self, name: str) -> int:
        if not name or why_too_long(name):
            return MISSING
        for root in self._roots:
            if name.startswith(root):
                name = name[len(root) :]
        if name.startswith((".", "/")) or "//" in name or "/." in name:
            name = posixpath.normpath(name).lstrip("/")
        if name in self._full:
            return self._full[name]
        place = self._among(name, self._full, self._ends)
        return place if place != MISSING or name.lower().endswith(EXTENSIONS) else self._among(name, *self._stems)

    def _among(self, name: str, full: dict[str, int], ends: dict[str, int]) -> int:
        if name in full:
            return full[name]
        tails = tuple(_ends_of(name))
        ends_with = next((full[tail] for tail in tails if tail in full), MISSING)
        is_end_of = ends.get(name, MISSING)
        if MISSING not in (ends_with, is_end_of):
            return AMBIGUOUS
        if (place := is_end_of if ends_with == MISSING else ends_with) != MISSING:
            return place
        tail = next((tail for tail in tails if tail in ends), "")
        if not tail or name[: -len(tail) - 1].rpartition("/")[2] in self._folders:
            return MISSING
        place = ends[tail]
        # Two names with different folders match one image: one of them must mean another image, which is not in the listing.
        return AMBIGUOUS if place != AMBIGUOUS and self._loose.setdefault(place, name) != name else place

    # Built on first use only: each takes 150 MB for ImageNet.
    @cached_property
    def _ends(self) -> dict[str, int]:
        return _places((end, place) for place, name in enumerate(self._files) for end in _ends_of(name))

    @cached_property
    def _stems(self) -> tuple[dict[str, int], dict[str, int]]:
        stems = [posixpath.splitext(name)[0] for name in self._files]
        full = _places((stem, place) for place, stem in enumerate(stems))
        return full, _places((end, place) for place, stem in enumerate(stems) for end in _ends_of(stem))

    @cached_property
    def _folders(self) -> set[str]:
        return {part for folder in {name.rpartition("/")[0] for name in self._files} for part in folder.split("/")}


def read_text(path: Place, *, largest: int = _LARGEST_FILE) -> str:
    """Returns the text of a list or table, decoded as its byte order mark says, else as UTF-8 with surrogateescape for invalid bytes.

    Raises UserError if the file cannot be read, is not text, or has more than `largest` bytes.
    """
    content = limited_read(path, largest=largest)
    encoding = next((encoding for encoding, marks in _BYTE_ORDER_MARKS.items() if content.startswith(marks)), "utf-8")
    try:
        text = content.decode(encoding, "surrogateescape").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not valid {encoding.upper()}, although its byte order mark says so ({error.reason}); save it as UTF-8"
        ) from error
    if "\0" in text:
        raise UserError(f"{path}: holds zero bytes, so it is not text, or UTF-16 without a byte order mark; save it as UTF-8")
    return text


def lines_of(text: str) -> list[str]:
    """Splits text at the line ends of Unix, Windows and old Macs. Not str.splitlines, which also splits at characters that a name may have."""
    return re.split(r"\r\n|\n|\r", text)


def each_line(text: str) -> Iterator[str]:
    """Yields the lines of `lines_of` that are not empty, without a list of them all."""
    return (found[0] for found in re.finditer(r"[^\r\n]+", text))


def limited_read(path: Place, *, largest: int = _LARGEST_FILE) -> bytes:
    """Returns the bytes of a file. Raises UserError if it cannot be read or is too large."""
    try:
        with open_unbuffered(path) as file:  # in pieces: read(largest) would take that much memory at once
            pieces = iter(lambda: file.read(_PIECE), b"")
            content = b"".join(islice(pieces, largest // _PIECE + 1))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable file") from error
    if len(content) > largest:
        raise UserError(f"{path}: is too large for a list (more than {largest >> 20} MiB)")
    return content


def _places(names: Iterable[tuple[str, int]]) -> dict[str, int]:
    places: dict[str, int] = {}
    for name, place in names:
        places[name] = AMBIGUOUS if name in places else place
    return places


def _ends_of(name: str) -> Iterable[str]:
    """Yields the shorter paths at the end of a name: 'b/1.jpg' and '1.jpg' for 'a/b/1.jpg'."""
    while "/" in name:
        name = name.partition("/")[2]
        yield name
