"""Finds out what a user gave as data: folders, tars, shards, Parquet files or lists, one or several at once.

`a::b` gives several at once, as WebDataset writes it; `part-{00000..00099}.tar` and `part-*.tar` stand for many files.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from fastbyol.config.arguments import expand_home
from fastbyol.config.errors import UserError, public_argument, public_arguments
from fastbyol.config.urls import is_url, separated
from fastbyol.data.inputs.folder import is_folder
from fastbyol.data.inputs.listing import EXTENSIONS
from fastbyol.data.inputs.splits import is_split
from fastbyol.host.store_path import Place, StorePath

SEPARATOR = "::"
LIST_EXTENSIONS = (".txt", ".csv", ".tsv", ".lst")
_KIND_OF = {".tar": "tar", ".parquet": "parquet"} | dict.fromkeys(LIST_EXTENSIONS, "list")
_PATTERN = re.compile(r"[*?\[{]")
_MOST_FILES = 1_000_000
"""Most files that one pattern may stand for: {0..999999999} would fill the memory."""
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,12})\.\.(\d{1,12})")
_NUMBERS = re.compile(r"[-_.]?\d+([-_.]?of[-_.]?\d+)?$")
Data = Place | str | Sequence[Place | str]


@dataclass(frozen=True)
class GivenSource:
    """One thing to list."""

    kind: str
    """'folder', 'tar', 'parquet' or 'list'."""
    paths: tuple[Place, ...]
    """The tars or Parquet files; otherwise one path."""
    given: Place
    """The path or pattern as the user wrote it, for messages."""


def given_sources(data: Data, *, option: str = "--data") -> list[GivenSource]:
    """Returns what `data` stands for, in the order given. Raises UserError, naming the option, if something does not exist or is unclear."""
    texts = [data] if isinstance(data, str | Path | StorePath) else list(data)
    parts = [part for text in public_arguments(list(map(str, texts))) for part in separated(text)]
    if not all(parts):
        raise UserError(f"{option} = {public_argument(str(texts[0]))!r}: names nothing on one side of '{SEPARATOR}'; give paths on both")
    return [source for part in parts for source in _sources_of(expand_home(part), option)]


def is_original(data: str) -> bool:
    """Returns True if `data` can only mean images that were not converted: several sources, a pattern, a tar, a Parquet file or a list."""
    if is_url(data) and SEPARATOR not in data:
        return bool(_PATTERN.search(data)) or StorePath.of(data).suffix.lower() in (*_KIND_OF, *EXTENSIONS)
    path = Path(data)
    if SEPARATOR in data or not path.exists():
        return SEPARATOR in data or bool(_PATTERN.search(data))
    return path.is_file() and path.suffix.lower() in (*_KIND_OF, *EXTENSIONS)


def _sources_of(text: str, option: str) -> list[GivenSource]:
    if is_url(text):
        return _sources_at_url(text, option)
    path = Path(text)
    if path.exists():
        return [_source_of(path)]
    if not _PATTERN.search(text):
        raise UserError(f"{option} = {text}: no such file or folder")
    names = [name for pattern in _brace_expanded(text) for name in (sorted(glob.glob(pattern)) or [pattern])]
    missing = [name for name in names if not os.path.exists(name)]
    if missing and len(missing) == len(names):
        raise UserError(f"{option} = {text}: no file or folder has such a name (the first would be {missing[0]}); check the pattern")
    if missing:
        raise UserError(
            f"{option} = {text}: {len(missing):,} of its {len(names):,} files are missing, the first {missing[0]}; copy them, or correct the numbers"
        )
    found = [_source_of(Path(name)) for name in names]
    if len({source.kind for source in found}) > 1 or found[0].kind not in ("tar", "parquet"):
        return found
    return [GivenSource(found[0].kind, tuple(path for source in found for path in source.paths), path)]


def _brace_expanded(text: str) -> Iterator[str]:
    """Yields the names that braces stand for: '{a,b}' and '{000..099}', whose numbers keep their width."""
    pieces = _BRACES.split(text)
    choices: list[list[str]] = []
    for inside in pieces[1::2]:
        if bounds := _RANGE.fullmatch(inside):
            first, last = bounds.groups()
            if abs(int(last) - int(first)) >= _MOST_FILES:
                raise UserError(f"{text}: {{{inside}}} stands for more than {_MOST_FILES:,} files; correct the numbers")
            width = len(first) if first.startswith("0") or len(first) == len(last) else 1
            choices.append([f"{number:0{width}d}" for number in range(int(first), int(last) + 1)])
        else:
            choices.append(inside.split(","))
    for chosen in product(*choices):
        yield "".join(part for pair in zip(pieces[::2], (*chosen, ""), strict=True) for part in pair)


def _sources_at_url(text: str, option: str) -> list[GivenSource]:
    given = StorePath.of(text)
    if not _PATTERN.search(text):
        return [_source_of(given)]
    globs = re.compile(r"[*?\[]")
    places = [place for name in _brace_expanded(text) for place in (_matching(name) if globs.search(name) else [StorePath.of(name)])]
    if not places:
        raise UserError(f"{option} = {text}: no file has such a name; check the pattern")
    found = list(map(_source_of, places))
    if len({source.kind for source in found}) > 1 or found[0].kind not in ("tar", "parquet"):
        return found
    return [GivenSource(found[0].kind, tuple(path for source in found for path in source.paths), given)]


def _matching(pattern: str) -> list[StorePath]:
    """Returns the URLs that match; only the last part may be a pattern: a store would have to list everything for another."""
    folder, last = StorePath.of(pattern).parent, pattern.rpartition("/")[2]
    if _PATTERN.search(folder.url):
        raise UserError(f"{pattern}: only the last part of a URL may be a pattern; give each folder")
    return [folder / file.name for file in folder.children()[0] if fnmatch.fnmatchcase(file.name, last)]


def _source_of(path: Place) -> GivenSource:
    if path.is_dir():
        return _shards_in(path) or GivenSource("folder", (path,), path)
    if path.suffix.lower() in EXTENSIONS:
        raise UserError(f"{path}: is one image; give its folder, or a list of images")
    # A file of another name is read as a tar, whose reader says what is wrong with it.
    return GivenSource(_KIND_OF.get(path.suffix.lower(), "tar"), (path,), path)


def _shards_in(folder: Place) -> GivenSource | None:
    """Returns the tars or Parquet files of a folder that has no images of its own; None if it is a folder of images.

    Hugging Face's data sets have their Parquet files in a folder 'data'.
    """
    for place in (folder, folder / "data"):
        try:
            files, folders = _names_in(place)
        except OSError:
            return None
        for extension in (".tar", ".parquet"):
            shards = [name for name in (*files, *folders) if name.endswith(extension) and not name.startswith(".")]
            others = [name for name in folders if not name.startswith(".")] if extension == ".tar" else []
            if shards and not others and not any(name.lower().endswith(EXTENSIONS) for name in (*files, *folders)):
                _refuse_several_splits(place, [name.removesuffix(extension) for name in shards], extension)
                return GivenSource(_KIND_OF[extension], tuple(place / name for name in sorted(shards)), folder)
        if "data" not in folders:
            return None
    return None


def _names_in(place: Place) -> tuple[list[str], list[str]]:
    """Returns the names of the files and of the folders directly in a folder, sorted."""
    if isinstance(place, StorePath):
        files, folders = place.children()
        return [file.name for file in files], folders
    here: tuple[list[str], list[str]] = [], []
    for entry in os.scandir(place):
        here[is_folder(entry)].append(entry.name)
    return sorted(here[0]), sorted(here[1])


def _refuse_several_splits(folder: Place, stems: list[str], extension: str) -> None:
    """Raises UserError if the files are those of train and val: training on both would put validation images into pre-training."""
    groups = {_NUMBERS.sub("", stem) for stem in stems}
    words = {word for group in groups for word in re.split(r"[\W_]+", group) if is_split(word)}
    if len(groups) > 1 and words:
        chosen = min((group for group in groups if "train" in group.lower()), default=min(groups))
        raise UserError(
            f"{folder}: holds the files of several splits ({', '.join(sorted(groups))}); give one of them, such as '{folder / chosen}*{extension}'"
        )
