"""Labels of images that lie together, from a file beside them: a CSV, a map or list of WordNet ids, or ImageNet's development kit."""

from __future__ import annotations

import csv
import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastbyol.config.errors import UserError
from fastbyol.data.inputs.listing import EXTENSIONS, ImageListing, in_sample_order
from fastbyol.data.inputs.name_matching import NameIndex

_VALIDATION_NAME = re.compile(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.\w+", re.DOTALL)
_GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_META = "data/meta.mat"
_LARGEST_LABEL = 1_000_000
_LARGEST_FILE = 1 << 28
"""Bytes of a label file; ImageNet's largest has 8 MB."""


@dataclass(frozen=True)
class LabelFile:
    """What a file says: a label per name, or a label per image in the order of the images' names."""

    path: Path
    by_name: dict[str, str] | None
    in_order: Sequence[str] = ()
    class_names: tuple[str, ...] | None = None
    """Known beside the labels in use; None: the labels in use, sorted."""


def label_images(found: ImageListing, labels: LabelFile) -> ImageListing:
    """The images in order, labelled by the file; what is in only one of both lands in `skipped`. UserError where nothing fits."""
    values, unmatched = _by_name(found, labels) if labels.by_name is not None else (_by_number(found, labels), ())
    class_names, label_of = _classes(labels)
    if not any(values):
        raise UserError(f"{labels.path}: labels none of the {len(found.files):,} images of {found.root} (the first: {_first(found)})")
    unlabelled = tuple((name, f"no label in {labels.path.name}") for name, value in zip(found.files, values, strict=True) if value is None)
    found = replace(found, class_names=class_names, skipped=(*found.skipped, *unlabelled, *unmatched))
    return in_sample_order(found, [None if value is None else label_of[value] for value in values])


def read_label_file(path: Path) -> LabelFile:
    """A CSV (.csv: columns filename and label), or text: lines 'name label', or one label per line in the order of the images' names."""
    text = _decoded(_limited_read(path))
    if path.suffix.lower() == ".csv":
        return LabelFile(path, _unique(path, _csv_rows(path, text)))
    lines = [line.rstrip("\r") for line in text.split("\n")]
    words = [(number, line.rsplit(None, 1)) for number, line in enumerate(lines, start=1) if line.strip()]
    if not words:
        raise UserError(f"{path}: is empty; it should hold a line 'name label' for each image, or a label for each in order")
    widths = {len(row) for _, row in words}
    if widths == {1}:
        return LabelFile(path, None, [row[0] for _, row in words])
    if widths != {2}:
        number = next(number for number, row in words if len(row) != len(words[0][1]))
        raise UserError(f"{path}: line {number} has not the columns of the first one; give 'name label' in each line, or a label in each")
    return LabelFile(path, _unique(path, [(number, name, label) for number, (name, label) in words]))


def read_devkit(path: Path) -> LabelFile:
    """The labels of ILSVRC2012's validation images as WordNet ids, from the development kit: the .tar.gz as downloaded, or its folder.

    The ground truth holds the kit's own ids, which are in no order of the WordNet ids: labels that are their positions in the sorted WordNet
    ids, as everybody's models have them, need meta.mat.
    """
    truth, meta = _devkit_parts(path, (_GROUND_TRUTH, _META))
    wnid_of = _wnids(path, meta)
    ids = _decoded(truth).split()
    unknown = next((word for word in ids if not word.isdigit() or int(word) not in wnid_of), None)
    if unknown is not None or not ids:
        raise UserError(f"{path}: {_GROUND_TRUTH} holds {unknown!r}, which is no class of {_META}; download the kit again")
    return LabelFile(path, None, [wnid_of[int(word)] for word in ids], tuple(sorted(wnid_of.values())))


def _by_name(found: ImageListing, labels: LabelFile) -> tuple[list[str | None], tuple[tuple[str, str], ...]]:
    assert labels.by_name is not None
    index = NameIndex(found.files)
    values: list[str | None] = [None] * len(found.files)
    unmatched = []
    for name, label in labels.by_name.items():
        place = index.find(name)
        if place is None:
            unmatched.append((name, f"in {labels.path.name}, but there is no such image"))
        elif values[place] not in (None, label):
            raise UserError(f"{labels.path}: gives {found.files[place]} two labels, {values[place]!r} and {label!r}; correct it")
        else:
            values[place] = label
    return values, tuple(unmatched)


def _by_number(found: ImageListing, labels: LabelFile) -> list[str | None]:
    """ImageNet's validation images by the number in their names, others by their order, which must then be complete."""
    numbers = [_VALIDATION_NAME.fullmatch(name) for name in found.files]
    if all(numbers):
        places = [int(number[1]) - 1 for number in numbers if number]
        beyond = next((name for name, place in zip(found.files, places, strict=True) if not 0 <= place < len(labels.in_order)), None)
        if beyond is not None:
            raise UserError(f"{labels.path}: has {len(labels.in_order):,} labels, none for {beyond}; it belongs to other images")
        return [labels.in_order[place] for place in places]
    if len(found.files) != len(labels.in_order):
        raise UserError(
            f"{labels.path}: {len(labels.in_order):,} labels in order for {len(found.files):,} images of {found.root} (the first:"
            f" {_first(found)}); give a file with a name in each line"
        )
    values: list[str | None] = [None] * len(found.files)
    for label, place in zip(labels.in_order, sorted(range(len(found.files)), key=found.files.__getitem__), strict=True):
        values[place] = label
    return values


def _classes(labels: LabelFile) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names in order, and the label of each value. Whole numbers are labels already; names count in sorted order."""
    used = set(labels.in_order if labels.by_name is None else labels.by_name.values())
    if labels.class_names is None and all(re.fullmatch(r"[0-9]{1,9}", value) for value in used):
        largest = max(map(int, used))
        if largest > _LARGEST_LABEL:
            raise UserError(
                f"{labels.path}: label {largest}: a number is taken for the class's place from 0; write names to number them anew"
            )
        return tuple(map(str, range(largest + 1))), {value: int(value) for value in used}
    names = labels.class_names or tuple(sorted(used))
    return names, {name: label for label, name in enumerate(names)}


def _csv_rows(path: Path, text: str) -> list[tuple[int, str, str]]:
    """(line, name, label) of each row."""
    first_line = text.split("\n", 1)[0]
    delimiter = next((mark for mark in ",;\t" if mark in first_line), ",")
    try:
        rows = [(number, row) for number, row in enumerate(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), start=1) if row]
    except csv.Error as error:
        raise UserError(f"{path}: is no CSV ({error}); give columns filename,label") from error
    name_at, label_at, header = _columns(rows[0][1]) if rows else (0, 1, 0)
    short = next((number for number, row in rows if len(row) <= max(name_at, label_at)), None)
    if short is not None or len(rows) == header:
        where = f"row {short} has no label" if short else "holds no rows"
        raise UserError(f"{path}: {where}; give columns filename,label")
    cells = [(number, row[name_at].strip(), row[label_at].strip()) for number, row in rows[header:]]
    if header and rows[0][1][label_at] == "PredictionString":  # Kaggle's file: the class, then boxes
        cells = [(number, name, label.split(None, 1)[0] if label else "") for number, name, label in cells]
    for number, name, label in cells:
        if not name or not label:
            raise UserError(f"{path}: row {number} has no {'label' if name else 'file name'}; correct it, or remove the row")
    return cells


def _columns(first: list[str]) -> tuple[int, int, int]:
    """Column of the name, of the label, and whether the first row is a header (1) or not (0)."""
    words = [cell.strip().lower() for cell in first]
    if "filename" in words and "label" in words:
        return words.index("filename"), words.index("label"), 1
    is_header = len(words) > 1 and not words[0].endswith(EXTENSIONS)
    return 0, 1, int(is_header)


def _unique(path: Path, rows: list[tuple[int, str, str]]) -> dict[str, str]:
    table: dict[str, str] = {}
    for number, name, label in rows:
        if name.startswith("/") or ".." in name.split("/"):
            raise UserError(f"{path}: line {number} names {name}; names are relative to the images' folder and stay in it")
        if table.setdefault(name, label) != label:
            raise UserError(f"{path}: line {number} gives {name} the label {label!r}, an earlier one {table[name]!r}; correct it")
    return table


def _devkit_parts(path: Path, parts: Sequence[str]) -> list[bytes]:
    """The contents of these files of the kit. An archive is read to its end first: scipy crashes on some damage, which gzip's checksum tells."""
    if path.is_dir():
        return [_limited_read(path / part) for part in parts]
    content = _limited_read(path)
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(_LARGEST_FILE)
        with tarfile.open(fileobj=io.BytesIO(content)) as kit:
            files = {part: member for member in kit if member.isreg() for part in parts if member.name.endswith(part)}
            if missing := [part for part in parts if part not in files]:
                raise UserError(f"{path}: holds no {missing[0]}; give ILSVRC2012_devkit_t12.tar.gz or its folder")
            return [file.read() for part in parts if (file := kit.extractfile(files[part]))]
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(
            f"{path}: cannot be read as the development kit ({error}); give ILSVRC2012_devkit_t12.tar.gz or its folder"
        ) from error


def _wnids(path: Path, meta: bytes) -> dict[int, str]:
    """Of each class, the kit's id and its WordNet id. Inner nodes of the hierarchy have ids too; they are no classes."""
    from scipy.io import loadmat

    try:
        synsets: Any = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
    except Exception as error:  # scipy raises whatever its parser stumbles over
        raise UserError(f"{path}: {_META} is not the kit's ({error}); download the kit again") from error


def _limited_read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a file of labels") from error
    if len(content) > _LARGEST_FILE:
        raise UserError(f"{path}: is too large for a file of labels (more than {_LARGEST_FILE >> 20} MiB)")
    return content


def _decoded(content: bytes) -> str:
    return content.decode("utf-8-sig", errors="surrogateescape")


def _first(found: ImageListing) -> str:
    return min(found.files)
