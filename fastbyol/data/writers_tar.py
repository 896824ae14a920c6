"""Writes an ImageFolder as WebDataset tar shards with DALI indices, in one seeded shuffle, with each JPEG's own bytes in it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import require, require_at_least
from fastbyol.data.conversion import ImageSummary, appears_whole, encoded_samples, finished_shard, flush_to_disk, make_manifest
from fastbyol.data.encode import TRANSCODE_QUALITY, EncodedImage
from fastbyol.data.image_folder import ImageFolder, list_image_folder
from fastbyol.data.manifest import TAR_MANIFEST, Manifest, Shard, write_manifest
from fastbyol.data.tar_shards import INDEX_VERSION, SAMPLE, SAMPLE_TABLE, index_path, shard_name
from fastbyol.data.traversal import seeded_permutation

MIB = 1 << 20


def write_tar_shards(
    data: Path, *, out: Path, workers: int = 0, shard_mib: int = 256, seed: int = 0, overwrite: str = "refuse"
) -> Manifest:
    """Converts the ImageFolder `data` to a folder `out` of tar shards, their indices, a sample table and a manifest.

    Components of sample i of the listing: i.jpg, i.cls (int64, little-endian), i.idx (the number i, likewise).

    Args:
        data: folder with one sub-folder of images per class.
        out: the folder to make.
        workers: processes that read and check images; 0: one per core.
        shard_mib: a shard ends when it has reached this size.
        seed: of the order of samples in the shards. DALI's own reader shuffles only within a buffer, so the shards are shuffled as a whole.
        overwrite: 'refuse' an existing `out`, or 'replace' it if it was made by this function.

    Raises:
        UserError: no such folder, an image that does not decode, an existing output, a worker that died.
    """
    require_at_least("shard-mb", shard_mib, 1)
    require(0 <= seed < 2**63, "seed", seed, "an integer in [0, 2^63)")
    listing = list_image_folder(data)
    summary = ImageSummary()
    with appears_whole(out, overwrite=overwrite == "replace", marker=TAR_MANIFEST) as temporary:
        temporary.mkdir()
        order = seeded_permutation(len(listing.files), seed).tolist()
        shards = _ShardWriter(temporary, listing, shard_bytes=shard_mib * MIB)
        for index, image in encoded_samples(listing, order, workers=workers, what=out.name):
            shards.add(index, image)
            summary.add(image)
        finished = shards.finish()
        settings: dict[str, int | str] = {"seed": seed, "shard_mib": shard_mib, "transcode_quality": TRANSCODE_QUALITY}
        manifest = make_manifest("tar", listing, summary, finished, settings)
        write_manifest(temporary / TAR_MANIFEST, manifest)
        for file in temporary.iterdir():
            flush_to_disk(file)
        flush_to_disk(temporary)
    return manifest


class _ShardWriter:
    """Fills one tar after another and remembers where everything lies."""

    def __init__(self, folder: Path, listing: ImageFolder, *, shard_bytes: int) -> None:
        self._folder, self._listing, self._shard_bytes = folder, listing, shard_bytes
        self._table: NDArray[np.void] = np.zeros(len(listing.files), dtype=SAMPLE)
        self._shards: list[Shard] = []
        self._rows: list[str] = []
        self._tar: tarfile.TarFile | None = None

    def add(self, index: int, image: EncodedImage) -> None:
        tar = self._tar or self._open()
        label = self._listing.labels[index]
        components = {"jpg": image.jpeg, "cls": np.int64(label).astype("<i8").tobytes(), "idx": np.int64(index).astype("<i8").tobytes()}
        row = []
        for extension, data in components.items():
            member = tarfile.TarInfo(f"{index:08d}.{extension}")
            member.size, member.mode = len(data), 0o644
            offset = tar.offset + tarfile.BLOCKSIZE  # a USTAR header with a short name is one block
            tar.addfile(member, io.BytesIO(data))
            # DALI refuses a row without the file name, whatever its documentation says.
            row.append(f"{extension} {offset} {len(data)} {member.name}")
            if extension == "jpg":
                self._table[index] = (len(self._shards), offset, len(data), image.crc32, label, image.height, image.width)
        self._rows.append(" ".join(row))
        if tar.offset >= self._shard_bytes:
            self._close()

    def finish(self) -> list[Shard]:
        if self._tar:
            self._close()
        np.save(self._folder / SAMPLE_TABLE, self._table)
        return self._shards

    def _open(self) -> tarfile.TarFile:
        self._tar = tarfile.open(self._folder / shard_name(len(self._shards)), "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        return self._tar

    def _close(self) -> None:
        assert self._tar is not None
        self._tar.close()
        self._tar = None
        path = self._folder / shard_name(len(self._shards))
        index_path(path).write_text("\n".join([f"{INDEX_VERSION} {len(self._rows)}", *self._rows, ""]), encoding="ascii")
        self._shards.append(finished_shard(path, name=path.name, samples=len(self._rows)))
        self._rows = []
