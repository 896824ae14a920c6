"""Labels images from a file, if they are not in class folders: a table, a list of classes in order, or ImageNet's development kit."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastbyol.config.errors import UserError
from fastbyol.data.formats.tar_members import DamagedTarError, tar_members
from fastbyol.data.inputs.label_table import LabelRows, is_class_header, read_label_rows
from fastbyol.data.inputs.listing import LONGEST_SHOWN, ImageListing, in_sample_order
from fastbyol.data.inputs.name_matching import AMBIGUOUS, MISSING, NameIndex, limited_read, lines_of
from fastbyol.host.store_path import Place

_VALIDATION_NAME = re.compile(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.\w+", re.DOTALL)
_GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
_META = "data/meta.mat"
_LARGEST_LABEL = 1_000_000
_LARGEST_KIT = 1 << 28
"""Largest unpacked development kit that is read, in bytes; the real one has 10 MB."""
_WHOLE_NUMBER = re.compile(r"([0-9]{1,9})(?:\.0*)?")
"""A class number from 0; also '3.0', as pandas writes integers of a column with missing values."""
_NUMBER = re.compile(r"-?[0-9]{1,9}(\.[0-9]{0,9})?")
_NO_VALUE = ("nan", "na", "n/a", "<na>", "none", "null", "nil", "-", "?")
"""Words that programs write for an unknown number, in lower case."""
_SHOWN = 3


@dataclass(frozen=True)
class LabelFile:
    """Content of a file of labels, not yet matched to images, or the labels of the development kit.

    The file is a table of names and classes (`label_table`), or has one class per line in the order of the images' names.
    """

    path: Place
    text: str = ""
    path_column: str | None = None
    label_column: str | None = None
    in_order: Sequence[str] = ()
    """Labels of the development kit, in the order of the images' names; for other files empty: `text` holds them."""
    class_names: tuple[str, ...] | None = None
    """All class names, if the source lists them; None means the labels that occur, sorted."""


