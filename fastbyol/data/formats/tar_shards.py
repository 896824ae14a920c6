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

SAMPLE_TABLE, TAR_REPORT = "samples.npy", "report.json"
SAMPLE = np.dtype(
    [("shard", "<u4"), ("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4"), ("label", "<i8"), ("height", "<u2"), ("width", "<u2")]
)
"""Row of the sample table: location of a sample's JPEG, CRC-32 of its bytes, label and size in pixels.

There is one row per sample, in listing order; images in the manifest's `dropped` have none."""
INDEX_VERSION = "v1.2"
PARTS = "part-*-of-*.json"
"""Files that describe the parts of several machines, until `to_dali.py --merge` removes them."""
_MAX_HEADER_BYTES = 1 << 16


def largest_sample_table(num_samples: int) -> int:
    """Returns the largest size in bytes of the sample table of so many samples."""
    return num_samples * SAMPLE.itemsize + _MAX_HEADER_BYTES


def shard_name(number: int, *, part: str = "") -> str:
    """Returns a shard's file name. part: number of the part, if the conversion was divided into several."""
    return f"shard-{part}-{number:05d}.tar" if part else f"shard-{number:05d}.tar"


def is_shard_folder(path: Path) -> bool:
    """Returns True if the folder holds our converted shards, also with some of their files missing: whoever reads them says which."""
    return (path / TAR_MANIFEST).exists() or (path / SAMPLE_TABLE).exists() or any(path.glob(PARTS)) or any(path.glob("shard-*.idx"))


def index_path(tar: Path) -> Path:
    """Returns the path of the DALI index beside a tar."""
    return tar.with_suffix(".idx")


def read_tar_shards(folder: Path) -> tuple[Manifest, NDArray[np.void]]:
    """Returns manifest and sample table, checked against the files. Raises UserError if a file is missing, truncated or of another data set."""
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


def read_tar_tables(folder: Path) -> tuple[Manifest, NDArray[np.void]]:
    """Returns manifest and sample table. Raises UserError if one is missing or damaged; the shards need not be there."""
    manifest = read_manifest(folder / TAR_MANIFEST)
    if manifest.kind != "tar":
        raise UserError(
            f"{folder / TAR_MANIFEST}: describes {shortened(manifest.kind)!r}, not tar shards; convert again with python -m fastbyol convert --to dali"
        )
    return manifest, read_sample_table(folder / SAMPLE_TABLE, manifest)


def read_sample_table(path: Path, manifest: Manifest) -> NDArray[np.void]:
    """Returns the sample table at `path`. Raises UserError if it is missing, damaged, or does not belong to the manifest's shards."""
    again = "copy it again, or convert again with python -m fastbyol convert --to dali"
    foreign = UserError(f"{path}: not the sample table of these {manifest.num_samples} samples; {again}")
    try:
        with path.open("rb") as file:  # not np.load: given a zip file, it returns no array
            if os.fstat(file.fileno()).st_size > largest_sample_table(manifest.num_samples):
                raise foreign
            table = np.lib.format.read_array(file, allow_pickle=False)
    except UserError:
        raise
    except Exception as error:  # a damaged header raises anything from SyntaxError to MemoryError
        raise UserError(f"{path}: no readable sample table ({error}); {again}") from error
    if table.dtype != SAMPLE or table.shape != (manifest.num_samples,) or table["shard"].max() >= len(manifest.shards):
        raise foreign
    all_bytes = np.array([shard.bytes for shard in manifest.shards], dtype=np.uint64)
    shard_bytes = all_bytes[table["shard"]]
    # Each offset alone too: the sum may wrap around 2^64.
    if (table["offset"] > shard_bytes).any() or (table["offset"] + table["size"] > shard_bytes).any():
        raise UserError(f"{path}: points outside its shards; {again}")
    if table["size"].sum(dtype=np.uint64) > all_bytes.sum():
        raise UserError(f"{path}: its images overlap, or have more bytes than its shards; {again}")
    refuse_impossible_sizes(path, table["height"].astype(np.int64), table["width"].astype(np.int64))
    refuse_other_counts(path, table["label"], manifest)
    return table
