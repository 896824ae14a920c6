"""Lists the images that a file names: one path per line, or a table (CSV, TSV) with a column of paths, and one of labels on request.

Paths are relative to the list's folder, or absolute, or URLs, and the list itself may be at a URL. The order is that of the paths, as for a
folder, not that of the lines.
"""

from __future__ import annotations

import csv
import io
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.config.urls import is_url
from fastbyol.data.inputs.label_table import is_path_header, looks_like_file, plain_header
from fastbyol.data.inputs.listing import LEFT_OUT, LONGEST_SHOWN, ImageListing, in_sample_order, why_not_an_image, why_too_long
from fastbyol.data.inputs.name_matching import each_line, read_text
from fastbyol.data.inputs.packed_names import NamePacker, PackedNames
from fastbyol.data.inputs.store_folder import sizes_of
from fastbyol.host.store_path import Place, StorePath

_LARGEST_LIST = 1 << 30
"""Largest list that is read, in bytes: some twenty million paths."""


def list_paths(path: Place, *, path_column: str | None = None, label_column: str | None = None) -> ImageListing:
    """Returns the images that the file names.

    Args:
        path: the list. '.csv' and '.tsv' are tables with commas, semicolons or tabs; in another file each line is a path, unless a column is
            given.
        path_column: the column of paths, by name or by number from 1; None takes the one with a known header, or the one whose first entry
            exists.
        label_column: the column of labels, likewise; None: no labels.

    Raises:
        UserError: files are missing, there is no such column, or the list is empty or damaged.
    """
    # Nested, so that the text and the absolute paths are gone before the images are sorted.
    return in_sample_order(*_images_of(path, _read_list(path, path_column, label_column), labelled=label_column is not None))


@dataclass(frozen=True)
class _Listed:
    """The files that a list names, in its order."""

    first: str
    """The first path as it is written."""
    places: PackedNames
    """The absolute paths; for URLs, without the store's name."""
    folder: str
    """The deepest folder that holds all of them, as text with which every path begins."""
    root: Place
    """The same folder as a `Place`."""
    label: array[int]
    """Number of each file's label in `labels`."""
    labels: list[str]
    sizes: array[int] | None = None
    """Bytes of each file at a URL; None for local files, whose sizes are read when they are used."""
    how: str = ""
    """How the list was read, for a note."""


def _read_list(path: Place, path_column: str | None, label_column: str | None) -> _Listed:
    """Returns the files that a list names. Raises UserError in the cases of `list_paths`."""
    text = read_text(path, largest=_LARGEST_LIST)
    if path.suffix.lower() in (".csv", ".tsv") or path_column or label_column:
        rows, how = _table(path, text, path_column, label_column)
    else:
        rows, how = ((line.strip(), "") for line in each_line(text) if line.strip()), "a path in each line"
    return replace(_read_rows(path, rows), how=how)


def _images_of(path: Place, listed: _Listed, *, labelled: bool) -> tuple[ImageListing, NDArray[np.int32]]:
    """Returns the listed files that are images, in the list's order, and their labels. Raises UserError if there are none."""
    label_of = {name: label for label, name in enumerate(sorted(listed.labels))} if labelled else {}
    number_to_label = np.array([label_of.get(name, -1) for name in listed.labels], dtype=np.int32)
    skipped: list[tuple[str, str]] = []
    kept, labels, sizes = NamePacker(), array("i"), None if listed.sizes is None else array("q")
    start = len(listed.folder.rstrip("/")) + 1
    for index, (place, number) in enumerate(zip(listed.places, listed.label, strict=True)):
        name = place[start:]
        if reason := why_not_an_image(os.path.basename(name)) or why_too_long(name):
            skipped.append((name, reason))
            continue
        kept.append(name)
        labels.append(number_to_label[number])
        if sizes is not None and listed.sizes is not None:
            sizes.append(listed.sizes[index])
    names, label = kept.packed(), np.array(labels, dtype=np.int32)
    for again in names.repeated():
        skipped.append((names[again], "the same path again"))
        label[again] = LEFT_OUT
    num = int((label != LEFT_OUT).sum())
    if not num:
        raise UserError(f"{path}: no image found among its {len(listed.places):,} files, the first {listed.first!r} is {skipped[0][1]}")
    note = f"{path}: {listed.how}: {num:,} images" + (f" of {len(label_of):,} classes" if label_of else ", no labels")
    return ImageListing(listed.root, tuple(label_of), names, (), tuple(skipped), notes=(note,), sizes=sizes), label


def _read_rows(path: Place, rows: Iterable[tuple[str, str]]) -> _Listed:
    """Returns the files of a list's rows, (path, label). Raises UserError if there are none, some are missing, or they are in several stores."""
    rows = iter(rows)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{path}: names no image; give a path in each line, or a table with a column 'path'")
    rows = chain([first], rows)
    if isinstance(path, StorePath) or is_url(first[0]):
        return _rows_in_store(path, list(rows))
    return _rows_here(path, rows)


