"""One view of converted data for both formats: location, size and label of each image."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.config.urls import is_url
from fastbyol.data.backends.source import Indices, Pixels
from fastbyol.data.formats.beton import RAW_MODE, read_beton
from fastbyol.data.formats.fetched import fetched_data, is_converted_url
from fastbyol.data.formats.manifest import TAR_MANIFEST, Manifest, beton_manifest_path, read_manifest, refuse_other_counts
from fastbyol.data.formats.pillow_decoding import decode_with_pillow
from fastbyol.data.formats.tar_shards import SAMPLE_TABLE, is_shard_folder, read_sample_table
from fastbyol.data.inputs.listing import ImageLocation
from fastbyol.data.inputs.sources import is_original
from fastbyol.data.traversal import seeded_permutation
from fastbyol.host.store_path import StorePath


@dataclass(frozen=True)
class Converted:
    """The images of a .beton or a folder of tar shards. Every array has one row per image."""

    path: Path
    files: tuple[Path, ...]
    file: Indices
    """Position in `files` of the file that contains the image."""
    offset: Indices
    size: Indices
    height: Indices
    width: Indices
    label: Indices
    raw: NDArray[np.bool_]
    """True for an image stored as pixels instead of JPEG."""
    crc32: NDArray[np.uint32] | None
    """CRC-32 of each image's bytes; None if the data was not converted by us."""
    listed: Indices
    """Position of each image in the converted listing; if that is unknown, its own index."""

    def read(self, index: int) -> bytes:
        """Returns the image's bytes. Raises OSError if they cannot be read completely."""
        file = self.files[self.file[index]]
        return ImageLocation(file.name, file, int(self.offset[index]), int(self.size[index])).read()

    def pixels(self, index: int) -> Pixels:
        """Returns the image as (H, W, 3) RGB. Raises UndecodableImage, or OSError if its bytes cannot be read."""
        data = self.read(index)
        if not self.raw[index]:
            return decode_with_pillow(data)
        return np.frombuffer(data, dtype=np.uint8).reshape(int(self.height[index]), int(self.width[index]), 3)


def listed_positions(manifest: Manifest) -> Indices:
    """Returns the position of each sample in the converted listing. Raises UserError if the manifest contradicts itself."""
    seed = manifest.settings.get("shuffle_seed")
    try:
        total = manifest.num_samples + len(manifest.dropped)
        order = np.arange(total) if seed is None else seeded_permutation(total, int(seed))
        positions = order[~np.isin(order, np.array(manifest.dropped, dtype=np.int64))]
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"its dropped images or its shuffle_seed make no sense ({error})") from error
    if len(positions) != manifest.num_samples:
        raise UserError("its dropped images are not positions in its listing")
    return positions


def is_converted(path: Path) -> bool:
    """Returns True if the path looks like converted data: a .beton, or a folder of our tar shards."""
    return path.suffix == ".beton" if path.is_file() else is_shard_folder(path)


def converted_at(data: str) -> Path | None:
    """Returns the path of converted data, fetched first if `data` is a URL; None for other data, and where there is nothing."""
    if is_url(data):
        return fetched_data(StorePath.of(data)) if not is_original(data) and is_converted_url(StorePath.of(data)) else None
    path = Path(data)
    return path if path.exists() and is_converted(path) else None


def manifest_path(path: Path) -> Path:
    """Returns the path of the manifest of a converted file or folder."""
    return path / TAR_MANIFEST if path.is_dir() else beton_manifest_path(path)


def open_converted(path: Path) -> tuple[Converted, Manifest | None]:
    """Returns the images, and the manifest if there is one. Raises UserError if the data is damaged or not that of a conversion."""
    manifest = read_manifest(manifest_path(path)) if manifest_path(path).exists() else None
    if path.is_file():
        images = converted_beton(path, manifest)
        if manifest is not None:  # a sample table is compared where it is read
            refuse_other_counts(path, images.label, manifest)
        return images, manifest
    if manifest is None:
        raise UserError(
            f"{manifest_path(path)}: missing; copy the whole folder again, or convert again with python -m fastbyol convert --to dali"
        )
    return converted_shards(path, manifest), manifest


def converted_beton(path: Path, manifest: Manifest | None) -> Converted:
    """Returns the images of a .beton, written by us or by stock FFCV. Raises UserError in the same cases as `read_beton`."""
    table = read_beton(path)
    file = np.zeros(len(table.label), dtype=np.int64)
    raw = table.mode == RAW_MODE
    offset, size, height, width = (column.astype(np.int64) for column in (table.offset, table.size, table.height, table.width))
    return Converted(path, (path,), file, offset, size, height, width, table.label, raw, table.crc32, _listed(manifest, len(file)))


def converted_shards(folder: Path, manifest: Manifest) -> Converted:
    """Returns the images of a folder of tar shards. Raises UserError if the sample table is missing or belongs to other shards."""
    table = read_sample_table(folder / SAMPLE_TABLE, manifest)
    columns = (table[name].astype(np.int64) for name in ("shard", "offset", "size", "height", "width", "label"))
    files = tuple(folder / shard.name for shard in manifest.shards)
    raw, listed = np.zeros(manifest.num_samples, dtype=np.bool_), _listed(manifest, manifest.num_samples)
    return Converted(folder, files, *columns, raw=raw, crc32=table["crc32"], listed=listed)


def _listed(manifest: Manifest | None, num_images: int) -> Indices:
    """Returns the positions from the manifest, or the images' own indices if it is missing or invalid (`listed_positions` reports why)."""
    if manifest is not None and manifest.num_samples == num_images:
        with suppress(UserError):
            return listed_positions(manifest)
    return np.arange(num_images)
