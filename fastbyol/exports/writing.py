"""Writes an encoder in one or more formats: each is written beside its place, loaded back and compared there, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbyol.config.arguments import require_name, through_links
from fastbyol.config.errors import UserError, first_line
from fastbyol.exports.card import card_path, card_text
from fastbyol.exports.check import CheckImages, checked
from fastbyol.exports.format import Format, Subject
from fastbyol.exports.registry import all_suffixes
from fastbyol.host.durable_files import UNFINISHED, flush_to_disk, write_durably


@dataclass(frozen=True)
class Written:
    """One export: its format, file or folder, card, facts, and size in bytes."""

    name: str
    path: Path
    card: Path
    facts: dict[str, Any]
    size: int


def places(formats: Mapping[str, Format], out: Path, *, overwrite: bool) -> dict[str, Path]:
    """Returns the file or folder of each format: `out` itself for one format, else a file in the folder `out`.

    Raises UserError, before any work, if one could not be written there, or exists and is not to be replaced.
    """
    out = through_links(out)
    if len(formats) > 1:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out}: is a file; several formats need a folder")
        if not out.exists() and out.suffix.lower() in all_suffixes():
            raise UserError(f"--out {out}: is the name of a file, and {' and '.join(formats)} need a folder; give one, or --to one format")
        found = {name: out / each.file for name, each in formats.items()}
        folder = out if out.is_dir() else out.parent
    else:
        ((name, each),) = formats.items()
        require_name(out)
        if not each.is_folder and out.suffix.lower() not in each.suffixes:
            raise UserError(f"--out {out}: must end in {' or '.join(each.suffixes)} for {name}")
        found, folder = {name: out}, out.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--out {out}: {folder} is not a folder that may be written to; choose another one")
    for name, path in found.items():
        _refuse_to_lose(path, formats[name], overwrite=overwrite)
    return found


_OURS = {"README.md", "config.json", "model.safetensors"}
"""What an exported folder holds."""


def _refuse_to_lose(path: Path, format: Format, *, overwrite: bool) -> None:
    card = card_path(path)
    for each in [path, *([] if format.is_folder else [card])]:
        if each.exists() and not overwrite:
            raise UserError(f"--out {each}: exists; give another name, or --overwrite to replace it")
    if path.exists() and path.is_dir() != format.is_folder:
        raise UserError(f"--out {path}: is a {'folder' if path.is_dir() else 'file'}; give another name")
    if format.is_folder and path.is_dir() and (others := sorted({each.name for each in path.iterdir()} - _OURS)):
        raise UserError(f"--out {path}: holds {others[0]}, which no export wrote; give a new folder")


def write_exports(
    subject: Subject,
    formats: Mapping[str, Format],
    where: Mapping[str, Path],
    facts: Mapping[str, Any],
    images: CheckImages,
    *,
    announce: Callable[[str], None],
) -> Iterator[Written]:
    """Writes every format and yields each when it is in place.

    Raises UserError if it cannot be written, or if the program that it is for computes other features; then no part of it is left.
    """
    for name, format in formats.items():
        path = where[name]
        announce(f"{name}: writes it, loads it back and compares features on {images.title}")
        said = {**facts, "format": name, "load": list(format.lines(path.name, subject))}
        try:
            if len(formats) > 1:
                path.parent.mkdir(exist_ok=True)
            with _beside(path) as unfinished:
                converted = format.convert(subject)
                format.save(converted, unfinished, said, subject)
                said["check"] = checked(format, format.read(unfinished, subject), subject, images, name=name)
                # Save again, now with the result of the check among the facts.
                format.save(converted, unfinished, said, subject)
                size = _flushed(unfinished)
                _put_in_place(unfinished, path)
            card = path / "README.md" if format.is_folder else card_path(path)
            if not format.is_folder:
                write_durably(card, card_text(said))
        except OSError as error:
            raise UserError(
                f"--out {path}: cannot be written ({error.strerror or first_line(error)}); make room, or choose another place"
            ) from error
        yield Written(name, path, card, said, size)


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """Yields a path with the same name in a hidden folder beside it, which is removed at the end: programs go by a file's suffix."""
    folder = path.with_name(f".{path.name}{UNFINISHED}{os.getpid()}")
    folder.mkdir()
    try:
        yield folder / path.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flushed(path: Path) -> int:
    """Flushes a file, or a folder of files, to the disk; returns its size in bytes."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    for file in files:
        flush_to_disk(file)
    if path.is_dir():
        flush_to_disk(path)
    return sum(file.stat().st_size for file in files)


def _put_in_place(unfinished: Path, path: Path) -> None:
    """Renames the finished file or folder, and flushes the new name to the disk."""
    if unfinished.is_dir() and path.is_dir():
        path.replace(unfinished.with_name("before"))  # a folder cannot be renamed onto another that has files
    unfinished.replace(path)
    flush_to_disk(path.parent)
