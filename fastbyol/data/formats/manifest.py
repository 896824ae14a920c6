"""The manifest: a JSON file beside converted data that describes its content, how it was made, and its checksums."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError, shortened
from fastbyol.data.formats.regular_files import require_regular
from fastbyol.host.durable_files import write_durably
from fastbyol.host.shared_columns import row_pieces

FORMAT_VERSION = 1
TAR_MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
"""Largest manifest that is read (ImageNet's has 100 kB): parsing a huge JSON file would fill the memory."""
MAX_CLASSES = 1 << 20
"""Larger labels are not accepted as class numbers: each class needs memory for its name and for a row of every classifier."""
_MAX_NUMBER = 1 << 48
_MIN_CHUNK_BYTES = 1 << 20
"""Smallest size of chunks that are hashed one by one: each costs an open and a digest, which must not outweigh reading it."""
_LONGEST_NAME = 255
_READ_BYTES = 1 << 20
_SEAL = "content_sha256"
"""Name of the field that holds the SHA-256 of all other fields."""


@dataclass(frozen=True)
class Shard:
    """One data file in the manifest's folder."""

    name: str
    samples: int
    bytes: int
    sha256: str
    """SHA-256 of the file; or, with `chunk_bytes`, the SHA-256 of the concatenated digests (32 bytes each) of its chunks of that size."""
    chunk_bytes: int = 0
    """Chunk size. A .beton's header is written last, so hashing the whole file would take a second read; its chunks are hashed as it grows."""


@dataclass(frozen=True)
class Manifest:
    """Description of converted data. Class names are in label order."""

    kind: str
    """'beton' or 'tar'."""
    num_samples: int
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    images: dict[str, float]
    """Summary: smallest, mean and largest height and width in pixels, bytes, and number of transcoded images."""
    settings: dict[str, int | float | str]
    source: dict[str, str]
    """The source folder as the user gave it, and the digest of its listing."""
    shards: tuple[Shard, ...]
    software: dict[str, str]
    dropped: tuple[int, ...] = ()
    """Positions in the listing of the dropped images, ascending. Sample i is the i-th of the kept images in listing order, or, if the settings
    have a `shuffle_seed`, in that permutation of the listing."""
    names_sha256: str = ""
    """SHA-256 of the samples' names in sample order, each ended by a zero byte: shows whether another listing gives the same samples."""


def software_versions() -> dict[str, str]:
    """Returns the versions of Python and the packages on which a conversion's result can depend."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in ("fastbyol", "numpy", "pillow")}


def beton_manifest_path(beton: Path) -> Path:
    """Returns the path of a .beton's manifest: beside it, or, for a symbolic link without one beside it, beside the link's target."""
    beside = beton.with_name(beton.name + ".json")
    if beside.exists() or not beton.is_symlink():
        return beside
    file = beton.resolve()
    return file.with_name(file.name + ".json")


def sha256_of(path: Path, *, start: int = 0, size: int | None = None, stop: Event | None = None) -> str:
    """Returns the hexadecimal SHA-256 of `size` bytes from `start` (default: to the end). Setting `stop` ends it early with a meaningless digest."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        left = os.fstat(file.fileno()).st_size - start if size is None else size
        file.seek(start)
        while left > 0 and not (stop and stop.is_set()) and (piece := file.read(min(left, _READ_BYTES))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def chunks_sha256(digests: Iterable[str]) -> str:
    """Returns a shard's sha256 from those of its chunks."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def image_summary(height: NDArray[Any], width: NDArray[Any], size: NDArray[Any]) -> dict[str, float]:
    """Returns the smallest, mean and largest height and width in pixels, and the number of bytes: the manifest's `images`."""
    summary: dict[str, float] = {}
    for name, side in (("height", height.astype(np.int64)), ("width", width.astype(np.int64))):
        summary |= {f"{name}_min": int(side.min()), f"{name}_mean": round(float(side.mean()), 2), f"{name}_max": int(side.max())}
    return summary | {"bytes": int(size.sum())}


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes the manifest as indented ASCII JSON, sealed with the digest of its fields."""
    fields = {"format_version": FORMAT_VERSION} | asdict(manifest)
    write_durably(path, json.dumps(fields | {_SEAL: _seal(fields)}, indent=1) + "\n")


def is_sealed(path: Path) -> bool:
    """Returns True if the manifest has not been edited since it was written. Only `verify` checks this; `read_manifest` does not."""
    fields = _read_json(path)
    return fields.pop(_SEAL, "") == _seal(fields)


def _seal(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Returns the manifest at the path. Raises UserError if it is missing, is not one of ours, or contradicts itself."""
    try:
        fields = _read_json(path)
        version = fields.pop("format_version")
        fields.pop(_SEAL, None)
        fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
        for name in ("class_names", "class_counts", "dropped"):
            fields[name] = tuple(fields.get(name, ()))
        manifest = Manifest(**fields)
        numbers = (manifest.num_samples, *manifest.class_counts, *manifest.dropped)
        texts = (manifest.kind, manifest.names_sha256, *manifest.class_names)
        refuse_impossible_values(numbers=numbers, texts=texts, shards=manifest.shards)
        _refuse_other_types((manifest.images, manifest.settings, manifest.source, manifest.software), dict)
        if not manifest.num_samples or not manifest.shards:
            raise ValueError("no images, or no data files")
        if len(manifest.class_counts) != len(manifest.class_names):
            raise ValueError(f"{len(manifest.class_counts)} class_counts for {len(manifest.class_names)} class_names")
        listed = manifest.num_samples + len(manifest.dropped)
        if any(position >= listed for position in manifest.dropped) or list(manifest.dropped) != sorted(set(manifest.dropped)):
            raise ValueError(f"its dropped images should be ascending positions below {listed:,}")
    except FileNotFoundError:
        raise UserError(f"{path}: missing; convert again with python -m fastbyol convert") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the file") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        raise UserError(f"{path}: not a manifest of this program ({shortened(error)}); convert again") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path}: manifest version {shortened(version)}, this program reads {FORMAT_VERSION}; convert again")
    return manifest


def _read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object at the path. Raises OSError, ValueError, RecursionError or MemoryError if it is not one, or too large."""
    require_regular(path)
    with path.open("rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_MANIFEST_BYTES:
            raise ValueError(f"{size:,} bytes, a manifest has at most {MAX_MANIFEST_BYTES:,}")
        fields = json.loads(file.read(size).decode("utf-8"))  # read(MAX_MANIFEST_BYTES) would take as much memory
    if not isinstance(fields, dict):
        raise ValueError("no JSON object")
    return fields


def refuse_impossible_values(*, numbers: Iterable[int], texts: Iterable[str], shards: Sequence[Shard]) -> None:
    """Raises TypeError or ValueError for values read from JSON of a wrong type or out of range, those of the shards among them."""
    numbers = [*numbers, *(number for shard in shards for number in (shard.samples, shard.bytes, shard.chunk_bytes))]
    texts = [*texts, *(text for shard in shards for text in (shard.name, shard.sha256))]
    _refuse_other_types(texts, str)
    _refuse_other_types(numbers, int)
    for number in numbers:
        if not 0 <= number < _MAX_NUMBER:
            raise ValueError(f"{shortened(number, limit=60)} should be a number from 0 on that a file can have")
    for chunk in (shard.chunk_bytes for shard in shards):
        if 0 < chunk < _MIN_CHUNK_BYTES:
            raise ValueError(f"chunk_bytes is {chunk}; should be 0 or at least {_MIN_CHUNK_BYTES:,}")
    # A name with a folder in it could point to any file of this machine.
    for name in (shard.name for shard in shards):
        if not name or name in (".", "..") or set(name) & {"/", "\\", "\0"} or len(name) > _LONGEST_NAME:
            raise ValueError(f"{shortened(repr(name), limit=60)} should be the name of a file beside it")


def _refuse_other_types(values: Iterable[object], kind: type) -> None:
    for value in values:
        # JSON's true is an int in Python.
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{shortened(repr(value), limit=60)} should be a {kind.__name__}")


def refuse_other_counts(path: Path, labels: NDArray[np.int64], manifest: Manifest) -> None:
    """Raises UserError unless the labels, (N,) int64, have as many of each class as the manifest says. A label of -1 means unlabelled."""
    classes = len(manifest.class_names)
    for extreme in (int(labels.min()), int(labels.max())):
        if not -1 <= extreme < classes:
            outside = int(labels[(labels < -1) | (labels >= classes)][0])
            raise UserError(f"{path}: holds the label {outside}, its manifest names {classes} classes; copy it again, or convert again")
    counts = label_counts(labels, num_classes=classes)
    if counts != list(manifest.class_counts):
        raise UserError(f"{path}: has other numbers of images per class than its manifest says (damaged, or edited); convert again")


def label_counts(labels: NDArray[np.int64], *, num_classes: int) -> list[int]:
    """Returns the number of images of each class; images without a label (-1) are not counted."""
    counts = np.zeros(num_classes + 1, dtype=np.int64)
    for piece in row_pieces(len(labels)):  # because bincount needs a column of its own type
        counts += np.bincount(labels[piece] + 1, minlength=num_classes + 1)[: num_classes + 1]
    return counts[1:].tolist()


def numbered_class_names(path: Path, labels: NDArray[np.int64]) -> tuple[str, ...]:
    """Returns '0', '1', … up to the highest label. A label of -1 means unlabelled. Raises UserError for a label above the limit."""
    highest = int(labels.max())
    if highest >= MAX_CLASSES:
        image = int(labels.argmax())
        raise UserError(
            f"{path}: image {image} has the label {highest}; labels are class numbers from 0 up to {MAX_CLASSES - 1:,}, or -1 for none. "
            "Write the file with such labels"
        )
    return tuple(map(str, range(highest + 1)))
