"""Conversion to tar shards by several machines: each writes a part of the same random order, then a merge completes the data set.

The samples (bytes, labels and numbers) and their order over all shards are the same as from one machine. Only the shards' boundaries and names
differ, because each part begins with a new shard.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, ZipFile

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.arguments import through_links
from fastbyol.config.errors import UserError, shortened
from fastbyol.data.conversion.image_pass import ROW, TOUCHED, convert_images, kept_rows
from fastbyol.data.conversion.report import make_manifest, write_report
from fastbyol.data.conversion.tar_writer import SHARDS_FOLDER, TarOutput, sample_table, tar_settings
from fastbyol.data.conversion.task import ConversionOptions, Images, Task, as_listing, make_task, open_work
from fastbyol.data.conversion.touched_images import TouchedImages
from fastbyol.data.conversion.work_folder import disk_errors, locked_work, work_path
from fastbyol.data.formats.manifest import TAR_MANIFEST, Manifest, Shard, read_manifest, refuse_impossible_values, write_manifest
from fastbyol.data.formats.regular_files import require_regular
from fastbyol.data.formats.tar_shards import PART_FILES, PARTS, SAMPLE_TABLE, TAR_REPORT, index_path
from fastbyol.data.inputs.listing import ImageListing, stamp_at
from fastbyol.data.traversal import seeded_permutation
from fastbyol.host.durable_files import durable_file, flush_to_disk, write_durably
from fastbyol.host.signals import deferred_stop
from fastbyol.host.store_path import Place, at_once
from fastbyol.host.stores import Absent
from fastbyol.ranks.parts import Part

_PART_NAME = re.compile(r"part-\d{5,9}-of-\d{5,9}\.json")


def part_name(part: Part) -> str:
    """Returns the part's name in the names of its files."""
    return f"{part.number:05d}-of-{part.count:05d}"


def _share(part: Part, order: NDArray[np.int64]) -> NDArray[np.int64]:
    mine = order[part.rows(len(order))]
    if not len(mine):
        raise UserError(f"part {part.number} of {part.count}: {len(order)} images are too few for so many parts; take fewer")
    return mine


def write_tar_part(
    data: Images,
    *,
    out: Path,
    part: Part,
    workers: int = 0,
    shard_mib: int = 256,
    seed: int = 0,
    options: ConversionOptions | None = None,
) -> list[Shard]:
    """Adds one part's shards to the folder `out`, which all parts share, and returns them. Does nothing if they are there already.

    All other arguments, and the errors, are those of `tar_writer.write_tar_shards`. Raises UserError also if the part is there, made with other
    settings or from other images.
    """
    options, out = options or ConversionOptions(), through_links(out)
    settings = tar_settings(options, shard_mib=shard_mib, seed=seed)
    with deferred_stop() as stop, disk_errors(out):
        if (out / TAR_MANIFEST).exists():
            raise UserError(f"{out}: holds a complete data set already; give another --out, or remove it first")
        if not out.parent.is_dir():
            raise UserError(f"{out.parent}: no such folder to write {out.name} in; make it first")
        out.mkdir(exist_ok=True)
        name = out / f"part-{part_name(part)}"
        description, folder = name.with_suffix(".json"), work_path(name)
        is_complete = description.exists() or (folder / description.name).exists()
        if not is_complete or options.unfinished == "restart":
            task = make_task(data, order=lambda n: _share(part, seeded_permutation(n, seed)), out=name, options=options, workers=workers)
            with open_work(task, kind="tar part", settings={**settings, "part": part_name(part)}) as work:
                output = TarOutput(work, shard_mib=shard_mib, part=part_name(part))
                rows, listing = convert_images(task, output, work, stop=stop), task.listing
                indices = rows["index"].tolist()
                names = listing.names.take(np.array(indices, dtype=np.int64)).block[:-1]
                labels = np.array([listing.labels[index] for index in indices], dtype=np.int64)
                np.savez(_table_path(folder / description.name), rows=rows, labels=labels, names=names)
                done = _Done(
                    settings=settings,
                    source=str(listing.root),
                    listing_sha256=task.listing_sha256,
                    num_images=len(listing.files),
                    class_names=list(listing.class_names),
                    skipped=list(listing.skipped),
                    shards=output.finish(rows),
                )
                write_durably(folder / description.name, json.dumps(asdict(done)))
                # Before the lock is released: a process that replaces one given up by Ray may be waiting for it.
                _put_part_in_place(folder, description)
                work.discard()
        else:
            listing = as_listing(data)
            with locked_work(folder, output=name, patience_s=options.patience_s):
                unmoved = folder / description.name
                done = _read_part(unmoved if unmoved.exists() else description)
                _require_made_of(description, done, settings=settings, listing=listing)
                _put_part_in_place(folder, description)
        return _read_part(description).shards


