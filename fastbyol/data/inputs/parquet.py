"""Lists the images in Parquet files, as Hugging Face's image data sets are stored: a column with each image's bytes, perhaps one of labels.

Parquet compresses many rows together, so one image cannot be read alone. The images are therefore copied once to a tar, which is then read as
any other; it takes as much space as the images.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastbyol.config.errors import UserError
from fastbyol.data.formats.regular_files import require_regular
from fastbyol.data.inputs.listing import ImageListing, Stamp, may_be_known, stamp_at
from fastbyol.data.inputs.tars import in_class_order, list_tars
from fastbyol.host.cache_files import cache_file, kept_files
from fastbyol.host.durable_files import durable_file
from fastbyol.host.progress import Progress
from fastbyol.host.store_path import Place, StorePath, at_once, open_unbuffered

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "bytes")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "cls")
_ROWS = 64
"""Rows that are decoded at a time: some megabytes."""
_TAR = "fastbyol-images"
_FORMAT = 3
"""Format of the tar; the first had the classes' names in its .cls members, where those of more than 100 bytes were lost, the second no member
for a row without an image."""
_NO_BYTES = ".no-bytes"
"""Extension of the empty member for a row that holds no image, by which it is counted among what was left out."""
_FACTS, _LARGEST_FACTS = "parquet.json", 1 << 30
"""First member of the tar, and the most bytes of it that are read: the stamps of the Parquet files, the label column, and the names of the
classes, whose places in that list are in the .cls members."""
_MAGIC = {
    b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif", b"RIFF": "webp",
    b"P5": "pgm", b"P6": "ppm", b"\0\0\0\x0cjP": "jp2",
}  # fmt: skip


def list_parquet(paths: Sequence[Place], *, root: Place, label_column: str | None = None, labels: str = "auto") -> ImageListing:
    """Returns the images of the Parquet files, in the order of their rows.

    Args:
        paths: the files, which have the same columns.
        root: what the user gave, for messages.
        label_column: column of labels; None takes the one that Hugging Face marks or names so.
        labels: 'none' ignores labels.

    Raises:
        UserError: pyarrow is missing, a file is damaged, or no column holds images.
    """
    try:
        stamps = list(at_once(stamp_at, paths))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check the file") from error
    facts = {"format": _FORMAT, "stamps": [list(stamp) for stamp in stamps], "label_column": label_column}
    made_of = [*paths, Path(label_column or "")]
    known = all(map(may_be_known, paths, stamps))
    folder = paths[0].parent
    beside = None if isinstance(folder, StorePath) else folder
    tar = next((path for path in kept_files(beside, name=_TAR, of=made_of) if known and _is_made_of(path, facts)), None)
    if tar is None:
        with cache_file(beside, name=_TAR, of=made_of) as tar:
            if tar is None:
                raise UserError(
                    f"{root}: the images in Parquet files are copied to a tar first, and no folder for it can be written; set XDG_CACHE_HOME"
                )
            if not known or not _is_made_of(tar, facts):  # another process may have written it meanwhile
                try:
                    _write_tar(tar, paths, stamps, facts, label_column)
                except OSError as error:
                    raise UserError(f"{tar}: the images cannot be copied there ({error.strerror or error}); free some space") from error
    listing = list_tars([tar], labels="none" if labels == "none" else "auto", splits="classes")
    skipped = tuple(
        (name.removesuffix(_NO_BYTES), "no bytes in its row" if name.endswith(_NO_BYTES) else why)
        for name, why in listing.skipped
        if name != _FACTS
    )
    classes = (_facts_of(tar) or facts)["classes"]
    names = tuple(classes[int(place)] for place in listing.class_names)
    note = f"{root}: the images of {len(paths):,} Parquet files are read from {tar}, to which they were copied once"
    return replace(listing, root=root, class_names=names, skipped=skipped, notes=(note, *listing.notes))


def _is_made_of(tar: Path, facts: dict[str, Any]) -> bool:
    """Returns True if the tar has the images of the Parquet files that the facts describe."""
    found = _facts_of(tar)
    return found is not None and isinstance(found.get("classes"), list) and {name: found.get(name) for name in facts} == facts


def _facts_of(tar: Path) -> dict[str, Any] | None:
    """Returns the first member of the tar, or None if there is no such tar."""
    try:
        require_regular(tar)
        with tarfile.open(tar, "r:") as archive:  # any other mode would unpack a compressed one
            first = archive.next()
            content = archive.extractfile(first) if first and first.name == _FACTS else None
            facts = json.loads(content.read(_LARGEST_FACTS)) if content else None
            return facts if isinstance(facts, dict) else None
    except (OSError, tarfile.TarError, ValueError):
        return None


def _write_tar(tar: Path, paths: Sequence[Place], stamps: Sequence[Stamp], facts: dict[str, Any], label_column: str | None) -> None:
    texts = {label for path in paths for _, label in _rows(path, label_column, with_images=False) if label is not None}
    classes = in_class_order(texts)
    place_of = {text: place for place, text in enumerate(classes)}
    with durable_file(tar) as file, Progress(f"{tar.name}: images", sum(size for size, _ in stamps)) as progress:
        buffered = io.BufferedWriter(file)  # type: ignore[arg-type]  # a plain write of an unbuffered file may stop early
        with tarfile.open(fileobj=buffered, mode="w", format=tarfile.PAX_FORMAT) as archive:
            _add(archive, _FACTS, json.dumps({**facts, "classes": classes}).encode())
            row = 0
            for path, (size, _) in zip(paths, stamps, strict=True):
                for data, label in _rows(path, label_column):
                    _add(archive, f"{row:09d}.{_extension(data)}" if data else f"{row:09d}{_NO_BYTES}", data)
                    if data and label is not None:
                        _add(archive, f"{row:09d}.cls", str(place_of[label]).encode())
                    row += 1
                progress.advance(size)
        buffered.flush()
        buffered.detach()  # durable_file flushes it to the disk and closes it


def _extension(data: bytes) -> str:
    if data[4:12] == b"ftypavif":
        return "avif"
    return next((extension for magic, extension in _MAGIC.items() if data.startswith(magic)), "unknown")


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _rows(path: Place, label_column: str | None, *, with_images: bool = True) -> Iterator[tuple[bytes, str | None]]:
    """Yields the bytes of each image (b'' if it has none, or images are not wanted) and its label as text."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"{path}: pyarrow, which reads Parquet, is not installed; pip install 'fastbyol[parquet]'") from error
    try:
        if not isinstance(path, StorePath):
            require_regular(path)
        with open_unbuffered(path) as content, pq.ParquetFile(content) as file:
            schema = file.schema_arrow
            image, label = _image_column(path, schema, pa), _label_column(path, schema, label_column)
            names = _class_names(schema, label)
            wanted = [*([image] if with_images else []), *([label] if label else [])]
            for batch in file.iter_batches(batch_size=_ROWS, columns=wanted):
                data, values = [b""] * len(batch), [None] * len(batch)
                if with_images:
                    column = batch.column(image)
                    data = (column.field("bytes") if pa.types.is_struct(column.type) else column).to_pylist()
                if label:
                    values = batch.column(label).to_pylist()
                for content, value in zip(data, values, strict=True):
                    yield content or b"", _label_text(value, names)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is not a readable Parquet file ({' '.join(str(error).split())[:200]}); copy it again") from error


