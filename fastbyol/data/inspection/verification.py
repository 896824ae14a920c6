"""Verifies converted data: checks every byte and every image, and reports each fault with its file and image.

The checks that a training run makes when it opens the data take milliseconds; here everything is read, hashed and decoded.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Event

import numpy as np

from fastbyol.config.errors import require_at_least
from fastbyol.data.formats.manifest import Manifest, Shard, chunks_sha256, sha256_of
from fastbyol.data.inputs.listing import ImageListing
from fastbyol.data.inspection.converted import Converted, manifest_path
from fastbyol.data.inspection.findings import Fault, Findings
from fastbyol.data.inspection.image_check import ImageCheck
from fastbyol.data.inspection.shard_check import shard_faults
from fastbyol.data.inspection.table_check import checked_manifest, checked_tables
from fastbyol.host.cores import default_workers
from fastbyol.host.progress import Progress

_CHUNK_BYTES = 8 << 20
_CHUNKS_AHEAD = 4  # submitted per thread: keeps all threads busy and bounds the memory

Work = tuple[Callable[[], list[Fault]], int]
"""A piece of work, which returns the faults that it finds; and the number of images that it checks."""


def verify(path: Path, *, originals: ImageListing | None = None, workers: int = 0) -> Findings:
    """Checks a .beton or a folder of tar shards completely.

    Args:
        path: converted data; for a .beton or tars that we did not write, fewer checks are possible.
        originals: the images from which it was made; if given, each converted image is compared with its original.
        workers: threads that hash and decode; 0 means one per core. Memory is limited to a few images per thread.

    Raises:
        UserError: there is nothing at the path to verify, or it may not be read.
    """
    require_at_least("workers", workers, 0)
    found = Findings()
    manifest = checked_manifest(path, found)
    images = checked_tables(path, manifest, found)
    check = None if images is None else _image_check(images, manifest, originals, found)
    if images is not None:
        found.num_images, found.num_bytes = len(images.label), int(images.size.sum())
    with Progress(f"verify {path.name}", found.num_images, unit="images") as progress:
        work = _work(path, manifest, images, check, stop := Event())
        for faults, done in _run(work, threads=workers or default_workers(), stop=stop):
            found.add(faults)
            progress.advance(done)
    found.faults.sort(key=lambda fault: (fault.file, fault.image))
    return found


def _image_check(images: Converted, manifest: Manifest | None, originals: ImageListing | None, found: Findings) -> ImageCheck:
    if originals is None:
        return ImageCheck(images)
    dropped = len(manifest.dropped) if manifest else 0
    if len(originals.files) != len(images.label) + dropped:
        told = f"{len(images.label):,} images and {dropped:,} that were dropped"
        found.add([Fault(str(images.path), f"has {told}, the source {originals.root} has {len(originals.files):,}")])
        found.add(_unmatched(images, originals))
        return ImageCheck(images)
    if manifest is not None and manifest.class_names != originals.class_names:
        found.add([Fault(str(manifest_path(images.path)), f"names other classes than the source {originals.root} has")])
    if manifest is not None and manifest.source.get("listing_sha256") != originals.digest():
        found.notes.append(f"the source {originals.root} is not as it was: names, sizes or labels differ; images are compared by position")
    return ImageCheck(images, originals=originals)


def _unmatched(images: Converted, originals: ImageListing) -> Iterator[Fault]:
    """Yields the images and originals whose exact bytes have no counterpart. Used when the numbers of images differ, so positions don't match."""
    if images.crc32 is None:
        return
    left = Counter(images.crc32.tolist())
    for index, name in enumerate(originals.files):
        try:
            checksum = zlib.crc32(originals.location(index).read())
        except OSError:
            # No image has this checksum, so the file counts as missing.
            checksum = -1
        left[checksum] -= 1
        if left[checksum] < 0:
            yield Fault(str(images.path), f"the source's {name} is not in it, or only with other bytes")
    for index, checksum in enumerate(images.crc32.tolist()):
        if left[checksum] > 0:
            left[checksum] -= 1
            yield Fault(str(images.path), "no image of the source has the same bytes", index)