def _require_made_of(description: Path, done: _Done, *, settings: dict[str, Any], listing: ImageListing) -> None:
    """Raises UserError if a complete part was made with other settings or from other images."""
    way_out = "repeat its settings, give another --out, or convert this part again with --restart"
    if name := _first_change(done.settings, settings):
        raise UserError(f"{description}: is complete, made with {name} = {done.settings.get(name)} and not {settings.get(name)}; {way_out}")
    if (done.listing_sha256, done.class_names) != (listing.digest(), list(listing.class_names)):
        raise UserError(f"{description}: is complete, made from other images ({done.source}) than {listing.root} holds; {way_out}")


def _put_part_in_place(folder: Path, description: Path) -> None:
    """Moves a part's files from its work folder to their final place, or goes on with an interrupted move.

    Shards of an earlier conversion of the part that are not among the new ones are removed.
    """
    out, new = description.parent, folder / description.name
    if not new.exists():  # it is moved last
        return
    # Remove an earlier description first: from here on it would not match the shards.
    description.unlink(missing_ok=True)
    flush_to_disk(out)
    tars = {shard.name for shard in _read_part(new).shards}
    for old in out.glob(f"shard-{description.stem.removeprefix('part-')}-*"):
        if old.with_suffix(".tar").name not in tars:
            old.unlink()
    moves = {file: out / file.name for file in sorted((folder / SHARDS_FOLDER).glob("*"))}
    moves |= {_table_path(new): _table_path(description), folder / TOUCHED: _touched_path(description)}
    # The description comes last: it tells the merge that all the rest is there.
    for file, place in (*moves.items(), (new, description)):
        if file.exists():
            flush_to_disk(file)
            os.replace(file, place)
    flush_to_disk(out)


