"""Writes a .beton that any FFCV reader can open, in which JPEGs are stored byte for byte.

FFCV's own writer re-encodes every JPEG (a generation loss, and twice the time), hangs for ever if one of its worker processes dies, and
has to start again after an interruption.

The number of kept images is only known at the end, so the table of samples has room for all images: first the rows of the kept ones, then
unused bytes, then the images. Readers only read as many rows as the header says.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.arguments import through_links
from fastbyol.config.errors import UserError, require
from fastbyol.data.conversion.encode import EncodedImage, EncodeSettings
from fastbyol.data.conversion.image_pass import Output, convert_images, kept_rows, touched_images
from fastbyol.data.conversion.report import make_manifest, report_path, write_report
from fastbyol.data.conversion.task import ConversionOptions, Images, make_task, open_work
from fastbyol.data.conversion.work_folder import WorkFolder, disk_errors, put_in_place, require_free_name
from fastbyol.data.formats.beton import ALLOCATION, FIELD, HEADER, MAX_PAGE_BYTES, MIN_PAGE_BYTES, SAMPLE, VERSION, field_descriptors
from fastbyol.data.formats.manifest import Manifest, Shard, beton_manifest_path, chunks_sha256, write_manifest
from fastbyol.data.inputs.listing import ImageListing
from fastbyol.data.traversal import seeded_permutation
from fastbyol.host.durable_files import flush_to_disk
from fastbyol.host.signals import deferred_stop

RAW_PAGE_BYTES = 1 << 26
"""Largest page size for raw images: 64 MiB is an image of 22 million pixels. Larger ones are stored as JPEG."""
_DATA = "data"
_CHUNK_BYTES = 1 << 26  # chunks that are hashed separately, see manifest.Shard


def write_beton(
    data: Images,
    *,
    out: Path,
    workers: int = 0,
    overwrite: str = "refuse",
    shuffle_seed: int | None = None,
    options: ConversionOptions | None = None,
) -> Manifest:
    """Converts images to the file `out`, with a manifest and a report beside it. Row i is the i-th kept image of the listing.

    Args:
        data: a folder of class folders, ImageNet's tar, or a listing.
        out: path of the .beton; `out`.json is the manifest, `out`.report.json the report.
        workers: processes that read and check images; 0 means one per core.
        overwrite: 'refuse' or 'replace' an existing `out`.
        shuffle_seed: write the rows in a random permutation of the listing with this seed, for readers that read the file sequentially.
        options: all other options.

    Raises:
        UserError: the folder does not exist, too many images cannot be kept, the output exists, or there is too little disk space. If the
            conversion has begun, the same call continues it.
        Stopped: Ctrl-C or SIGTERM; the same call continues.
    """
    options, out = options or ConversionOptions(), through_links(out)
    if out.suffix != ".beton":
        raise UserError(f"--out {out}: must end in .beton")
    if shuffle_seed is not None:
        require(0 <= shuffle_seed < 2**63, "shuffle-seed", shuffle_seed, "an integer in [0, 2^63)")
    with deferred_stop() as stop, disk_errors(out):
        require_free_name(out, data=_DATA, overwrite=overwrite)
        order = np.arange if shuffle_seed is None else lambda num: seeded_permutation(num, shuffle_seed)
        task = make_task(data, order=order, out=out, options=options, workers=workers)
        page_bytes = _page_bytes(task.sizes, options.encode)
        task = replace(task, options=replace(options, encode=replace(options.encode, max_stored_bytes=page_bytes)))
        settings: dict[str, int | float | str] = {"page_bytes": page_bytes, **options.encode.as_plain()}
        if shuffle_seed is not None:
            settings["shuffle_seed"] = shuffle_seed
        with open_work(task, kind="beton", settings=settings) as work:
            output = _BetonOutput(work, images=len(task.order), page_bytes=page_bytes)
            rows = convert_images(task, output, work, stop=stop)
            report, new_manifest = work.path / "report.json", work.path / "manifest.json"
            write_report(report, task, rows, touched_images(task, work))
            _write_tables(work.path / _DATA, rows, task.listing, page_bytes=page_bytes)
            size = (work.path / _DATA).stat().st_size
            shard = Shard(out.name, len(kept_rows(rows)), size, output.sha256(size), chunk_bytes=_CHUNK_BYTES)
            manifest = make_manifest("beton", task, rows, [shard], settings)
            write_manifest(new_manifest, manifest)
            # The manifest is moved first: without one, the file would silently lose its class names; one of another file is noticed at open.
            put_in_place(report, report_path(out))
            put_in_place(new_manifest, beton_manifest_path(out))
            put_in_place(work.path / _DATA, out)
            work.discard()
    return manifest


def _page_bytes(sizes: NDArray[np.int64], settings: EncodeSettings) -> int:
    """Returns the page size: a power of two that holds the largest image, as FFCV's page cache requires.

    It is at most MAX_PAGE_BYTES; larger images will be dropped.
    """
    largest = int(sizes.max())
    if settings.raw_fraction:
        side = settings.max_side_px
        largest = max(largest, RAW_PAGE_BYTES if side is None else min(3 * side * side, RAW_PAGE_BYTES))
    return min(MAX_PAGE_BYTES, max(MIN_PAGE_BYTES, 1 << max(largest - 1, 0).bit_length()))


class _BetonOutput(Output):
    """Appends images to the .beton's data, so that none crosses a page. Pages count from the start of the file, so the first has the tables."""

    bytes_per_image = SAMPLE.itemsize + ALLOCATION.itemsize + 4

    def __init__(self, work: WorkFolder, *, images: int, page_bytes: int) -> None:
        self._work, self._page_bytes = work, page_bytes
        self._images_at = HEADER.itemsize + 2 * FIELD.itemsize + images * SAMPLE.itemsize  # behind a table with room for all images
        self._digested = -(-self._images_at // _CHUNK_BYTES) * _CHUNK_BYTES
        """Chunks up to this offset are hashed or being hashed, except the first ones with the tables, which are written last."""

    def resume(self, rows: NDArray[np.void]) -> None:
        self._file = self._work.open(_DATA, begins_with=self._images_at)
        self._begin_digests()

    def add(self, index: int, label: int, image: EncodedImage) -> tuple[int, int]:
        size = len(image.data)
        # FFCV reads whole pages: an image that crossed into the next one would be cut.
        if self._file.size // self._page_bytes != (self._file.size + size - 1) // self._page_bytes:
            self._file.write(bytes(-self._file.size % self._page_bytes))
        at = self._file.size
        self._file.write(image.data)
        self._begin_digests()
        return 0, at

    def sha256(self, size: int) -> str:
        """Returns the sha256 of the finished file, computed from its chunks."""
        starts = range(0, size, _CHUNK_BYTES)
        return chunks_sha256([self._work.digests.result(_DATA, start=at, size=_CHUNK_BYTES) for at in starts])

    def _begin_digests(self) -> None:
        """Starts the digests of the chunks that have become full."""
        # The digests' thread reads the file, so the buffer must have left this process.
        while self._file.size >= self._digested + _CHUNK_BYTES:
            self._file.flush()
            self._work.digests.begin(_DATA, start=self._digested, size=_CHUNK_BYTES)
            self._digested += _CHUNK_BYTES


def _write_tables(path: Path, rows: NDArray[np.void], listing: ImageListing, *, page_bytes: int) -> None:
    """Writes checksums and allocation table, with which a .beton must end, and last the header, so that an unfinished file has none."""
    kept, at = kept_rows(rows), path.stat().st_size
    samples = np.zeros(len(kept), dtype=SAMPLE)
    for name, column in (("mode", "mode"), ("width", "width"), ("height", "height"), ("data_ptr", "offset")):
        samples["f0"][name] = kept[column]
    samples["f1"] = np.array(listing.labels, dtype=np.int64)[kept["index"].astype(np.int64)]
    allocations = np.zeros(len(kept), dtype=ALLOCATION)
    allocations["sample_id"] = np.arange(len(kept))
    allocations["ptr"], allocations["size"] = kept["offset"], kept["size"]
    checksums = kept["crc32"].astype("<u4").tobytes()
    header = np.zeros(1, dtype=HEADER)
    header[0] = (VERSION, 2, page_bytes, len(kept), at + len(checksums))
    with path.open("r+b") as file:
        file.seek(at)
        file.write(checksums + allocations.tobytes())
        file.flush()
        flush_to_disk(path)
        file.seek(0)
        file.write(header.tobytes() + field_descriptors(checksums_at=at).tobytes() + samples.tobytes())
    flush_to_disk(path)