def _work(path: Path, manifest: Manifest | None, images: Converted | None, check: ImageCheck | None, stop: Event) -> Iterator[Work]:
    """Yields all checks that read the data, file by file, so that later checks find the file in the page cache."""
    if path.is_file():
        files = {path.name: path}
    else:
        named = [shard.name for shard in manifest.shards] if manifest else []
        files = {name: path / name for name in [*named, *sorted(file.name for file in path.glob("*.tar"))]}
    shards = {shard.name: shard for shard in manifest.shards} if manifest else {}
    by_digest = {shard.sha256: name for name, shard in shards.items()}
    for number, (name, file) in enumerate(files.items()):
        if not file.is_file():
            yield partial(list, [Fault(str(file), "missing, although the manifest names it")]), 0
            continue
        if manifest:
            # A .beton may have been renamed together with its manifest, so it is not looked up by name.
            shard = shards.get(name) if path.is_dir() else next(iter(shards.values()), None)
            yield partial(_hash_faults, file, shard, by_digest, stop), 0
        if images is None or check is None or number >= len(images.files):
            continue
        if manifest and path.is_dir():
            yield partial(shard_faults, file, images=images, number=number), 0
        # In chunks of neighbours of a few MiB.
        members = np.flatnonzero(images.file == number)
        members = members[np.argsort(images.offset[members], kind="stable")]
        chunk = np.cumsum(images.size[members]) // _CHUNK_BYTES
        for part in np.split(members, np.flatnonzero(np.diff(chunk)) + 1):
            yield partial(_image_faults, file, check, part.tolist()), len(part)


def _hash_faults(file: Path, shard: Shard | None, by_digest: Mapping[str, str], stop: Event) -> list[Fault]:
    """Checks a file's size and sha256. by_digest: names of all shards by their sha256 in the manifest, to recognise swapped files."""
    if shard is None:
        return [Fault(str(file), "is not in the manifest")]
    try:
        size = file.stat().st_size
        if shard.chunk_bytes:
            starts = range(0, size, shard.chunk_bytes)
            found = chunks_sha256([sha256_of(file, start=at, size=shard.chunk_bytes, stop=stop) for at in starts])
        else:
            found = sha256_of(file, stop=stop)
    except OSError as error:
        return [Fault(str(file), f"cannot be read ({error.strerror})")]
    if found == shard.sha256 and size == shard.bytes:
        return []
    if found != shard.sha256 and found in by_digest:
        what = f"is what the manifest calls {by_digest[found]}: renamed, or swapped with it"
    elif size != shard.bytes:
        what = f"has {size:,} bytes, the manifest says {shard.bytes} (cut, replaced, or the manifest was edited)"
    else:
        what = "its sha256 is not the manifest's: bytes have changed, or the manifest was edited"
    return [Fault(str(file), what)]


def _image_faults(file: Path, check: ImageCheck, chunk: list[int]) -> list[Fault]:
    return [Fault(str(file), what, index) for index in chunk for what in check.faults(index)]


def _run(work: Iterator[Work], *, threads: int, stop: Event) -> Iterator[tuple[list[Fault], int]]:
    """Yields faults and number of images of each piece of work as it finishes, so that a long one, such as hashing a file, delays no other.

    Sets `stop` when the consumer stops, so that hashing ends early.
    """
    pending: dict[Future[list[Fault]], int] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="fastbyol-verify") as pool:
        try:
            while True:
                pending |= {pool.submit(piece): images for piece, images in islice(work, threads * _CHUNKS_AHEAD - len(pending))}
                if not pending:
                    return
                for future in wait(pending, return_when=FIRST_COMPLETED).done:
                    yield future.result(), pending.pop(future)
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