def _image_column(path: Place, schema: Any, pa: Any) -> str:
    def holds_images(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" and holds_images(kind.field(i).type) for i in range(kind.num_fields))
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    found = [field.name for field in schema if holds_images(field.type)]
    named = [name for name in found if name.lower() in _IMAGE_COLUMNS]
    if len(named or found) != 1:
        what = "several columns hold" if found else "no column holds"
        raise UserError(
            f"{path}: {what} images as bytes (its columns: {', '.join(schema.names)}); give Parquet files with one column 'image'"
        )
    return (named or found)[0]


def _label_column(path: Place, schema: Any, wanted: str | None) -> str | None:
    if wanted is not None and wanted not in schema.names:
        raise UserError(f"--label-column {wanted}: {path} has no such column; its columns are {', '.join(schema.names)}")
    return wanted or next((name for name in _LABEL_COLUMNS if name in schema.names), None)


def _class_names(schema: Any, label: str | None) -> list[str] | None:
    """Returns the names of the classes that Hugging Face stores beside the columns, or None."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[label]["names"]]
    except (TypeError, KeyError, ValueError):
        return None


def _label_text(value: object, names: list[str] | None) -> str | None:
    """Returns the name of the label's class in one line, or None for an image without a label."""
    name = names[value] if names and isinstance(value, int) and 0 <= value < len(names) else str(value)
    text = re.sub(r"\s*[\r\n]\s*", " ", name.strip())
    return None if value in (None, -1) or text in ("", "-1") else text  # Hugging Face's test splits have -1
