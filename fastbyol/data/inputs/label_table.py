"""Reads a table of labels as rows of image name and class. Detects the delimiter, the two columns, and the header if there is one.

The column of names is the one whose cells match images. The column of classes is the one with a known header, the only other one, or the one
that the user chose. If more than one reading is possible, the error message shows the first rows.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from fastbyol.config.errors import UserError
from fastbyol.data.inputs.listing import EXTENSIONS
from fastbyol.data.inputs.name_matching import MISSING, NameIndex, lines_of
from fastbyol.host.store_path import Place

_FILE = ("filename", "file_name", "file", "filepath", "file_path", "path", "image", "images", "img", "image_path", "img_path", "imagepath",
         "image_name", "image_index", "image_file", "image_filename", "imagename", "image_id", "imageid", "img_id", "img_name", "fname", "relpath",
         "relative_path", "photo", "picture")  # fmt: skip
"""Headers (as normalised by `plain_header`) of the column of names; `_CLASS`: of the column of classes. The `_PERHAPS_` ones count if no other matches."""
_PERHAPS_FILE = ("id", "name", "key")
_CLASS = ("label", "labels", "target", "class", "category", "predictionstring")
_PERHAPS_CLASS = ("class_name", "classname", "class_label", "label_name", "category_name", "classes", "targets", "y")
_NO_CLASS = ("", "index", "idx", "id", "row", "width", "height", "size", "bytes", "split", "fold", "md5", "sha256", "x")
"""Headers of other columns, which are neither names nor classes."""
_KAGGLE = "predictionstring"
"""Header in ImageNet's file at Kaggle; its cells hold the class, followed by boxes."""
_WHITESPACE = " "
_DELIMITERS = (",", ";", "\t", "|", _WHITESPACE)
_SAMPLED = 1000
"""Number of lines that are examined to choose the delimiter and the columns."""
_MOST_BLANKS = 20
"""Largest number of blanks at which a line is tentatively split in two."""
_LONGEST_LINE = 1 << 20
"""Longest line that is accepted, in characters."""
Row = tuple[int, list[str]]
"""(line number, cells)."""


class LabelRows(NamedTuple):
    """(line number, image name, class) of each row of a table of labels, and how its columns were read, for the user."""

    rows: list[tuple[int, str, str]]
    reading: str


