"""Reads the .beton file format, version 2 (FFCV 1.0): header, field descriptors, metadata table, data in pages, allocation table.

Plain numpy, so that neither the converter nor each rank waits seconds for the import of ffcv; tests compare it with ffcv's own Reader and
Loader.
Source: libffcv's `ffcv/types.py`, `ffcv/fields/`, `ffcv/memory_allocator.py` (PyPI 1.0.2).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.data.formats.pillow_decoding import MAX_DECODED_PIXELS
from fastbyol.host.shared_columns import Columns, row_pieces, shared_columns

VERSION = 2
INT_FIELD, IMAGE_FIELD = 1, 2
JPEG_MODE, RAW_MODE = 0, 1
MIN_PAGE_BYTES = 1 << 23
"""Smallest page size: 8 MiB, ffcv's default."""
MAX_PAGE_BYTES = 1 << 31

HEADER = np.dtype(
    [("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_table_ptr", "<u8")], align=True
)
FIELD = np.dtype([("type_id", "<u1"), ("name", "<u1", (16,)), ("arguments", "<u1", (1024,))], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
LABEL = np.dtype("<i8")
# numpy names unnamed fields f0, f1, … in order; align=True lays them out as a C struct.
_FIELD_TYPES = {0: np.dtype("<f8"), INT_FIELD: LABEL, IMAGE_FIELD: IMAGE}
SAMPLE = np.dtype([("", IMAGE), ("", LABEL)], align=True)
"""One row of the metadata table in files that we write: f0 image, f1 label."""
_CHECKSUMS_MAGIC = b"fastbyol"
"""First bytes of the image field's arguments, which ffcv's RGBImageField ignores. The next 8 bytes are the offset of a table of CRC-32s."""


def field_descriptors(*, checksums_at: int) -> NDArray[np.void]:
    """Returns the two field descriptors of our files, image and label. checksums_at: offset of the table with each image's CRC-32, '<u4'."""
    fields = np.zeros(2, dtype=FIELD)
    for row, (name, type_id) in enumerate((("image", IMAGE_FIELD), ("label", INT_FIELD))):
        fields[row]["type_id"] = type_id
        fields[row]["name"][: len(name)] = np.frombuffer(name.encode("ascii"), dtype=np.uint8)
    arguments = _CHECKSUMS_MAGIC + checksums_at.to_bytes(8, "little")
    fields[0]["arguments"][: len(arguments)] = np.frombuffer(arguments, dtype=np.uint8)
    return fields


_COLUMNS = {"mode": "<u1", "height": "<u2", "width": "<u2", "offset": "<i8", "size": "<u4", "label": "<i8", "crc32": "<u4"}


@dataclass(frozen=True)
class Beton:
    """The tables of a .beton; every array has one row per sample, 29 bytes in all. Widen the unsigned ones before any arithmetic."""

    mode: NDArray[np.uint8]
    height: NDArray[np.uint16]
    width: NDArray[np.uint16]
    offset: NDArray[np.int64]
    size: NDArray[np.uint32]
    label: NDArray[np.int64]
    crc32: NDArray[np.uint32] | None
    """CRC-32 of each image's bytes; None in a file that stock FFCV wrote."""


def read_beton(path: Path) -> Beton:
    """Returns the tables of a .beton, checked; does not read the images. Large tables are shared with the other processes of this machine.

    Raises:
        UserError: the file is empty, truncated or of another format, lacks an image or integer label, or its table has impossible values.
    """
    status = path.stat()
    header = _read(path, HEADER, 1, 0)[0]
    if header["version"] != VERSION or not 0 < header["num_fields"] < 64:
        raise UserError(f"{path}: not a .beton file of version {VERSION}; make one with python -m fastbyol convert")
    if not header["num_samples"] or not header["alloc_table_ptr"]:
        raise UserError(f"{path}: holds no finished data set (its writer did not end); make it again with python -m fastbyol convert")
    fields = _read(path, FIELD, int(header["num_fields"]), HEADER.itemsize)
    types = fields["type_id"].tolist()
    if unknown := [type_id for type_id in types if type_id not in _FIELD_TYPES]:
        raise UserError(
            f"{path}: has a field of type {unknown[0]}; only images, integers and floats are read here. Use python -m fastbyol convert"
        )
    row, rows, at = np.dtype([("", _FIELD_TYPES[type_id]) for type_id in types], align=True), int(header["num_samples"]), fields.nbytes
    at += HEADER.itemsize
    _require_bytes(path, at + rows * row.itemsize)
    for type_id, what in ((IMAGE_FIELD, "image"), (INT_FIELD, "integer label")):
        if type_id not in types:
            raise UserError(f"{path}: has no {what} field; make it with python -m fastbyol convert")
    image, label = (f"f{types.index(type_id)}" for type_id in (IMAGE_FIELD, INT_FIELD))
    arguments = fields["arguments"][types.index(IMAGE_FIELD)][:16].tobytes()
    checksums_at = int.from_bytes(arguments[8:], "little") if arguments.startswith(_CHECKSUMS_MAGIC) else None
    dtypes = {name: dtype for name, dtype in _COLUMNS.items() if name != "crc32" or checksums_at is not None}

    def columns() -> Columns:
        found = {name: np.empty(rows, dtype=dtype) for name, dtype in dtypes.items()}
        for piece in row_pieces(rows):
            samples = _read(path, row, piece.stop - piece.start, at + piece.start * row.itemsize)
            for name, column in (("mode", "mode"), ("height", "height"), ("width", "width"), ("offset", "data_ptr")):
                found[name][piece] = samples[image][column]
            found["label"][piece] = samples[label]
        found["size"] = _sizes(path, found["offset"].view(np.uint64), int(header["alloc_table_ptr"]), status.st_size)
        if checksums_at is not None:
            found["crc32"] = _read(path, np.dtype("<u4"), rows, checksums_at)
        return found

    facts = {"stamp": [status.st_size, status.st_mtime_ns], "header": header.tobytes().hex()}
    table = shared_columns(path, rows=rows, facts=facts, dtypes=dtypes, make=columns)
    beton = Beton(*(table[name] for name in ("mode", "height", "width", "offset", "size", "label")), crc32=table.get("crc32"))
    _refuse_impossible_values(path, beton, end=min(int(header["alloc_table_ptr"]), status.st_size))
    return beton


def copy_tables(read: Callable[[int, int], Iterator[bytes]], file_bytes: int, path: Path) -> None:
    """Writes a sparse file of a .beton's size with its tables in their places, and holes for the images: `read_beton` accepts it as it does the original.

    read: yields the bytes [start, end) of the file in pieces. Tables that lie outside the file are left out; `read_beton` then says so.
    """
    with path.open("wb") as file:
        os.truncate(file.fileno(), file_bytes)

        def copy(start: int, end: int) -> None:
            if 0 <= start < end <= file_bytes:
                file.seek(start)
                file.writelines(read(start, end))
                file.flush()

        copy(0, HEADER.itemsize)
        header = _read(path, HEADER, 1, 0)[0]
        fields_end = HEADER.itemsize + int(header["num_fields"]) * FIELD.itemsize
        if header["version"] != VERSION or not 0 < header["num_fields"] < 64 or fields_end > file_bytes:
            return
        copy(HEADER.itemsize, fields_end)
        fields = _read(path, FIELD, int(header["num_fields"]), HEADER.itemsize)
        types = fields["type_id"].tolist()
        if set(types) - set(_FIELD_TYPES):
            return
        num_samples = int(header["num_samples"])
        row = np.dtype([("", _FIELD_TYPES[type_id]) for type_id in types], align=True)
        copy(fields_end, fields_end + num_samples * row.itemsize)
        copy(int(header["alloc_table_ptr"]), file_bytes)
        for arguments in (row.tobytes()[:16] for row in fields["arguments"]):
            if arguments.startswith(_CHECKSUMS_MAGIC):
                start = int.from_bytes(arguments[8:], "little")
                copy(start, start + 4 * num_samples)


def _refuse_impossible_values(path: Path, beton: Beton, *, end: int) -> None:
    """Raises UserError that names the first image with values that no image can have: decoders would trust them. end: of the images' bytes."""
    # Checked for a shared table too, which is a file that could be altered like any other.
    refuse_impossible_sizes(path, beton.height, beton.width)
    for piece in row_pieces(len(beton.label)):
        mode, height, width, offset, size, label = (
            column[piece].astype(np.int64) for column in (beton.mode, beton.height, beton.width, beton.offset, beton.size, beton.label)
        )
        for wrong, what in (
            ((mode != JPEG_MODE) & (mode != RAW_MODE), "is neither a JPEG nor raw pixels"),
            ((mode == RAW_MODE) & (size != 3 * height * width), "has more or fewer bytes than its raw pixels need"),
            (label < -1, "has a label below -1, which stands for none"),
            ((offset < 0) | (offset > end - size), "lies beyond the end of the images"),
        ):
            if wrong.any():
                image = piece.start + int(wrong.argmax())
                raise UserError(f"{path}: image {image} {what} (damaged, or another format); make it again with python -m fastbyol convert")


def refuse_impossible_sizes(path: Path, height: NDArray[np.integer], width: NDArray[np.integer]) -> None:
    """Raises UserError, naming the first bad image, for an image with no pixels or with more than MAX_DECODED_PIXELS."""
    for piece in row_pieces(len(height)):
        pixels = height[piece].astype(np.int64) * width[piece].astype(np.int64)
        wrong = (pixels < 1) | (pixels > MAX_DECODED_PIXELS)
        if wrong.any():
            image = piece.start + int(wrong.argmax())
            raise UserError(
                f"{path}: image {image} has {width[image]}x{height[image]} pixels by its table, must have 1 to {MAX_DECODED_PIXELS:,} (damaged?); "
                "copy or convert it again, with --max-side where images are larger"
            )


def _read(path: Path, dtype: np.dtype, count: int, offset: int) -> NDArray[Any]:
    _require_bytes(path, offset + count * dtype.itemsize)
    return np.fromfile(path, dtype=dtype, count=count, offset=offset)


def _require_bytes(path: Path, size: int) -> None:
    if size > path.stat().st_size:
        raise UserError(f"{path}: too short for a .beton file (cut, or another format); make it again with python -m fastbyol convert")


def _sizes(path: Path, pointers: NDArray[np.uint64], table_at: int, file_bytes: int) -> NDArray[np.uint32]:
    """Returns the byte size of each image from the allocation table. Raises UserError if an image has no row there or exceeds the file."""
    beyond = np.flatnonzero(pointers >= file_bytes)
    lost = f"{len(beyond):,} images, the first of them image {beyond[0]}, lie beyond its end; " if len(beyond) else ""
    cut = UserError(f"{path}: its tail is missing or damaged; {lost}copy it again, or make it again with python -m fastbyol convert")
    if table_at >= file_bytes or (file_bytes - table_at) % ALLOCATION.itemsize:
        raise cut
    sizes = _sizes_in_order(path, pointers, table_at, file_bytes)
    if sizes is None:
        table = np.fromfile(path, dtype=ALLOCATION, offset=table_at)
        table = table[np.argsort(table["ptr"])]
        rows = np.searchsorted(table["ptr"], pointers)
        if len(table) < len(pointers) or rows.max() >= len(table) or (table["ptr"][rows] != pointers).any():
            raise cut
        sizes = table["size"][rows]
    # Each value alone too, as the sum may wrap around 2^64. More bytes than the file has would be overlapping images:
    # a small file could otherwise announce terabytes. No page, and so no image, has more bytes than 32 bits can tell.
    if (
        max(pointers.max(), sizes.max(), (pointers + sizes).max()) > table_at
        or sizes.sum(dtype=np.float64) > file_bytes
        or sizes.max() >> 32
    ):
        raise cut
    return sizes.astype(np.uint32)


def _sizes_in_order(path: Path, pointers: NDArray[np.uint64], table_at: int, file_bytes: int) -> NDArray[np.uint64] | None:
    """Returns the sizes if the allocation table has the images' rows in their own order, ascending, as our converter writes it; None if not."""
    num = len(pointers)
    if file_bytes - table_at != num * ALLOCATION.itemsize or (pointers[1:] <= pointers[:-1]).any():
        return None
    sizes = np.empty(num, dtype=np.uint64)
    for piece in row_pieces(num):
        table = np.fromfile(path, dtype=ALLOCATION, count=piece.stop - piece.start, offset=table_at + piece.start * ALLOCATION.itemsize)
        if not np.array_equal(table["ptr"], pointers[piece]):
            return None
        sizes[piece] = table["size"]
    return sizes
