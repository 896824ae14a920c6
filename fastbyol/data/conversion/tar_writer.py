"""Writes images as WebDataset tar shards with DALI indices, in a seeded random order; JPEGs are stored byte for byte.

One machine writes a whole folder. Several machines can write disjoint parts of the same order into one folder, which `tar_parts` merges.
"""

from __future__ import annotations

import struct
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.arguments import through_links
from fastbyol.config.errors import UserError, require, require_at_least
from fastbyol.data.conversion.encode import EncodedImage
from fastbyol.data.conversion.image_pass import Output, convert_images, kept_rows, touched_images
from fastbyol.data.conversion.report import make_manifest, write_report
from fastbyol.data.conversion.task import ConversionOptions, Images, Task, make_task, open_work
from fastbyol.data.conversion.work_folder import GrowingFile, WorkFolder, disk_errors, put_in_place, require_free_name
from fastbyol.data.formats.manifest import TAR_MANIFEST, Manifest, Shard, write_manifest
from fastbyol.data.formats.tar_shards import INDEX_VERSION, SAMPLE, SAMPLE_TABLE, TAR_REPORT, index_path, shard_name
from fastbyol.data.traversal import seeded_permutation
from fastbyol.host.durable_files import flush_to_disk
from fastbyol.host.signals import deferred_stop

SHARDS_FOLDER = "shards"
_BLOCK = tarfile.BLOCKSIZE
_NUMBERS_BYTES = 4 * _BLOCK  # .cls and .idx: a header and a block each


def write_tar_shards(
    data: Images,
    *,
    out: Path,
    workers: int = 0,
    shard_mib: int = 256,
    seed: int = 0,
    overwrite: str = "refuse",
    options: ConversionOptions | None = None,
) -> Manifest:
    """Converts images to a folder `out` of tar shards, their indices, a sample table, a manifest and a report.

    Image i of the listing has three tar members: i.jpg, i.cls (its label, int64, little-endian), and i.idx (the number i, likewise). Sample i
    of the table is the i-th kept image of the listing.

    Args:
        data: a folder of class folders, ImageNet's tar, or a listing.
        out: folder to make, or an empty folder.
        workers: processes that read and check images; 0 means one per core.
        shard_mib: size at which a shard is closed.
        seed: seed of the samples' order in the shards. All samples are shuffled because DALI's own reader shuffles only within a buffer.
        overwrite: 'refuse' an existing `out`, or 'replace' it if it was made by this function.
        options: all other options.

    Raises:
        UserError: the folder does not exist, too many images cannot be kept, the output exists, or there is too little disk space. If the
            conversion has begun, the same call continues it.
        Stopped: Ctrl-C or SIGTERM; the same call continues.
    """
    options, out = options or ConversionOptions(), through_links(out)
    settings = tar_settings(options, shard_mib=shard_mib, seed=seed)
    with deferred_stop() as stop, disk_errors(out):
        require_free_name(out, data=SHARDS_FOLDER, overwrite=overwrite, marker=TAR_MANIFEST)
        task = make_task(data, order=lambda num: seeded_permutation(num, seed), out=out, options=options, workers=workers)
        with open_work(task, kind="tar", settings=settings) as work:
            output = TarOutput(work, shard_mib=shard_mib)
            rows = convert_images(task, output, work, stop=stop)
            report = work.path / "report.json"
            write_report(report, task, rows, touched_images(task, work))
            shards = output.finish(rows)
            folder = work.path / SHARDS_FOLDER
            # The table is in listing order, as a .beton is, so that sample i is the same image with both backends.
            rows = np.sort(rows, order="index")
            np.save(folder / SAMPLE_TABLE, sample_table(task, rows))
            manifest = make_manifest("tar", task, rows, shards, settings)
            report.replace(folder / TAR_REPORT)
            write_manifest(folder / TAR_MANIFEST, manifest)
            for file in folder.iterdir():
                flush_to_disk(file)
            flush_to_disk(folder)
            put_in_place(folder, out)
            work.discard()
    return manifest


def tar_settings(options: ConversionOptions, *, shard_mib: int, seed: int) -> dict[str, int | float | str]:
    """Returns the settings on which the result depends, for the manifest. Raises UserError for options that tar shards do not support."""
    require_at_least("shard-mb", shard_mib, 1)
    require(0 <= seed < 2**63, "seed", seed, "an integer in [0, 2^63)")
    if options.encode.raw_fraction:
        raise UserError(f"raw-fraction = {options.encode.raw_fraction:g}: tar shards hold JPEGs; pixels go into a .beton only")
    return {"seed": seed, "shard_mib": shard_mib, **options.encode.as_plain()}


