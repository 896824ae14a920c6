"""Checks every byte that a conversion wrote, and every image, and tells all that is wrong: which file, which image, what.

The checks at open, which a training run makes, take milliseconds; here everything is read, hashed and decoded.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastbyol.config.errors import UserError, require_at_least
from fastbyol.data.class_counts import refuse_other_counts
from fastbyol.data.converted import Converted, converted_beton, converted_shards, is_converted, listed_positions, manifest_path
from fastbyol.data.image_check import ImageCheck
from fastbyol.data.image_listing import ImageListing
from fastbyol.data.manifest import Manifest, Shard, is_sealed, read_manifest, sha256_of
from fastbyol.data.progress import Progress
from fastbyol.data.shard_check import foreign_shard, shard_faults

KEPT_FAULTS = 1000
"""Faults beyond are counted only."""
_CHUNK_BYTES = 8 << 20
_CHUNKS_AHEAD = 4  # per thread: all are kept busy, and memory bounded


class Fault(NamedTuple):
    """Something that is not as it should be."""

    file: str
    image: int
    """Its number; -1: about the file."""
    what: str

    def __str__(self) -> str:
        return f"{self.file}: " + (f"image {self.image}: " if self.image >= 0 else "") + self.what


@dataclass
class Verification:
    """What was found."""

    num_images: int = 0
    num_bytes: int = 0
    num_classes: int | None = None
    faults: list[Fault] = field(default_factory=list)
    """By file, then by image; at most KEPT_FAULTS."""
    num_faults: int = 0
    notes: list[str] = field(default_factory=list)
    """What could not be checked."""

    def add(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            self.num_faults += 1
            if self.num_faults <= KEPT_FAULTS:
                self.faults.append(fault)


Work = Callable[[], tuple[list[Fault], int]]
"""Gives the faults that it found, and how many images it has checked."""


def verify(path: Path, *, originals: ImageListing | None = None, threads: int = 0) -> Verification:
    """Checks a .beton or a folder of tar shards completely.

    Args:
        path: what a conversion made; or a foreign .beton or folder of tars, of which less can be said.
        originals: the images that it was made from: each converted image is then compared with its original.
        threads: that hash and decode; 0: one per core. Memory stays at a few images per thread.

    Raises:
        UserError: there is nothing at the path that could be verified, or it may not be read.
    """
    require_at_least("threads", threads, 0)
    threads = threads or len(os.sched_getaffinity(0))
    found = Verification()
    manifest = _read_manifest(path, found)
    images = _read_tables(path, manifest, found)
    check = None if images is None else _image_check(images, manifest, originals, found)
    if images is not None:
        found.num_images, found.num_bytes = len(images.label), int(images.size.sum())
    with Progress(f"verify {path.name}", found.num_images, unit="images") as progress:
        for faults, done in _run(_work(path, manifest, images, check), threads=threads):
            found.add(faults)
            progress.advance(done)
    found.faults.sort(key=lambda fault: (fault.file, fault.image))
    return found


def _read_manifest(path: Path, found: Verification) -> Manifest | None:
    """The manifest; None if there is none, or none that can be used."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give what data_prep/to_ffcv.py or data_prep/to_dali.py made")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: may not be read; check its permissions")
    if not is_converted(path):
        raise UserError(
            f"{path}: is neither a .beton nor a folder of tar shards; give what data_prep/to_ffcv.py or data_prep/to_dali.py made"
        )
    if not manifest_path(path).exists():
        found.notes.append(f"no manifest {manifest_path(path).name}: whether the files are whole, and what the classes are, cannot be told")
        return None
    try:
        manifest = read_manifest(manifest_path(path))
    except UserError as error:
        found.add([Fault(str(manifest_path(path)), -1, _without(error, manifest_path(path)))])
        return None
    if not is_sealed(manifest_path(path)):
        found.add([Fault(str(manifest_path(path)), -1, "has been edited: it is not what the conversion wrote")])
    found.num_classes = len(manifest.class_names)
    return manifest


