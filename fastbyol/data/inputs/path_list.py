"""Lists the images that a file names: one path per line, or a table (CSV, TSV) with a column of paths, and one of labels on request.

Paths are relative to the list's folder, or absolute, or URLs, and the list itself may be at a URL. The order is that of the paths, as for a
folder, not that of the lines.
"""

from __future__ import annotations

import csv
import io
import os
from array import array
from pathlib import Path

from fastbyol.config.errors import UserError
from fastbyol.config.urls import is_url
from fastbyol.data.inputs.label_table import is_path_header, plain_header
from fastbyol.data.inputs.listing import ImageListing, in_sample_order, why_not_an_image
from fastbyol.data.inputs.name_matching import lines_of, read_text
from fastbyol.data.inputs.store_folder import sizes_of
from fastbyol.host.store_path import Place, StorePath

_SHOWN = 3


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
    text = read_text(path)
    if path.suffix.lower() in (".csv", ".tsv") or path_column or label_column:
        rows, how = _table(path, text, path_column, label_column)
    else:
        rows, how = [(line.strip(), "") for line in lines_of(text) if line.strip()], "a path in each line"
    if not rows:
        raise UserError(f"{path}: names no image; give a path in each line, or a table with a column 'path'")
    folder = path.parent if isinstance(path, StorePath) else Path(os.path.abspath(path.parent))
    places = [_place(folder, name) for name, _ in rows]
    sizes = _sizes(path, places)
    if missing := [name for (name, _), size in zip(rows, sizes, strict=True) if size < 0]:
        raise UserError(
            f"{path}: {len(missing):,} of its {len(rows):,} files are missing, the first {missing[0]!r}, looked for in {folder};"
            " correct the list, or move it to the images' folder"
        )
    paths = [place.as_path if isinstance(place, StorePath) else str(place) for place in places]
    root = os.path.commonpath([os.path.dirname(each) for each in paths])
    label_of = {name: label for label, name in enumerate(sorted({label for _, label in rows}))} if label_column else {}
    names: dict[str, int] = {}
    kept_sizes = array("q")
    skipped: list[tuple[str, str]] = []
    for each, size, (_, label) in zip(paths, sizes, rows, strict=True):
        name = os.path.relpath(each, root)
        reason = why_not_an_image(os.path.basename(name))
        if reason or name in names:
            skipped.append((name, reason or "the same path again"))
        else:
            names[name] = label_of.get(label, -1)
            kept_sizes.append(size)
    if not names:
        raise UserError(f"{path}: no image found among its {len(rows):,} files, the first {rows[0][0]!r} is {skipped[0][1]}")
    note = f"{path}: {how}: {len(names):,} images" + (f" of {len(label_of):,} classes" if label_of else ", no labels")
    first = places[0]
    if isinstance(first, StorePath):
        found = ImageListing(first.above(root), tuple(label_of), tuple(names), (), tuple(skipped), sizes=kept_sizes, notes=(note,))
    else:
        found = ImageListing(Path(root), tuple(label_of), tuple(names), (), tuple(skipped), notes=(note,))
    return in_sample_order(found, list(names.values()))


def _place(folder: Place, name: str) -> Place:
    if is_url(name):
        return StorePath.of(name)
    return folder / name if isinstance(folder, StorePath) else Path(os.path.normpath(folder / name))


def _sizes(path: Place, places: list[Place]) -> list[int]:
    """Returns the bytes of each file, or -1 for one that is missing; of files of this machine 0, which are asked for when they are used."""
    at_urls = [place for place in places if isinstance(place, StorePath)]
    if not at_urls:
        return [0 if os.path.isfile(str(place)) else -1 for place in places]
    stores = sorted({"/".join(place.url.split("/")[:3]) for place in at_urls})
    if len(at_urls) < len(places) or len(stores) > 1:
        what = f"images of {stores[0]} and of {stores[1] if len(stores) > 1 else 'this machine'}"
        raise UserError(f"{path}: names {what}; make a list of each, and give all lists as data")
    return sizes_of(at_urls, what=path.name)


def _table(path: Place, text: str, path_column: str | None, label_column: str | None) -> tuple[list[tuple[str, str]], str]:
    """Returns (path, label) of each row, and how the table was read."""
    first = next((line for line in lines_of(text) if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise UserError(f"{path}: is not valid CSV: {error}; is a quotation mark left open?") from error
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
    found = []
    for line, row in rows[has_header:]:
        if len(row) <= max(at, label_at or 0) or not row[at].strip():
            raise UserError(f"{path}: line {line} has no path; correct it, or remove it")
        if label_at is not None and not row[label_at].strip():
            raise UserError(f"{path}: line {line} has no label in column {head[label_at]!r}; correct it, or leave --label-column out")
        found.append((row[at].strip(), row[label_at].strip() if label_at is not None else ""))
    called = head[at] if has_header else str(at + 1)
    return found, f"column {called!r} names the images" + (f", column {head[label_at]!r} the class" if label_at is not None else "")


def _is_there(path: Place, cell: str) -> bool:
    if not cell:
        return False
    # A file at a URL is asked for with all the others.
    return is_url(cell) or ((path.parent / cell).is_file() if isinstance(path, StorePath) else os.path.isfile(path.parent / cell))


def _column(path: Place, head: list[str], column: str, option: str) -> int:
    wanted = [number for number, cell in enumerate(head) if cell == column or plain_header(cell) == plain_header(column)]
    if len(wanted) == 1:
        return wanted[0]
    if not wanted and column.isdecimal() and 1 <= int(column) <= len(head):
        return int(column) - 1
    what = "several columns" if wanted else "no column"
    raise UserError(f"{option} {column}: {path} has {what} of this name; its columns are {', '.join(map(repr, head[:12]))}")
