"""Tar shards made by several machines: each writes a part of the one seeded shuffle, and a merge makes a data set of the parts.

Equal to what one machine writes: the samples (their bytes, labels and numbers), and their order over the shards one after another.
Different: where shards end and what they are called, since each part begins a shard of its own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.data.conversion.image_pass import (
    ConversionOptions,
    Images,
    Task,
    as_listing,
    convert_images,
    make_manifest,
    make_task,
    open_work,
    require_few_dropped,
    touched_images,
)
from fastbyol.data.conversion.output import disk_errors
from fastbyol.data.conversion.report import make_report, report_text
from fastbyol.data.conversion.stop_signals import stop_signals
from fastbyol.data.conversion.tar_writer import SHARDS_FOLDER, TarOutput, sample_table, shuffled, tar_settings
from fastbyol.data.conversion.work_folder import flush_to_disk, write_durably
from fastbyol.data.manifest import TAR_MANIFEST, Manifest, Shard, manifest_text
from fastbyol.data.tar_shards import SAMPLE_TABLE, TAR_REPORT

_PARTS = "part-*-of-*.json"


@dataclass(frozen=True)
class Part:
    """One of `count` equal shares of the shuffle, numbered from 0."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise UserError(f"shard = {self.number}/{self.count}: must be one of 0/{self.count} to {self.count - 1}/{self.count}")

    @property
    def name(self) -> str:
        return f"{self.number:05d}-of-{self.count:05d}"

    def share(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        return order[self.number * len(order) // self.count : (self.number + 1) * len(order) // self.count]


def parse_part(text: str, environment: Mapping[str, str] = os.environ) -> Part:
    """'i/n', or 'auto': from the environment that torchrun (RANK, WORLD_SIZE) or SLURM (SLURM_PROCID, SLURM_NTASKS) gives each process."""
    if text == "auto":
        for number, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            if number in environment and count in environment:
                return Part(int(environment[number]), int(environment[count]))
        raise UserError("shard = 'auto': neither torchrun's RANK and WORLD_SIZE nor SLURM's variables are set; give it as i/n")
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal()):
        raise UserError(f"shard = {text!r}: must be i/n, such as 0/4 for the first of four machines, or auto")
    return Part(int(number), int(count))


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
    """Adds one part's shards to the folder `out`, which all parts share; nothing to do if they are there already.

    Arguments, beside `part`, and errors: those of `tar_writer.write_tar_shards`.
    """
    options = options or ConversionOptions()
    settings = tar_settings(options, shard_mib=shard_mib, seed=seed)
    with stop_signals() as stop, disk_errors(out):
        _make_folder(out)
        files = _PartFiles(out, part.name)
        if not (files.is_complete and not options.restart):
            listing = as_listing(data)
            order = part.share(shuffled(listing, seed=seed))
            if not len(order):
                raise UserError(f"shard = {part.number}/{part.count}: {len(listing.files)} images are too few for {part.count} machines")
            task = make_task(listing, order=order, out=out / f"part-{part.name}", options=options, workers=workers)
            with (
                open_work(files.work, task, kind="tar part", settings={**settings, "part": part.name}) as work,
                TarOutput(work, shard_mib=shard_mib, part=part.name) as output,
            ):
                rows = convert_images(task, output, work, stop=stop)
                done = _Done(settings, task.listing_sha256, output.finish(rows), touched_images(work))
                np.save(files.work / files.rows.name, rows)
                write_durably(files.work / files.description.name, json.dumps(asdict(done)))
        files.publish()
        return _read_part(files.description).shards


def merge_tar_parts(data: Images, *, out: Path, options: ConversionOptions | None = None) -> Manifest:
    """Completes the folder `out` when all of its parts are there: one sample table, one manifest, one report.

    Raises:
        UserError: parts are missing, differ in their settings, or were made from other images than `data`; too many images were dropped.
    """
    with stop_signals(), disk_errors(out):
        parts = _all_parts(out)
        listing = as_listing(data)
        done = [_read_part(part) for part in parts]
        task = make_task(listing, order=np.arange(len(listing.files)), out=out, options=options or ConversionOptions(), workers=1)
        _require_equal(parts, done, task)
        rows = np.sort(_renumbered([np.load(part.with_suffix(".npy")) for part in parts], done), order="index")
        report = make_report(listing, rows, [entry for one in done for entry in one.touched])
        write_durably(out / TAR_REPORT, report_text(report))
        require_few_dropped(task, rows, report=out / TAR_REPORT)
        table = out / f".{SAMPLE_TABLE}"
        np.save(table, sample_table(task, rows))
        os.replace(table, out / SAMPLE_TABLE)
        shards = [shard for one in done for shard in one.shards]
        manifest = make_manifest("tar", task, rows, shards, {**done[0].settings, "parts": len(parts)})
        write_durably(out / TAR_MANIFEST, manifest_text(manifest))
        for part in parts:
            part.with_suffix(".npy").unlink()
            part.unlink()
    return manifest


@dataclass(frozen=True)
class _Done:
    """What a complete part says about itself."""

    settings: dict[str, Any]
    listing_sha256: str
    shards: list[Shard]
    touched: list[dict[str, Any]]


class _PartFiles:
    """Where a part's files are: first in its work folder, then, one by one, in the folder of all parts, the description last."""

    def __init__(self, out: Path, name: str) -> None:
        self._out = out
        self.work = out / f".part-{name}.partial"
        self.description = out / f"part-{name}.json"
        self.rows = out / f"part-{name}.npy"

    @property
    def is_complete(self) -> bool:
        return self.description.exists() or (self.work / self.description.name).exists()

    def publish(self) -> None:
        """Also takes up where an interrupted one stopped."""
        shards = sorted((self.work / SHARDS_FOLDER).glob("*"))
        for file in (*shards, self.work / self.rows.name, self.work / self.description.name):
            if file.exists():
                flush_to_disk(file)
                os.replace(file, self._out / file.name)
        flush_to_disk(self._out)
        shutil.rmtree(self.work, ignore_errors=True)


def _make_folder(out: Path) -> None:
    if (out / TAR_MANIFEST).exists():
        raise UserError(f"{out}: holds a complete data set already; give another --out, or remove it first")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder to write {out.name} in; make it first")
    out.mkdir(exist_ok=True)


def _all_parts(out: Path) -> list[Path]:
    """The descriptions, in order. UserError if they are not all there."""
    found = sorted(out.glob(_PARTS))
    if (out / TAR_MANIFEST).exists() and not found:
        raise UserError(f"{out}: is merged already")
    counts = {int(path.stem.rpartition("-")[2]) for path in found}
    if len(counts) != 1:
        raise UserError(
            f"{out}: holds parts of {sorted(counts) or 'no'} machines; convert with --shard i/n for every i of one n, then merge"
        )
    (count,) = counts
    missing = [f"{number}/{count}" for number in range(count) if out / f"part-{Part(number, count).name}.json" not in found]
    if missing:
        raise UserError(f"{out}: {len(missing)} of {count} parts are missing, the first --shard {missing[0]}; convert them, then merge")
    return found


def _read_part(path: Path) -> _Done:
    try:
        fields = json.loads(path.read_text(encoding="ascii"))
        return _Done(**{**fields, "shards": [Shard(**shard) for shard in fields["shards"]]})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the description of a part ({error}); remove it and convert that part again") from error


def _require_equal(parts: list[Path], done: list[_Done], task: Task) -> None:
    for path, one in zip(parts, done, strict=True):
        names = [name for name in {**done[0].settings, **one.settings} if done[0].settings.get(name) != one.settings.get(name)]
        if names:
            values = f"{one.settings.get(names[0])} and not {done[0].settings.get(names[0])}"
            raise UserError(f"{path}: made with {names[0]} = {values} as the first part was; remove it and convert that part again")
        if one.listing_sha256 != task.listing_sha256:
            raise UserError(f"{path}: made from other images than {task.listing.root} holds; give the --data that all parts were made from")


def _renumbered(rows: list[NDArray[np.void]], done: list[_Done]) -> NDArray[np.void]:
    """All rows, with the shards counted through."""
    first = 0
    for part, one in zip(rows, done, strict=True):
        part["shard"] += np.uint32(first)
        first += len(one.shards)
    return np.concatenate(rows)