def _read_tables(path: Path, manifest: Manifest | None, found: Verification) -> Converted | None:
    """Where the images lie; None if that cannot be read. Notes every disagreement with the manifest."""
    try:
        if path.is_file():
            images = converted_beton(path, manifest)
        elif manifest is not None:
            images = converted_shards(path, manifest)
        else:
            images = _foreign_shards(path, found)
    except UserError as error:
        found.add([Fault(str(path), -1, _without(error, path))])
        return None
    if images.crc32 is None:
        found.notes.append("it has no checksums of its images: a change that still decodes cannot be noticed")
    if manifest is not None:
        found.add(Fault(str(manifest_path(path)), -1, what) for what in _disagreements(path, images, manifest))
    return images


def _foreign_shards(folder: Path, found: Verification) -> Converted:
    files = sorted(folder.glob("*.tar"))
    places: list[tuple[int, int, int]] = []
    for number, tar in enumerate(files):
        in_tar, faults = foreign_shard(tar)
        places += [(number, *place) for place in in_tar]
        found.add(Fault(str(tar), -1, what) for _, what in faults)
    if not places:
        raise UserError(f"{folder}: no image in its {len(files)} tars; give a folder that data_prep/to_dali.py made")
    file, offset, size = np.array(places, dtype=np.int64).T
    unknown = np.zeros_like(file)
    return Converted(
        folder, tuple(files), file, offset, size, unknown, unknown, unknown, unknown.astype(np.bool_), None, np.arange(len(file))
    )


def _disagreements(path: Path, images: Converted, manifest: Manifest) -> Iterator[str]:
    """What the manifest says that the tables and files do not."""
    if manifest.kind != (kind := "beton" if path.is_file() else "tar"):
        yield f"is of the kind {manifest.kind!r}, this is a {kind}"
    try:
        listed_positions(manifest)
    except UserError as error:
        yield str(error)
    if manifest.num_samples != len(images.label):
        yield f"says {manifest.num_samples} images, there are {len(images.label)}"
    try:
        refuse_other_counts(path, images.label, manifest)
    except UserError as error:
        yield str(error)
    samples = np.bincount(images.file, minlength=len(images.files)).tolist()
    for shard, count in zip(manifest.shards, samples, strict=False):
        if shard.samples != count:
            yield f"says {shard.samples} images in {shard.name}, the sample table has {count}"
    measured = _summary(images)
    for name in measured.keys() & manifest.images.keys():
        if manifest.images[name] != measured[name]:
            yield f"says {name} = {manifest.images[name]}, the images have {measured[name]}"


def _summary(images: Converted) -> dict[str, float]:
    sides = {
        f"{name}_{which}": value
        for name, side in (("height", images.height), ("width", images.width))
        for which, value in (("min", int(side.min())), ("mean", round(int(side.sum()) / len(side), 2)), ("max", int(side.max())))
    }
    return sides | {"bytes": int(images.size.sum())}


def _image_check(images: Converted, manifest: Manifest | None, originals: ImageListing | None, found: Verification) -> ImageCheck:
    if originals is None:
        return ImageCheck(images)
    dropped = len(manifest.dropped) if manifest else 0
    if len(originals.files) != len(images.label) + dropped:
        told = f"{len(images.label):,} images and {dropped:,} that were dropped"
        found.add([Fault(str(images.path), -1, f"has {told}, the source {originals.root} has {len(originals.files):,}")])
        found.add(_unmatched(images, originals))
        return ImageCheck(images)
    if manifest is not None and manifest.class_names != originals.class_names:
        found.add([Fault(str(manifest_path(images.path)), -1, f"names other classes than the source {originals.root} has")])
    if manifest is not None and manifest.source.get("listing_sha256") != originals.digest():
        found.notes.append(f"the source {originals.root} is not as it was: names, sizes or labels differ; images are compared by position")
    return ImageCheck(images, originals=originals)