def merge_tar_parts(
    out: Path, *, data: Images | None = None, options: ConversionOptions | None = None, place: Callable[[Path], Place] = lambda path: path
) -> Manifest:
    """Completes the folder `out` once all of its parts are there: writes the sample table, the manifest and the report.

    Args:
        out: the folder of all parts.
        data: the images from which the parts must have been made; None skips this check.
        options: only `max_dropped` is used.
        place: gives where a shard in `out` really is, if that is at a URL.

    Raises:
        UserError: parts or shards are missing, damaged, differ in their settings, or were made from other images than `data`; or too many images were
            dropped.
    """
    with deferred_stop(), disk_errors(out):
        if (out / TAR_MANIFEST).exists():  # its merge may have been killed before it removed the descriptions of the parts
            if not _remove_parts(out):
                raise UserError(f"{out}: is merged already")
            return read_manifest(out / TAR_MANIFEST)
        parts = _all_parts(out)
        done = [_read_part(part) for part in parts]
        _require_equal(parts, done)
        _require_shards(parts, done, place=place)
        if data is not None and (listing := as_listing(data)).digest() != done[0].listing_sha256:
            raise UserError(
                f"{out}: its parts were made from other images than {listing.root} holds; give what they were made from, or nothing"
            )
        tables = [_read_table(part, one) for part, one in zip(parts, done, strict=True)]
        first = 0
        for table, one in zip(tables, done, strict=True):
            table.rows["shard"] += np.uint32(first)  # shard numbers continue from part to part
            first += len(one.shards)
        rows = np.concatenate([table.rows for table in tables])
        order, num_images = np.argsort(rows["index"]), done[0].num_images
        rows = rows[order]
        if not np.array_equal(rows["index"], np.arange(num_images)):
            raise UserError(f"{out}: the parts hold {len(rows):,} images and should hold each of {num_images:,} once; convert them again")
        names = [name for table in tables for name in table.names]
        labels = tuple(np.concatenate([table.labels for table in tables])[order].tolist())
        files, skipped = tuple(names[place] for place in order.tolist()), tuple((name, why) for name, why in done[0].skipped)
        listing = ImageListing(Path(done[0].source), tuple(done[0].class_names), files, labels, skipped)
        # The task of the whole conversion, with the fields that report and manifest need.
        sizes, options = rows["source_bytes"].astype(np.int64), options or ConversionOptions()
        task = Task(listing, np.arange(num_images), sizes, done[0].listing_sha256, out, options, workers=1)
        touched = {_touched_path(part): f"remove {part} and convert that part again" for part in parts}
        write_report(out / TAR_REPORT, task, rows, TouchedImages(touched, images=num_images))
        with durable_file(out / SAMPLE_TABLE) as table:
            np.save(table, sample_table(task, rows))
        shards = [shard for one in done for shard in one.shards]
        manifest = make_manifest("tar", task, rows, shards, {**done[0].settings, "parts": len(parts)})
        write_manifest(out / TAR_MANIFEST, manifest)
        _remove_parts(out)
    return manifest


def _remove_parts(out: Path) -> int:
    """Removes the files that describe the parts; returns their number."""
    files = [file for pattern in PART_FILES for file in out.glob(pattern)]
    for file in files:
        file.unlink()
    return len(files)


@dataclass(frozen=True)
class _Done:
    """Description of a complete part."""

    settings: dict[str, Any]
    source: str
    """The folder or tar of images, as the user gave it."""
    listing_sha256: str
    """Digest of the listing of all parts' images."""
    num_images: int
    """Number of images of all parts together."""
    class_names: list[str]
    skipped: list[tuple[str, str]]
    shards: list[Shard]


class _Table(NamedTuple):
    """Rows, labels and names of a complete part's images, in the order of conversion."""

    rows: NDArray[np.void]
    labels: NDArray[np.int64]
    names: list[str]


def _all_parts(out: Path) -> list[Path]:
    """Returns the paths of all parts' descriptions, in order. Raises UserError if some are missing."""
    found = sorted(path for path in out.glob(PARTS) if _PART_NAME.fullmatch(path.name))
    counts = {int(path.stem.rpartition("-")[2]) for path in found}
    if len(counts) != 1:
        held = " and ".join(f"parts of {count} machines" for count in sorted(counts)) or "no parts"
        raise UserError(f"{out}: holds {held}; convert with --shard i/n for every i of one n, then merge")
    (count,) = counts
    expected = [out / f"part-{part_name(Part(number, count))}.json" for number in range(count)]
    if missing := [number for number, path in enumerate(expected) if path not in found]:
        raise UserError(
            f"{out}: {len(missing)} of {count} parts are missing, the first --shard {missing[0]}/{count}; convert them, then merge"
        )
    if extra := sorted(path.name for path in set(found) - set(expected)):
        raise UserError(f"{out / extra[0]}: there is no such part of {count}; remove it, then merge")
    return expected


def _read_part(path: Path) -> _Done:
    try:
        require_regular(path)
        fields = json.loads(path.read_text(encoding="ascii"))
        done = _Done(**{**fields, "shards": [Shard(**shard) for shard in fields["shards"]]})
        texts = (done.source, done.listing_sha256, *done.class_names, *(text for pair in done.skipped for text in pair))
        refuse_impossible_values(numbers=(done.num_images,), texts=texts, shards=done.shards)
        if any(len(pair) != 2 for pair in done.skipped):
            raise ValueError("a left-out file without a reason")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not the description of a part ({shortened(error)}); remove it and convert that part again") from error
    return done