def label_images(found: ImageListing, labels: LabelFile) -> ImageListing:
    """Returns the images in order, labelled by the file.

    Images without an entry and entries without an image are added to `skipped`; `notes` says how the file was read.
    Raises UserError if the file labels none of the images, or can be read in more than one way.
    """
    index = NameIndex(found.files, found.root)
    table = None
    if not labels.in_order:
        table = read_label_rows(labels.path, labels.text, index, path_column=labels.path_column, label_column=labels.label_column)
    if table is not None:
        values, unmatched = _by_name(found, labels.path, table, index)
    else:
        if not labels.in_order:
            classes = [line.strip() for line in lines_of(labels.text) if line.strip()]
            # A first line such as 'label' is a header, unless another line is equal to it.
            has_header = is_class_header(classes[0]) and classes[0] not in classes[1:]
            labels = replace(labels, in_order=classes[has_header:])
        values, unmatched = _by_number(found, labels), ()
    if not any(values):
        raise UserError(f"{labels.path}: labels none of the {len(found.files):,} images of {found.root} (the first: {min(found.files)})")
    values, class_names = _classes(labels, values if table is None else [*values, *(label for _, _, label in table.rows)])
    unlabelled = tuple((name, f"no label in {labels.path.name}") for name, value in zip(found.files, values, strict=False) if value is None)
    reading = table.reading if table else "one class for each image, in the order of their names"
    label_of = {name: label for label, name in enumerate(class_names)}
    by_image = [None if value is None else label_of[value] for value in values[: len(found.files)]]
    labelled = in_sample_order(replace(found, class_names=class_names, skipped=(*found.skipped, *unlabelled, *unmatched)), by_image)
    places = sorted({0, len(labelled.files) // 2, len(labelled.files) - 1})[:_SHOWN]
    shown = ", ".join(f"{labelled.files[at]!r} is {labelled.class_names[labelled.labels[at]]!r}" for at in places)
    entries = f"{len(unmatched):,} entries without an image" + (f" (the first: {unmatched[0][0][:LONGEST_SHOWN]!r})" if unmatched else "")
    classes = len(set(labelled.labels))
    empty = f" of {len(labelled.class_names):,}" if classes != len(labelled.class_names) else ""
    note = (
        f"{labels.path}: {reading}: {len(labelled.files):,} images labelled, {len(unlabelled):,} images without an entry, {entries},"
        f" {classes:,}{empty} classes; {shown}"
    )
    return replace(labelled, notes=(*found.notes, note))


def read_devkit(path: Path) -> LabelFile:
    """Returns the labels of ILSVRC2012's validation images as WordNet ids, from the development kit: the .tar.gz as downloaded, or its folder.

    The ground truth has the kit's own ids, whose order is not that of the WordNet ids; meta.mat translates them. The usual labels, which all
    published models use, are positions in the sorted WordNet ids.
    """
    if path.is_dir():
        truth, meta = limited_read(path / _GROUND_TRUTH), limited_read(path / _META)
    else:
        content = limited_read(path)
        try:
            # To the end first, which checks gzip's checksum: scipy crashes on some damaged files.
            if content.startswith(b"\x1f\x8b"):
                content = gzip.GzipFile(fileobj=io.BytesIO(content)).read(_LARGEST_KIT)
            members = [member for member in tar_members(io.BytesIO(content), end=len(content)) if member.isreg() and not member.issparse()]
        except (OSError, EOFError, zlib.error, DamagedTarError) as error:
            raise UserError(
                f"{path}: cannot be read as the development kit ({error}); give ILSVRC2012_devkit_t12.tar.gz or its folder"
            ) from error
        files = {part: member for member in members for part in (_GROUND_TRUTH, _META) if member.name.endswith(part)}
        if missing := [part for part in (_GROUND_TRUTH, _META) if part not in files]:
            raise UserError(f"{path}: holds no {missing[0]}; give ILSVRC2012_devkit_t12.tar.gz or its folder")
        truth, meta = (content[files[part].offset_data :][: files[part].size] for part in (_GROUND_TRUTH, _META))
    from scipy.io import loadmat

    try:
        synsets: Any = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        # The inner nodes of the hierarchy have ids too, but are not classes.
        wnid_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets if int(row["num_children"]) == 0}
    except Exception as error:  # on a damaged file, scipy's parser raises exceptions of any kind
        raise UserError(f"{path}: {_META} is not the kit's ({error}); download the kit again") from error
    ids = truth.decode(errors="replace").split()
    unknown = next((word for word in ids if not word.isdigit() or int(word) not in wnid_of), None)
    if unknown is not None or not ids:
        raise UserError(f"{path}: {_GROUND_TRUTH} holds {unknown!r}, which is not a class of {_META}; download the kit again")
    return LabelFile(path, in_order=[wnid_of[int(word)] for word in ids], class_names=tuple(sorted(wnid_of.values())))


def _by_name(found: ImageListing, path: Place, table: LabelRows, index: NameIndex) -> tuple[list[str | None], tuple[tuple[str, str], ...]]:
    """Returns the label of each image (None without one), and (name, reason) of the rows without an image."""
    values: list[str | None] = [None] * len(found.files)
    earlier: dict[str, str] = {}
    unmatched = []
    for line, name, label in table.rows:
        if (known := earlier.setdefault(name, label)) != label:
            raise UserError(f"{path}: line {line} gives {name} the label {label!r}, an earlier one {known!r}; correct it")
        place = index.find(name)
        if place == AMBIGUOUS:
            raise UserError(f"{path}: line {line} names {name}, which could be several images of {found.root}; give names with folders")
        if place == MISSING:
            unmatched.append((name, f"in {path.name}, but there is no such image"))
        elif values[place] not in (None, label):
            raise UserError(f"{path}: gives {found.files[place]} two labels, {values[place]!r} and {label!r}; correct it")
        else:
            values[place] = label
    return values, tuple(dict.fromkeys(unmatched))


def _by_number(found: ImageListing, labels: LabelFile) -> list[str | None]:
    """Returns the label of each image from labels in order.

    ImageNet's validation images are matched by the number in their names; others by their order, for which there must be one label per image.
    """
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
            f" {min(found.files)}); give a file with a name in each line"
        )
    label_of = dict(zip(sorted(found.files), labels.in_order, strict=True))
    return [label_of[name] for name in found.files]


def _classes(labels: LabelFile, values: Sequence[str | None]) -> tuple[list[str | None], tuple[str, ...]]:
    """Returns the values as class names, and all class names in label order.

    Whole numbers are used as labels directly; names are numbered in sorted order. If some numbers are negative, all are treated as names and
    sorted by value.
    """
    used = {value for value in values if value is not None}
    missing = sorted(value for value in used if value.lower() in _NO_VALUE)
    if missing and len(used) > len(missing) and all(_NUMBER.fullmatch(value) for value in used.difference(missing)):
        raise UserError(
            f"{labels.path}: gives {missing[0]!r} for a class, where the others are numbers: write a class for each image, or remove these rows"
        )
    if labels.class_names is None and all(map(_WHOLE_NUMBER.fullmatch, used)):
        numbers = {value: int(value.partition(".")[0]) for value in used}
        if (largest := max(numbers.values())) > _LARGEST_LABEL:
            raise UserError(
                f"{labels.path}: label {largest}: numbers are class numbers from 0; write class names instead to have them numbered"
            )
        return [None if value is None else str(numbers[value]) for value in values], tuple(map(str, range(largest + 1)))
    if labels.class_names is not None:
        return list(values), labels.class_names
    is_number = all(map(_NUMBER.fullmatch, used))
    return list(values), tuple(sorted(used, key=lambda value: (float(value) if is_number else 0.0, value)))
