"""A digest of the files that an evaluation reads, by which a result is known to be of these images and not of others at the same path."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastbyol.config.urls import is_url, public_text
from fastbyol.data.inputs.folder import is_folder
from fastbyol.evaluation.splits import split_paths

FEW = 100
"""Files of a folder whose sizes and times count too. In a folder of more, usually a class, only their names do: asking for each takes minutes
on a network file system.
"""


def data_state(paths: Iterable[str | Path]) -> str:
    """Returns a short text that changes with what lies at these paths: names in all folders, and size and time of files where they are few.

    A URL or a path at which there is nothing counts by its text. Hidden files do not count: our own indexes are among them.
    """
    digest = hashlib.sha256()
    for path in paths:
        text = public_text(str(path)) if is_url(path) else os.path.abspath(path)
        digest.update(f"{text}\0".encode(errors="surrogateescape"))
        for line in () if is_url(path) else _lines(Path(path)):
            digest.update(f"{line}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:12]


def paths_of(data: str) -> list[str]:
    """Returns the paths of the train and val images that `--data` names, for `data_state`."""
    train, val = split_paths(data)
    return [part for text in (train, val) for part in text.split("::") if part]


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        yield _facts(path)
    waiting, seen = [path] if path.is_dir() else [], set[tuple[int, int]]()
    while waiting:
        folder = waiting.pop()
        try:
            found = folder.stat()
            if (found.st_dev, found.st_ino) in seen:  # a link to a folder that was visited already
                continue
            seen.add((found.st_dev, found.st_ino))
            with os.scandir(folder) as entries:
                inside = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
        except OSError:
            continue  # reading the data will report why it cannot be read
        files = [entry.name for entry in inside if not is_folder(entry)]
        yield f"{os.path.relpath(folder, path)}/"
        yield from (_facts(folder / name) for name in files) if len(files) <= FEW else files
        waiting += [folder / entry.name for entry in reversed(inside) if is_folder(entry)]


def _facts(file: Path) -> str:
    try:
        found = file.stat()
    except OSError:
        return file.name  # a broken link, which reading the data will report
    return f"{file.name} {found.st_size} {found.st_mtime_ns}"