def _read_table(description: Path, done: _Done) -> _Table:
    path, again = _table_path(description), f"remove {description} and convert that part again"
    try:
        require_regular(path)
        with ZipFile(path) as archive:  # refuse compressed entries, which we never write: a small file could unpack to fill the memory
            if any(entry.compress_type != ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed")
        # allow_pickle stays off: unpickling a file from elsewhere would run its code.
        with np.load(path) as arrays:
            rows, labels, names = (arrays[name] for name in _Table._fields)
            table = _Table(rows, labels, names.tobytes().decode(errors="surrogateescape").split("\0"))
        if not (rows.dtype == ROW and len(rows) == len(labels) == len(table.names)):
            raise ValueError("its columns do not fit together")
    except Exception as error:  # a damaged zip file or array header raises anything
        raise UserError(f"{path}: not the table of a part ({error}); {again}") from error
    kept = kept_rows(rows)
    ends = np.array([shard.bytes for shard in done.shards] or [0], dtype=np.uint64)
    fits = not len(kept) or (
        int(kept["shard"].max()) < len(done.shards)
        # Each offset alone first: the sum below could wrap around 2^64.
        and bool((kept["offset"] <= ends[kept["shard"]]).all())
        and bool((kept["offset"] + kept["size"] <= ends[kept["shard"]]).all())
    )
    labels_fit = not len(labels) or -1 <= labels.min() <= labels.max() < max(len(done.class_names), 1)
    if not (fits and labels_fit):
        raise UserError(f"{path}: points beyond its shards or classes (damaged); {again}")
    return table


def _table_path(description: Path) -> Path:
    return description.with_suffix(".npz")


def _touched_path(description: Path) -> Path:
    return description.with_suffix(".jsonl")


def _first_change(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Returns the name of the first setting of which the two have different values, or ''."""
    return next((name for name in {**before, **now} if before.get(name) != now.get(name)), "")


def _require_shards(parts: list[Path], done: list[_Done], *, place: Callable[[Path], Place]) -> None:
    """Raises UserError if a shard or its index is missing, or a shard has another size than its part's description says.

    Checked before the merge, after which no single part can be converted again.
    """
    shards = [(part, part.with_name(shard.name), shard.bytes) for part, one in zip(parts, done, strict=True) for shard in one.shards]
    sizes = at_once(_size_of, [place(tar) for _, tar, _ in shards])
    index_sizes = at_once(_size_of, [place(index_path(tar)) for _, tar, _ in shards])
    for (part, tar, expected), size, index_size in zip(shards, sizes, index_sizes, strict=True):
        again = f"remove {place(part)} and convert that part again"
        if size < 0 or index_size < 0:
            raise UserError(f"{place(tar if size < 0 else index_path(tar))}: missing; {again}")
        if size != expected:
            raise UserError(f"{place(tar)}: {size:,} bytes, {part.name} says {expected:,} (cut or replaced); {again}")


def _size_of(place: Place) -> int:
    """Returns the size of a file in bytes, or -1 if it is not there."""
    try:
        return stamp_at(place)[0]
    except (FileNotFoundError, Absent):
        return -1


def _require_equal(parts: list[Path], done: list[_Done]) -> None:
    first = done[0]
    for path, one in zip(parts, done, strict=True):
        if name := _first_change(first.settings, one.settings):
            values = f"{one.settings.get(name)} and not {first.settings.get(name)}"
            raise UserError(f"{path}: made with {name} = {values} as the first part was; remove it and convert that part again")
        if (one.listing_sha256, one.class_names) != (first.listing_sha256, first.class_names):
            raise UserError(
                f"{path}: made from other images ({one.source}) than the first part ({first.source}); remove one of them and convert it again"
            )
