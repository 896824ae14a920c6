"""What a conversion made, seen alike for both formats: where each image lies and what its tables say about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.data.beton import RAW_MODE, read_beton
from fastbyol.data.inputs.listing import ImageLocation
from fastbyol.data.manifest import TAR_MANIFEST, Manifest, beton_manifest_path, read_manifest
from fastbyol.data.pillow_decoding import decode_with_pillow
from fastbyol.data.source import Indices, Pixels
from fastbyol.data.tar_shards import SAMPLE_TABLE, read_sample_table
from fastbyol.data.traversal import seeded_permutation


@dataclass(frozen=True)
class Converted:
    """The images of a .beton or a folder of tar shards. Every array has one row per image."""

    path: Path
    files: tuple[Path, ...]
    file: Indices
    """Which of the files holds the image."""
    offset: Indices
    size: Indices
    height: Indices
    width: Indices
    label: Indices
    raw: NDArray[np.bool_]
    """Pixels instead of a JPEG."""
    crc32: NDArray[np.uint32] | None
    """Of each image's bytes; None where no conversion of ours left any."""
    listed: Indices
    """Position of each image in the listing that was converted; its own number where that is unknown."""

    def read(self, index: int) -> bytes:
        """The image's bytes. Raises OSError if they cannot be read or are not all there."""
        file = self.files[self.file[index]]
        return ImageLocation(file.name, file, int(self.offset[index]), int(self.size[index])).read()

    def pixels(self, index: int) -> Pixels:
        """(H, W, 3) RGB. Raises UndecodableImage, or OSError where they cannot be read."""
        data = self.read(index)
        if not self.raw[index]:
            return decode_with_pillow(data)
        return np.frombuffer(data, dtype=np.uint8).reshape(int(self.height[index]), int(self.width[index]), 3)


def listed_positions(manifest: Manifest) -> Indices:
    """Of each sample, the position in the listing of what was converted. UserError if the manifest contradicts itself."""
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
    """Whether this is the name of what a conversion makes: a .beton, or a folder with a manifest or with tars."""
    return path.suffix == ".beton" if path.is_file() else (path / TAR_MANIFEST).is_file() or any(path.glob("*.tar"))


def manifest_path(path: Path) -> Path:
    """Where the manifest of a converted file or folder lies."""
    return path / TAR_MANIFEST if path.is_dir() else beton_manifest_path(path)


def open_converted(path: Path) -> tuple[Converted, Manifest | None]:
    """The images, and the manifest if there is one. UserError for what is damaged, foreign, or no conversion's."""
    manifest = read_manifest(manifest_path(path)) if manifest_path(path).exists() else None
    if path.is_file():
        return converted_beton(path, manifest), manifest
    if manifest is None:
        raise UserError(f"{manifest_path(path)}: missing; copy the whole folder again, or convert again with data_prep/to_dali.py")
    return converted_shards(path, manifest), manifest


def converted_beton(path: Path, manifest: Manifest | None) -> Converted:
    """The images of a .beton, ours or one that stock FFCV wrote. UserError as `read_beton`."""
    table = read_beton(path)
    file = np.zeros(len(table.label), dtype=np.int64)
    raw = table.mode == RAW_MODE
    places = (table.offset, table.size, table.height, table.width)
    return Converted(path, (path,), file, *places, table.label, raw, table.crc32, _listed(manifest, len(file)))


def converted_shards(folder: Path, manifest: Manifest) -> Converted:
    """The images of a folder of tar shards. UserError for a sample table that is missing or not of these shards."""
    table = read_sample_table(folder / SAMPLE_TABLE, manifest)
    file, offset, size, height, width, label = (
        table[name].astype(np.int64) for name in ("shard", "offset", "size", "height", "width", "label")
    )
    files = tuple(folder / shard.name for shard in manifest.shards)
    raw, listed = np.zeros(len(table), dtype=np.bool_), _listed(manifest, len(table))
    return Converted(folder, files, file, offset, size, height, width, label, raw, table["crc32"], listed)


def _listed(manifest: Manifest | None, num_images: int) -> Indices:
    """Returns the manifest's positions, or the images' own numbers where it is of no use (which `listed_positions` tells)."""
    if manifest is None or manifest.num_samples != num_images:
        return np.arange(num_images)
    try:
        return listed_positions(manifest)
    except UserError:
        return np.arange(num_images)
