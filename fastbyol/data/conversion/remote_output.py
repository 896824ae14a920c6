"""Conversions whose output is for a URL: a .beton, a folder of tar shards, one part of such a folder, or the merge of its parts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from fastbyol.config.console import say
from fastbyol.config.errors import UserError
from fastbyol.data.conversion.work_folder import work_path
from fastbyol.data.formats.manifest import TAR_MANIFEST
from fastbyol.data.formats.tar_shards import PART_FILES
from fastbyol.host.quantities import bytes_text, count_text
from fastbyol.host.staged_output import StagedOutput
from fastbyol.host.store_path import Place, StorePath
from fastbyol.host.stores import Absent, retried

Make = Callable[[Path, Callable[[Path], Place]], None]
"""Makes the output at a local path. Its second argument returns the URL to which each local file will be uploaded."""


def convert_to_store(out: StorePath, make: Make, *, settings: Mapping[str, Any], part: str, overwrite: str, unfinished: str) -> None:
    """Makes the output on this machine, unless an earlier command has, and uploads it.

    Args:
        out: file or folder to write.
        make: makes it.
        settings: everything that the output depends on.
        part: what this command makes of a folder that several commands share: the name of its part, or 'merge'; else ''.
        overwrite: 'refuse' or 'replace' an existing .beton.
        unfinished: 'continue' an earlier command's work, or 'restart' without it.

    Raises:
        UserError: the output exists, the store cannot be written, or as `make` does.
        Lost: the store does not answer; the same command goes on.
    """
    with StagedOutput(out, settings=settings, part=part, unfinished=unfinished) as staged:
        described = _parts_at(out) if part == "merge" else []
        if not staged.is_made and not part and _is_complete(staged.path):  # an earlier command ended before it called `made`
            shutil.rmtree(work_path(staged.path), ignore_errors=True)
            staged.made()
        if staged.is_made:
            say(f"{out}: made by an earlier command, which did not finish uploading it; its upload goes on")
        else:
            _refuse_existing(out, part=part, overwrite=overwrite, has_parts=bool(described))
            if described:
                _fetch_parts(described, staged.path)
            make(staged.path, staged.url_of)
            staged.made()
        if part and part != "merge":
            _remove_other_shards(out, staged.path, part=part)
        files, size = staged.upload(last=_place_in_order)
    _remove(described)  # the merge is complete without them
    say(f"{out}: uploaded {count_text(files, 'file')}, {size:,} bytes ({bytes_text(size)})")


def _is_complete(path: Path) -> bool:
    """Returns True if a .beton or a folder of shards has its final name, which it gets once everything is in it."""
    return path.is_file() if path.suffix == ".beton" else (path / TAR_MANIFEST).is_file()


def _remove_other_shards(out: StorePath, made: Path, *, part: str) -> None:
    """Removes the shards of an earlier conversion of this part from the store, its description first."""
    if not out.is_dir():
        return
    there = {file.name for file in out.children()[0]}
    old = sorted(name for name in there if name.startswith(f"shard-{part}-") and not (made / name).exists())
    if old:
        _remove([out / name for name in (f"part-{part}.json", *old) if name in there])


def _remove(places: Iterable[StorePath]) -> None:
    for place in places:
        fs, path = place.store()
        try:
            retried(lambda fs=fs, path=path: fs.rm_file(path), str(place))
        except Absent:
            continue


def _refuse_existing(out: StorePath, *, part: str, overwrite: str, has_parts: bool) -> None:
    if out.suffix == ".beton":
        if out.exists() and overwrite != "replace":
            raise UserError(f"{out}: exists already; give another --out, or --overwrite to replace it")
    elif part:
        if (out / TAR_MANIFEST).exists():
            raise UserError(f"{out}: holds a complete data set already; give another --out, or remove it first")
        if part == "merge" and not has_parts:
            raise UserError(f"{out}: holds no parts; convert with --shard i/n for every i of one n, then merge")
    elif out.is_dir():
        raise UserError(f"{out}: exists already; give another --out, or remove it first: in a store, shards cannot be replaced as a whole")


def _parts_at(out: StorePath) -> list[StorePath]:
    """Returns the descriptions of all parts that are in the store, their tables and their notes on images."""
    names = [file.name for file in out.children()[0]] if out.is_dir() else []
    return [out / name for name in names if any(fnmatch(name, pattern) for pattern in PART_FILES)]


def _fetch_parts(described: list[StorePath], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for place in described:
        (folder / place.name).write_bytes(place.read_bytes())


def _place_in_order(path: Path) -> int:
    """Returns a file's place in the upload: 0 for data, and larger for a file whose presence means that the rest is there."""
    if path.suffix == ".beton":
        return 2
    return int(path.name in (TAR_MANIFEST,) or bool(re.fullmatch(r"part-\d+-of-\d+\.json", path.name)))