def _unmatched(images: Converted, originals: ImageListing) -> Iterator[Fault]:
    """Images and originals whose very bytes the other side has not, where positions cannot tell which belongs to which."""
    if images.crc32 is None:
        return
    left = Counter(images.crc32.tolist())
    for index, name in enumerate(originals.files):
        try:
            checksum = zlib.crc32(originals.location(index).read())
        except OSError:
            checksum = -1
        left[checksum] -= 1
        if left[checksum] < 0:
            yield Fault(str(images.path), -1, f"the source's {name} is not in it, or not with these bytes")
    for index, checksum in enumerate(images.crc32.tolist()):
        if left[checksum] > 0:
            left[checksum] -= 1
            yield Fault(str(images.path), index, "no image of the source has its bytes")


def _work(path: Path, manifest: Manifest | None, images: Converted | None, check: ImageCheck | None) -> Iterator[Work]:
    """All checks that read the data, file by file, so that what one has read is still in memory for the next."""
    if path.is_file():
        files = {path.name: path}
    else:
        named = [shard.name for shard in manifest.shards] if manifest else []
        files = {name: path / name for name in [*named, *sorted(file.name for file in path.glob("*.tar"))]}
    shards = {shard.name: shard for shard in manifest.shards} if manifest else {}
    if manifest and path.is_file():  # it may have been renamed, its manifest with it
        shards = {path.name: manifest.shards[0]}
    for number, (name, file) in enumerate(files.items()):
        if not file.is_file():
            yield partial(_one_fault, str(file), "missing, the manifest names it")
            continue
        if manifest:
            yield partial(_hash_faults, file, shards.get(name))
        if images is None or check is None or number >= len(images.files):
            continue
        if manifest and path.is_dir():
            yield partial(_shard_faults, file, images, number)
        yield from (partial(_image_faults, file, check, chunk) for chunk in _chunks(images, number))


def _one_fault(file: str, what: str) -> tuple[list[Fault], int]:
    return [Fault(file, -1, what)], 0


def _hash_faults(file: Path, shard: Shard | None) -> tuple[list[Fault], int]:
    if shard is None:
        return _one_fault(str(file), "is not in the manifest")
    size = file.stat().st_size
    if size != shard.bytes:
        return _one_fault(str(file), f"has {size:,} bytes, the manifest says {shard.bytes} (cut, replaced, or the manifest was edited)")
    try:
        if sha256_of(file) == shard.sha256:
            return [], 0
    except OSError as error:
        return _one_fault(str(file), f"cannot be read ({error.strerror})")
    return _one_fault(str(file), "its sha256 is not the manifest's: bytes have changed, or the manifest was edited")


def _shard_faults(file: Path, images: Converted, number: int) -> tuple[list[Fault], int]:
    try:
        faults = shard_faults(file, images=images, number=number)
    except OSError as error:
        return _one_fault(str(file), f"cannot be read ({error.strerror})")
    return [Fault(str(file), -1 if image is None else image, what) for image, what in faults], 0


def _image_faults(file: Path, check: ImageCheck, chunk: list[int]) -> tuple[list[Fault], int]:
    return [Fault(str(file), index, what) for index in chunk for what in check.faults(index)], len(chunk)


def _chunks(images: Converted, number: int) -> Iterator[list[int]]:
    """Images of a file that lie together, a few MiB at a time."""
    members = np.flatnonzero(images.file == number)
    members = members[np.argsort(images.offset[members], kind="stable")]
    chunk = np.cumsum(images.size[members]) // _CHUNK_BYTES
    for part in np.split(members, np.flatnonzero(np.diff(chunk)) + 1):
        if len(part):
            yield part.tolist()


def _run(work: Iterator[Work], *, threads: int) -> Iterator[tuple[list[Fault], int]]:
    """Everything that the pieces of work find, as they end: a long one, such as hashing a whole file, holds up no other."""
    pending: set[Future[tuple[list[Fault], int]]] = set()
    with ThreadPoolExecutor(threads, thread_name_prefix="fastbyol-verify") as pool:
        try:
            while True:
                pending |= {pool.submit(piece) for piece in islice(work, threads * _CHUNKS_AHEAD - len(pending))}
                if not pending:
                    return
                ended, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in ended:
                    yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _without(error: UserError, path: Path) -> str:
    """The message without the path at its start."""
    return str(error).removeprefix(f"{path}: ")