def sample_table(task: Task, rows: NDArray[np.void]) -> NDArray[np.void]:
    """Returns the sample table: the rows of the kept images in the readers' format."""
    kept = kept_rows(rows)
    table = np.zeros(len(kept), dtype=SAMPLE)
    for name in ("shard", "offset", "size", "crc32", "height", "width"):
        table[name] = kept[name]
    table["label"] = np.array(task.listing.labels, dtype=np.int64)[kept["index"].astype(np.int64)]
    return table


class TarOutput(Output):
    """Writes one shard after another in the work folder."""

    bytes_per_image = _BLOCK + _BLOCK // 2 + _NUMBERS_BYTES

    def __init__(self, work: WorkFolder, *, shard_mib: int, part: str = "") -> None:
        """part: name of the part, which becomes part of the shards' names, if there are several."""
        self._work, self._shard_bytes, self._part = work, shard_mib << 20, part
        self._file: GrowingFile | None = None
        self._number = 0

    def resume(self, rows: NDArray[np.void]) -> None:
        kept = kept_rows(rows)
        if not len(kept):
            return
        # Dropped images leave no bytes, so the end of the last shard follows from the last kept image.
        self._number, end = int(kept["shard"][-1]), int(kept["offset"][-1]) + _padded(int(kept["size"][-1])) + _NUMBERS_BYTES
        if end < self._shard_bytes:
            self._file = self._work.open(self._path(self._number))
        else:
            self._number += 1

    def add(self, index: int, label: int, image: EncodedImage) -> tuple[int, int]:
        file = self._file = self._file or self._work.open(self._path(self._number))
        shard, offset = self._number, file.size + _BLOCK
        for extension, data in (("jpg", image.data), ("cls", struct.pack("<q", label)), ("idx", struct.pack("<q", index))):
            file.write(member_header(f"{index:08d}.{extension}", len(data)) + data + bytes(-len(data) % _BLOCK))
        if file.size >= self._shard_bytes:
            self._close()
        return shard, offset

    def finish(self, rows: NDArray[np.void]) -> list[Shard]:
        """Closes the last shard and writes the DALI indices; returns all shards. rows: one per image, in the order of conversion."""
        if self._file:
            self._close()
        kept, shards = kept_rows(rows), []
        for name, number in ((self._path(number), number) for number in range(self._number)):
            path, columns = self._work.path / name, kept[kept["shard"] == number][["index", "offset", "size"]]
            lines = [_index_line(*row) for row in columns.tolist()]
            index_path(path).write_text("\n".join([f"{INDEX_VERSION} {len(lines)}", *lines, ""]), encoding="ascii")
            shards.append(Shard(path.name, len(lines), path.stat().st_size, self._work.digests.result(name)))
        return shards

    def _path(self, number: int) -> str:
        return f"{SHARDS_FOLDER}/{shard_name(number, part=self._part)}"

    def _close(self) -> None:
        """Closes a shard: two empty blocks mark the end of a tar, which is then padded to whole records."""
        assert self._file is not None
        self._file.write(bytes(2 * _BLOCK + -(self._file.size + 2 * _BLOCK) % tarfile.RECORDSIZE))
        self._work.close_file(self._path(self._number))
        self._work.digests.begin(self._path(self._number))
        self._file = None
        self._number += 1


def member_header(name: str, size: int) -> bytes:
    """Returns the header that tarfile would write for a file of mode 644 without owner or time, in a fifth of the time.

    Only name, size and checksum differ between members.
    """
    name_field, size_field = name.encode("ascii"), b"%011o" % size
    checksum = _OTHER_FIELDS_SUM + sum(name_field) + sum(size_field)
    before = name_field + _HEADER[len(name_field) : _SIZE_AT] + size_field + _HEADER[_SIZE_AT + 11 : _SUM_AT]
    return before + b"%06o\0 " % checksum + _HEADER[_SUM_AT + 8 :]


# POSIX: offsets of the size (11 octal digits) and of the checksum (8 characters, which count as blanks in the sum).
_SIZE_AT, _SUM_AT = 124, 148
_HEADER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)  # mode 644, without owner or time
_OTHER_FIELDS_SUM = sum(_HEADER) - sum(_HEADER[_SIZE_AT : _SIZE_AT + 11]) - sum(_HEADER[_SUM_AT : _SUM_AT + 8]) + 8 * ord(" ")


def _index_line(index: int, offset: int, size: int) -> str:
    """Returns a sample's line in the DALI index: the location of its three members. Contrary to its documentation, DALI requires their names."""
    cls = offset + _padded(size) + _BLOCK
    places = (("jpg", offset, size), ("cls", cls, 8), ("idx", cls + 2 * _BLOCK, 8))
    return " ".join(f"{extension} {at} {length} {index:08d}.{extension}" for extension, at, length in places)


def _padded(size: int) -> int:
    return size + -size % _BLOCK