def _rows_here(path: Path, rows: Iterable[tuple[str, str]]) -> _Listed:
    folder, places = os.path.abspath(path.parent), NamePacker()
    root = last_folder = first = first_missing = ""
    missing, numbers, label = 0, dict[str, int](), array("i")
    for name, text in rows:
        if is_url(name):
            raise _several_stores(path, [_store_of(StorePath.of(name))])
        place = os.path.normpath(os.path.join(folder, name))
        if not os.path.isfile(place):
            first_missing = first_missing or name
            missing += 1
        first = first or name
        above = os.path.dirname(place)
        if above != last_folder:
            root, last_folder = os.path.commonpath([root or above, above]), above
        places.append(place)
        label.append(numbers.setdefault(text, len(numbers)))
    if missing:
        raise _missing(path, missing, first_missing, of=len(places), folder=folder)
    return _Listed(first, places.packed(), root, Path(root), label, list(numbers))


def _rows_in_store(path: Place, rows: list[tuple[str, str]]) -> _Listed:
    queries: dict[str, str] = {}
    try:
        places = [StorePath.of(name, queries=queries) if is_url(name) else path.parent / name for name, _ in rows]
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    at_urls = [place for place in places if isinstance(place, StorePath)]
    stores = sorted(set(map(_store_of, at_urls)))
    if len(at_urls) < len(places) or len(stores) > 1:
        raise _several_stores(path, stores)
    sizes = array("q", sizes_of(at_urls, what=path.name))
    if missing := [name for (name, _), size in zip(rows, sizes, strict=True) if size < 0]:
        raise _missing(path, len(missing), missing[0], of=len(rows), folder=str(path.parent))
    paths = [place.as_path for place in at_urls]
    folder = os.path.commonpath([os.path.dirname(each) for each in paths])
    numbers: dict[str, int] = {}
    label = array("i", [numbers.setdefault(text, len(numbers)) for _, text in rows])
    return _Listed(rows[0][0], PackedNames.of(paths), folder, at_urls[0].above(folder), label, list(numbers), sizes)


def _store_of(place: StorePath) -> str:
    return "/".join(place.url.split("/")[:3])


def _several_stores(path: Place, stores: list[str]) -> UserError:
    what = f"images of {stores[0]} and of {stores[1] if len(stores) > 1 else 'this machine'}"
    return UserError(f"{path}: names {what}; make a list of each, and give all lists as data")


def _missing(path: Place, num: int, first: str, *, of: int, folder: str) -> UserError:
    return UserError(
        f"{path}: {num:,} of its {of:,} files are missing, the first {first[:LONGEST_SHOWN]!r}, looked for in {folder};"
        " correct the list, or move it to the images' folder"
    )


def _table(path: Place, text: str, path_column: str | None, label_column: str | None) -> tuple[Iterable[tuple[str, str]], str]:
    """Returns (path, label) of each row, and how the table was read."""
    first = next((line for line in each_line(text) if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    rows = list(islice(_csv_rows(path, text, delimiter), 2))
    if not rows:
        return [], ""
    head = [cell.strip() for cell in rows[0][1]]
    exists = [_is_there(path, cell) for cell in head]
    has_header = not any(exists)
    at = _column(path, head, path_column, "--path-column") if path_column else None
    label_at = _column(path, head, label_column, "--label-column") if label_column else None
    if at is None:
        fitting = [number for number, cell in enumerate(head) if (is_path_header(cell) if has_header else exists[number])]
        if has_header and not fitting and len(rows) > 1:
            fitting = [number for number, cell in enumerate(rows[1][1]) if _is_there(path, cell.strip())]
        if len(fitting) != 1:
            raise UserError(
                f"{path}: which column names the images? Its first row has {', '.join(map(repr, head[:12]))}; choose with --path-column NAME"
            )
        (at,) = fitting
    named = {plain_header(column) for column in (path_column, label_column) if column and not column.isdecimal()}
    if looks_like_file(head[at]) and named.isdisjoint(map(plain_header, head)):
        has_header = False  # the first image is missing, which is reported with the others

    def found() -> Iterator[tuple[str, str]]:
        for line, row in islice(_csv_rows(path, text, delimiter), int(has_header), None):
            if len(row) <= max(at, label_at or 0) or not row[at].strip():
                raise UserError(f"{path}: line {line} has no path; correct it, or remove it")
            if label_at is not None and not row[label_at].strip():
                raise UserError(f"{path}: line {line} has no label in column {head[label_at]!r}; correct it, or leave --label-column out")
            yield row[at].strip(), row[label_at].strip() if label_at is not None else ""

    called = head[at] if has_header else str(at + 1)
    how = f"column {called!r} names the images" + (f", column {head[label_at]!r} the class" if label_at is not None else "")
    return found(), how


def _csv_rows(path: Place, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yields (number of its line, cells) of each row that is not empty."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{path}: is not valid CSV: {error}; is a quotation mark left open?") from error


def _is_there(path: Place, cell: str) -> bool:
    if not cell:
        return False
    # Whether files at URLs exist is checked later, for all at once.
    return is_url(cell) or ((path.parent / cell).is_file() if isinstance(path, StorePath) else os.path.isfile(path.parent / cell))


def _column(path: Place, head: list[str], column: str, option: str) -> int:
    wanted = [number for number, cell in enumerate(head) if cell == column or plain_header(cell) == plain_header(column)]
    if len(wanted) == 1:
        return wanted[0]
    if not wanted and column.isdecimal() and 1 <= int(column) <= len(head):
        return int(column) - 1
    what = "several columns" if wanted else "no column"
    raise UserError(f"{option} {column}: {path} has {what} of this name; its columns are {', '.join(map(repr, head[:12]))}")
