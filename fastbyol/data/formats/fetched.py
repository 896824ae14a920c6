"""Converted data at a URL, fetched to this machine: a .beton or a folder of tar shards with all that belongs to it."""

from __future__ import annotations

from pathlib import Path

from fastbyol.config.errors import UserError
from fastbyol.data.formats.manifest import TAR_MANIFEST, Shard, chunks_sha256, read_manifest, sha256_of
from fastbyol.data.formats.tar_shards import SAMPLE_TABLE, TAR_REPORT, index_path
from fastbyol.host.store_copies import forget, local_copy
from fastbyol.host.store_path import StorePath


def is_converted_url(place: StorePath) -> bool:
    """Returns True if the URL is that of a .beton, or of a folder with a manifest."""
    # Also where the folder's name has a dot, as 'imagenet.v2'.
    return place.suffix == ".beton" or (place / TAR_MANIFEST).exists()


def fetched_data(place: StorePath, *, damaged: str = "refuse") -> Path:
    """Returns the path of a copy of a .beton or of a folder of tar shards, whose files have the digests of its manifest.

    A file that was fetched before is used again while the store has the same one. damaged: 'refuse', or 'keep' copies files as they are, for
    `verify`, which names all faults. Raises UserError if a file is missing or damaged, and Lost if the store does not answer.
    """
    if place.suffix != ".beton":
        return _fetched_shards(place, damaged)
    described = place.with_name(f"{place.name}.json")
    shard = read_manifest(local_copy(described)[0]).shards[0] if described.exists() else None
    return _fetched(place, shard, damaged)


def _fetched_shards(folder: StorePath, damaged: str) -> Path:
    manifest = read_manifest(local_copy(folder / TAR_MANIFEST)[0])
    for shard in manifest.shards:
        if "/" in shard.name:
            raise UserError(f"{folder / TAR_MANIFEST}: names {shard.name!r}, which is not a file in its folder; convert again")
        path = _fetched(folder / shard.name, shard, damaged)
        local_copy(folder / index_path(path).name)
    for name in (TAR_REPORT, SAMPLE_TABLE):
        if name != TAR_REPORT or (folder / name).exists():
            path = local_copy(folder / name)[0]
    return path.parent


def _fetched(place: StorePath, shard: Shard | None, damaged: str) -> Path:
    """Returns a copy of a data file, compared with its entry in the manifest, if there is one, when it is fetched."""
    if damaged == "keep":
        return local_copy(place)[0]
    if shard is not None and (size := place.stat().size) != shard.bytes:
        raise UserError(f"{place}: {size:,} bytes, its manifest says {shard.bytes:,} (cut or replaced); copy or convert it again")
    path, is_new = local_copy(place)
    if is_new and shard is not None and _digest(path, shard) != shard.sha256:
        forget(path)
        raise UserError(f"{place}: its sha256 is not the manifest's: its bytes have changed; copy or convert it again")
    return path


def _digest(path: Path, shard: Shard) -> str:
    if not shard.chunk_bytes:
        return sha256_of(path)
    starts = range(0, path.stat().st_size, shard.chunk_bytes)
    return chunks_sha256(sha256_of(path, start=at, size=shard.chunk_bytes) for at in starts)
