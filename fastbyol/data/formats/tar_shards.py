"""Reads a folder of tar shards: WebDataset tars with one DALI v1.2 index each, a sample table for random access, and the manifest.

Stock DALI (fn.readers.webdataset) and any WebDataset reader can read the tars; our own loader uses the sample table.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError, shortened
from fastbyol.data.formats.beton import refuse_impossible_sizes
from fastbyol.data.formats.manifest import TAR_MANIFEST, Manifest, read_manifest, refuse_other_counts
from fastbyol.data.formats.regular_files import require_regular
from fastbyol.host.shared_columns import Columns, row_pieces, shared_columns

SAMPLE_TABLE, TAR_REPORT = "samples.npy", "report.json"
SAMPLE = np.dtype(
    [("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4"), ("label", "<i8"), ("height", "<u2"), ("width", "<u2")]
)
"""Row of the sample table: location of a sample's JPEG, CRC-32 of its bytes, label and size in pixels.

There is one row per sample, in listing order; images in the manifest's `dropped` have none."""
INDEX_VERSION = "v1.2"
PARTS = "part-*-of-*.json"
"""Files that describe the parts of several machines, until `to_dali.py --merge` removes them."""
PART_FILES = (PARTS, "part-*-of-*.npz", "part-*-of-*.jsonl")
"""Patterns of all files of the parts: descriptions, tables of images, and notes on images."""
_MAX_HEADER_BYTES = 1 << 16


def largest_sample_table(num_samples: int) -> int:
    """Returns the largest size in bytes of the sample table of so many samples."""
    return num_samples * SAMPLE.itemsize + _MAX_HEADER_BYTES


def shard_name(number: int, *, part: str = "") -> str:
    """Returns a shard's file name. part: number of the part, if the conversion was divided into several."""
    return f"shard-{part}-{number:05d}.tar" if part else f"shard-{number:05d}.tar"


def is_shard_folder(path: Path) -> bool:
    """Returns True if the folder holds our converted shards, even if some of their files are missing: the reader reports which."""
    return (path / TAR_MANIFEST).exists() or (path / SAMPLE_TABLE).exists() or any(path.glob(PARTS)) or any(path.glob("shard-*.idx"))


def index_path(tar: Path) -> Path:
    """Returns the path of the DALI index beside a tar."""
    return tar.with_suffix(".idx")


def read_tar_shards(folder: Path) -> tuple[Manifest, Columns]:
    """Returns manifest and sample table as columns, checked against the files. Raises UserError if a file is missing, truncated or of another data set."""
    manifest, table = read_tar_tables(folder)
    for shard in manifest.shards:
        tar = folder / shard.name
        if not tar.is_file():
            raise UserError(f"{tar}: missing; copy the whole folder again, or convert again with python -m fastbyol convert --to dali")
        if (size := tar.stat().st_size) != shard.bytes:
            raise UserError(f"{tar}: {size:,} bytes, the manifest says {shard.bytes:,} (cut or replaced); copy or convert it again")
        index = index_path(tar)
        if not index.is_file():
            raise UserError(f"{index}: missing index; copy it again, or convert again with python -m fastbyol convert --to dali")
        with index.open("rb") as file:
            first_line = file.readline(64).strip()
        if first_line != f"{INDEX_VERSION} {shard.samples}".encode():
            raise UserError(f"{index}: not the {INDEX_VERSION} index of {shard.samples} samples; copy it again, or convert again")
    return manifest, table


def read_tar_tables(folder: Path) -> tuple[Manifest, Columns]:
    """Returns manifest and sample table as columns. Raises UserError if one is missing or damaged; the shards need not be there."""
    manifest = read_manifest(folder / TAR_MANIFEST)
    if manifest.kind != "tar":
        raise UserError(
            f"{folder / TAR_MANIFEST}: describes {shortened(manifest.kind)!r}, not tar shards; convert again with python -m fastbyol convert --to dali"
        )
    return manifest, read_sample_table(folder / SAMPLE_TABLE, manifest)


def read_sample_table(path: Path, manifest: Manifest) -> Columns:
    """Returns the columns of the sample table at `path`, with the names and types of SAMPLE; the offsets are int64. Widen the others before any
    arithmetic. Large tables are shared with the other processes of this machine.

    Raises UserError if the table is missing, damaged, or does not belong to the manifest's shards.
    """
    again = "copy it again, or convert again with python -m fastbyol convert --to dali"
    foreign = UserError(f"{path}: not the sample table of these {manifest.num_samples} samples; {again}")
    try:
        require_regular(path)
        with path.open("rb", buffering=0) as file:  # not np.load: given a zip file, it returns no array
            status = os.fstat(file.fileno())
            if status.st_size > largest_sample_table(manifest.num_samples):
                raise foreign
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = read_header[np.lib.format.read_magic(file)](file)
            if dtype != SAMPLE or shape != (manifest.num_samples,) or fortran:
                raise foreign
            start = file.tell()
            dtypes = {name: SAMPLE[name].str for name in SAMPLE.names or ()} | {"offset": "<i8"}
            facts = {"stamp": [status.st_size, status.st_mtime_ns]}

            def columns() -> Columns:
                found = {name: np.empty(shape, dtype=kind) for name, kind in dtypes.items()}
                file.seek(start)
                for piece in row_pieces(manifest.num_samples):
                    rows = np.fromfile(file, dtype=SAMPLE, count=piece.stop - piece.start)
                    if len(rows) < piece.stop - piece.start:
                        raise ValueError("it is cut")
                    for name, column in found.items():
                        column[piece] = rows[name]
                return found

            table = shared_columns(path, rows=manifest.num_samples, facts=facts, dtypes=dtypes, make=columns)
    except UserError:
        raise
    except Exception as error:  # a damaged header raises anything from SyntaxError to MemoryError
        raise UserError(f"{path}: no readable sample table ({error}); {again}") from error
    if table["shard"].max() >= len(manifest.shards):
        raise foreign
    all_bytes = np.array([shard.bytes for shard in manifest.shards], dtype=np.int64)
    stored = 0
    for piece in row_pieces(manifest.num_samples):
        shard, offset, size = (table[name][piece] for name in ("shard", "offset", "size"))
        # An offset of 2^63 or more has become negative.
        if ((offset < 0) | (offset > all_bytes[shard] - size)).any():
            raise UserError(f"{path}: points outside its shards; {again}")
        stored += int(size.sum(dtype=np.int64))
    if stored > all_bytes.sum():
        raise UserError(f"{path}: its images overlap, or have more bytes than its shards; {again}")
    refuse_impossible_sizes(path, table["height"], table["width"])
    refuse_other_counts(path, table["label"], manifest)
    return table


def listed_position(index: int, dropped: NDArray[np.int64]) -> int:
    """Returns the position in the listing of the kept image number `index`, given the positions of the dropped ones, ascending."""
    kept_before = dropped - np.arange(len(dropped))
    return index + int(np.searchsorted(kept_before, index, side="right"))