def read_label_rows(
    path: Place, text: str, index: NameIndex, *, path_column: str | None = None, label_column: str | None = None
) -> LabelRows | None:
    """Returns the rows of a table, or None if the file may be a list of classes in the order of the images' names.

    Args:
        path: path of the file, for error messages.
        text: content of the file.
        index: finds images by name.
        path_column: the column of image names, by name or by number from 1; None detects it.
        label_column: the column of classes, likewise.

    Raises:
        UserError: the table is damaged or uneven, or its columns are ambiguous.
    """
    text = re.sub(r"\Asep=.\r?\n", "", text)  # Excel's line that names the delimiter
    lines = [(number, line) for number, line in enumerate(lines_of(text), start=1) if line.strip()]
    named = path_column is not None or label_column is not None
    if not lines:
        raise UserError(f"{path}: holds no rows: is empty; it should hold a name and a class for each image, or a class for each in order")
    if long := [number for number, line in lines if len(line) > _LONGEST_LINE]:
        raise UserError(f"{path}: line {long[0]} has more than {_LONGEST_LINE:,} characters; give a row for each image")
    sample = lines[:: max(1, len(lines) // _SAMPLED)]
    delimiter, matches = _delimiter(sample, index)
    if not (matches or named or path.suffix.lower() in (".csv", ".tsv")) and _may_be_classes_alone([line for _, line in lines]):
        if len({line for _, line in lines}) == len(lines) > 1 and all(index.find(line.strip()) != MISSING for _, line in sample):
            raise UserError(f"{path}: names images but no classes (the first line is {lines[0][1]!r}); give 'name label' in each line")
        return None
    if delimiter == _WHITESPACE:
        rows = _words(path, lines, index, named=named)
    else:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
        except csv.Error as error:
            raise UserError(f"{path}: is not valid CSV: line {reader.line_num}: {error}; is a quotation mark left open?") from error
    columns = _Columns(path, rows, index, path_column=path_column, label_column=label_column)
    return LabelRows(list(columns.read()), columns.reading)


def is_class_header(word: str) -> bool:
    """Returns True if the first line of a list of classes may be a header."""
    return plain_header(word) in (*_CLASS, *_PERHAPS_CLASS)


def is_path_header(word: str) -> bool:
    """Returns True if the header is one of a column of image names or paths."""
    return plain_header(word) in _FILE


def plain_header(cell: str) -> str:
    """Returns a header in lower case with '_' for blanks and dashes."""
    return re.sub(r"[\s-]+", "_", cell.strip().lstrip("#").strip().lower())


def looks_like_file(cell: str) -> bool:
    """Returns True if a cell has the extension of an image."""
    return cell.strip().lower().endswith(EXTENSIONS)


def _delimiter(sample: list[tuple[int, str]], index: NameIndex) -> tuple[str, int]:
    """Returns the delimiter with which the most lines name an image, and how many do. On a tie, one that gives all lines equally many columns."""
    best, most = None, (0, False)
    for delimiter in _DELIMITERS:
        cells = [_split_alone(line, delimiter) for _, line in sample]
        width = len(cells[0])
        if width < 2:
            continue
        if delimiter == _WHITESPACE:
            matches, even = sum(_split_at_name(line, index) is not None for _, line in sample), False
        else:
            matches = max(sum(at < len(row) and index.find(row[at].strip()) != MISSING for row in cells) for at in range(width))
            even = all(len(row) == width for row in cells)
        if best is None or (matches, even) > most:
            best, most = delimiter, (matches, even)
    return best or ",", most[0]


def _split_alone(line: str, delimiter: str) -> list[str]:
    if delimiter == _WHITESPACE:
        return line.split()
    try:
        return next(csv.reader([line], delimiter=delimiter), [""])
    except csv.Error:
        return [""]


def _may_be_classes_alone(lines: list[str]) -> bool:
    """Returns True if the lines may be classes only: there are no file names, and each line is one word or some lines are repeated."""
    if any(looks_like_file(word) for line in lines for word in re.split(r"[\s,;|]+", line)):
        return False
    return all(len(line.split()) == 1 and not re.search(r"[,;|]", line) for line in lines) or len(set(lines)) < len(lines)


def _split_at_name(line: str, index: NameIndex, sides: tuple[str, ...] = ("first", "last")) -> tuple[str, str, str] | None:
    """Splits a line into name and class, both of which may contain blanks. Returns (side, left, right), or None if no part names an image.

    The side, 'first' or 'last', is where the longest name of an image was found. sides: the sides to try, in this order.
    """
    line = line.strip()
    blanks = list(islice(re.finditer(r"\s+", line), _MOST_BLANKS))
    for side in sides:
        for blank in reversed(blanks) if side == "first" else blanks:
            left, right = line[: blank.start()], line[blank.end() :]
            if index.find(left if side == "first" else right) != MISSING:
                return side, left, right
    return None


def _words(path: Place, lines: list[tuple[int, str]], index: NameIndex, *, named: bool) -> list[Row]:
    """Returns the rows of a table with blanks between its columns: two columns, both of which may contain blanks, or, with a header, more."""
    if _split_at_name(lines[0][1], index) is None:
        lines = [(lines[0][0], lines[0][1].lstrip("# ")), *lines[1:]]  # numpy's savetxt writes '# filename label'
        first = lines[0][1].split()
        known = len(first) > 2 and any(plain_header(word) in (*_FILE, *_CLASS) for word in first)
    else:
        first, known = lines[0][1].split(), False
    even = len(first) > 2 and all(len(line.split()) == len(first) for _, line in lines)
    if named or known or (even and _a_column_of_numbers(lines, index)):
        return [(number, line.split()) for number, line in lines]
    sides = Counter(split[0] for _, line in lines[:_SAMPLED] if (split := _split_at_name(line, index)))
    side = "last" if sides["last"] > sides["first"] else "first"
    rows: list[Row] = []
    for number, line in lines:
        cells = (_split_at_name(line, index, (side,)) or (side, *(line.rsplit(None, 1) if side == "first" else line.split(None, 1))))[1:]
        if len(cells) != 2:
            raise UserError(
                f"{path}: line {number} does not have the columns of the first one; give 'name label' in each line, or a label in each"
            )
        rows.append((number, [cells[0].strip(), cells[1].strip()]))
    return rows


def _a_column_of_numbers(lines: list[tuple[int, str]], index: NameIndex) -> bool:
    """Returns True if image names have no blanks and another column has only numbers below the first line: then blanks separate columns.

    Without such a column, further words may belong to a class name of several words.
    """
    lines = lines[1:] or lines
    split = _split_at_name(lines[0][1], index)
    columns = zip(*(line.split() for _, line in lines), strict=True)
    name = "" if split is None else split[1 if split[0] == "first" else 2]
    return bool(name) and " " not in name and any(all(re.fullmatch(r"-?[0-9.]+", word) for word in column) for column in columns)


class _Columns:
    """Finds the column of names and that of classes, and reads them."""

    def __init__(self, path: Place, rows: list[Row], index: NameIndex, *, path_column: str | None, label_column: str | None) -> None:
        self.path, self.rows, self.index = path, rows, index
        self.first = rows[0][1]
        self.words = [plain_header(cell) for cell in self.first]
        self.sample = [row for _, row in rows[:: max(1, len(rows) // _SAMPLED)]]
        if len(self.first) < 2:
            raise UserError(f"{path}: row {rows[0][0]} has no label: there is one column, {self._seen()}; give columns filename,label")
        name_at = self._place(path_column, "--path-column") if path_column else None
        label_at = self._place(label_column, "--label-column") if label_column else None
        by_name = any(column and not column.isdecimal() for column in (path_column, label_column))
        has_known_header = header = by_name or self._known_header()
        self.name_at = self._find_names(header, label_at) if name_at is None else name_at
        self.label_at = self._find_labels(header) if label_at is None else label_at
        if self.name_at == self.label_at:
            raise UserError(f"{path}: {self._seen()}: names and classes cannot be the same column; give --path-column and --label-column")
        if header is None:  # unknown words: a header, unless its class also occurs in another row
            at = self.label_at
            header = not any(len(row) > at and row[at].strip() == self.first[at].strip() for _, row in rows[1:])
        self.header = header
        if self.header and len(rows) == 1:
            raise UserError(f"{path}: holds no rows; give columns filename,label")
        if not (label_column or has_known_header):
            self._refuse_counting()

    @property
    def reading(self) -> str:
        """Description of the two columns, by name or number, for the user."""
        called = [repr(self.first[at].strip()) if self.header else f"{at + 1}" for at in (self.name_at, self.label_at)]
        return f"column {called[0]} names the image, column {called[1]} the class ({self._seen() if self.header else 'no header'})"

    def read(self) -> Iterator[tuple[int, str, str]]:
        """Yields (line, name, class) of each row."""
        kaggle = self.header and self.words[self.label_at] == _KAGGLE
        for number, row in self.rows[self.header :]:
            if len(row) <= max(self.name_at, self.label_at):
                raise UserError(f"{self.path}: row {number} has no label; give columns filename,label")
            if any(cell.strip() for cell in row[len(self.first) :]):
                raise UserError(
                    f"{self.path}: row {number} has {len(row)} columns, the first has {len(self.first)}: {', '.join(map(repr, row[:6]))};"
                    " put what holds the delimiter in quotation marks"
                )
            name, label = row[self.name_at].strip(), row[self.label_at].strip()
            if kaggle:
                label = label.partition(" ")[0]
            if not name or not label:
                raise UserError(f"{self.path}: row {number} has no {'label' if name else 'file name'}; correct it, or remove the row")
            if re.search(r"[\r\n]", name + label):
                raise UserError(
                    f"{self.path}: row {number} holds a line break in {name[:40]!r}, {label[:40]!r}: is a quotation mark left open?"
                )
            yield number, name, label

    def _known_header(self) -> bool | None:
        """Returns True if the first row is a header, False if it is not, None if unknown: it names no image and has no known header word."""
        known = [any(word in words for word in self.words) for words in ((*_FILE, *_PERHAPS_FILE), (*_CLASS, *_PERHAPS_CLASS))]
        if all(known):
            return True
        if any(looks_like_file(cell) or self.index.find(cell.strip()) != MISSING for cell in self.first):
            return False
        return True if any(known) else None

    def _place(self, column: str, option: str) -> int:
        wanted = [at for at, cell in enumerate(self.first) if cell.strip() == column] or [
            at for at, word in enumerate(self.words) if word == plain_header(column)
        ]
        if len(wanted) == 1:
            return wanted[0]
        if not wanted and re.fullmatch("[0-9]{1,9}", column) and 1 <= int(column) <= len(self.first):
            return int(column) - 1
        raise UserError(f"{option} {column}: {self.path} has {'several columns' if wanted else 'no column'} of this name; {self._seen()}")

    def _find_names(self, header: bool | None, label_at: int | None) -> int:
        free = [at for at in range(len(self.first)) if at != label_at]
        candidates = free
        if header:
            for words in (_FILE, _PERHAPS_FILE):
                if named := [at for at in free if self.words[at] in words]:
                    candidates = named
                    break
        if len(candidates) == 1:
            return candidates[0]
        files = [at for at in candidates if any(len(row) > at and looks_like_file(row[at]) for row in self.sample)]
        matching = self._naming(files) or self._naming(candidates)
        if matching and all(self._same_images(matching[0], at) for at in matching[1:]):
            return matching[0]
        if not matching and (len(files) == 1 or candidates is not free or len(free) == 2):
            return (files or candidates)[0]  # it matches no image; the caller reports that
        raise self._doubt("which column names the images", "--path-column")

    def _naming(self, columns: Iterable[int]) -> list[int]:
        return [at for at in columns if any(len(row) > at and self.index.find(row[at].strip()) != MISSING for row in self.sample)]

    def _same_images(self, one: int, other: int) -> bool:
        pairs = [(row[one].strip(), row[other].strip()) for row in self.sample if len(row) > max(one, other)]
        return all(self.index.find(name) == self.index.find(second) for name, second in pairs)

    def _find_labels(self, header: bool | None) -> int:
        free = [at for at in range(len(self.first)) if at != self.name_at]
        if header:
            for words in (_CLASS, _PERHAPS_CLASS):
                named = [at for at in free if self.words[at] in words]
                if len(named) == 1:
                    return named[0]
                if named:
                    break
            free = [at for at in free if self.words[at] not in _NO_CLASS and not self.words[at].startswith("unnamed")]
        if len(free) == 1 and len(self.first) == 2:
            return free[0]
        raise self._doubt("which column is the class", "--label-column")

    def _refuse_counting(self) -> None:
        """Raises UserError if the classes are consecutive numbers without a known header: they are probably an index of the rows."""
        at = self.label_at
        values = [row[at].strip() for _, row in self.rows[self.header :] if len(row) > at]
        if len(values) > 2 and all(re.fullmatch("[0-9]{1,9}", value) for value in values):
            numbers = list(map(int, values))
            if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
                raise self._doubt(f"column {at + 1} numbers the rows: which column is the class", "--label-column")

    def _doubt(self, question: str, option: str) -> UserError:
        return UserError(f"{self.path}: {question}? {self._seen()}; choose with {option} NAME, or its number from 1")

    def _seen(self) -> str:
        shown = ", ".join(repr(cell.strip()[:40]) for cell in self.first[:12])
        second = ", ".join(repr(cell.strip()[:40]) for cell in self.rows[1][1][:12]) if len(self.rows) > 1 else ""
        return f"its first row has {shown}" + (f", its second {second}" if second else "")
