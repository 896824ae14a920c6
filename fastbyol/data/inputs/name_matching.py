"""Finds the images that a list of names means: a list made elsewhere names them with other folders in front, or with none."""

from __future__ import annotations

import codecs
import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from fastbyol.config.errors import UserError
from fastbyol.data.inputs.listing import EXTENSIONS

MISSING, AMBIGUOUS = -1, -2
"""In the place of an image's place: there is none of this name, or more than one that it may mean."""
_LARGEST_FILE = 1 << 28
"""Bytes of a list; ImageNet's largest has 8 MB."""
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class NameIndex:
    """The images of a listing, to be found by names that others gave to them.

    A name means the image that it ends with ('/data/train/a/1.jpg' means 'a/1.jpg'; the longest, if it is several), or else the one that ends
    with it ('1.jpg' means 'a/1.jpg'); or else, where only one image has the longest end of the name and no image lies in its folder, that one
    ('val/x.jpg' means 'n01440764/x.jpg', but 'cat/1.jpg' does not mean 'dog/1.jpg' if there are cats). All of it counts for names without
    the extension, too.
    """

    def __init__(self, files: Sequence[str], root: Path) -> None:
        self._files = files
        self._roots = tuple({os.path.abspath(root) + "/", os.path.realpath(root) + "/"})
        self._full = _places((name, place) for place, name in enumerate(files))
        self._loose: dict[int, str] = {}

    def find(self, name: str) -> int:
        """The image's place, or MISSING or AMBIGUOUS."""
        if name in self._full:
            return self._full[name]
        place = self._find(name)
        if place == MISSING and name != name.strip():
            place = self._find(name.strip())
        return self._find(name.replace("\\", "/")) if place == MISSING and "\\" in name else place

    def _find(self, name: str) -> int:
        if not name:
            return MISSING
        for root in self._roots:
            if name.startswith(root):
                name = name[len(root) :]
        if name.startswith((".", "/")) or "//" in name or "/." in name:
            name = posixpath.normpath(name).lstrip("/")
        if name in self._full:
            return self._full[name]
        place = self._among(name, self._full, self._ends)
        return place if place != MISSING or _has_extension(name) else self._among(name, *self._stems)

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
        # Two names with different folders for one image: one of them means another image, which is not here.
        return AMBIGUOUS if place != AMBIGUOUS and self._loose.setdefault(place, name) != name else place

    # Made when a name needs them: each takes 150 MB for ImageNet.
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


def read_text(path: Path) -> str:
    """The text of a list or table, whatever its byte order mark says, else UTF-8; bytes that are none are kept by surrogateescape.

    UserError for a file that cannot be read, is no text, or is too large.
    """
    content = limited_read(path)
    encoding = next((encoding for mark, encoding in _BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding, "surrogateescape").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no whole {encoding.upper()}, as its beginning says ({error.reason}); save it as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{path}: holds zero bytes, so it is no text, or UTF-16 without a byte order mark; save it as UTF-8")
    return text


def lines_of(text: str) -> list[str]:
    """Lines without their ends, be they of Unix, Windows or old Macs; a name may hold every other character that Unicode breaks lines at."""
    return re.split(r"\r\n|\n|\r", text)


def limited_read(path: Path) -> bytes:
    """The bytes of a list. UserError for a file that cannot be read, or is too large."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable file") from error
    if len(content) > _LARGEST_FILE:
        raise UserError(f"{path}: is too large for a list (more than {_LARGEST_FILE >> 20} MiB)")
    return content


def _places(names: Iterable[tuple[str, int]]) -> dict[str, int]:
    places: dict[str, int] = {}
    for name, place in names:
        places[name] = AMBIGUOUS if name in places else place
    return places


def _ends_of(name: str) -> Iterable[str]:
    """'b/1.jpg' and '1.jpg' of 'a/b/1.jpg'."""
    while "/" in name:
        name = name.partition("/")[2]
        yield name


def _has_extension(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)
