"""Lists the images of one or several tars: class folders, WebDataset's shards, or images without labels.

Reading the headers of a terabyte of shards takes minutes, so their names and places are kept in an index file.
"""

from __future__ import annotations

import json
import logging
import os
import zipfile
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastbyol.config.errors import UserError
from fastbyol.data.formats.regular_files import require_regular
from fastbyol.data.inputs.folder import by_class_folder, most_in_no_folder, why_no_labels, without_labels
from fastbyol.data.inputs.listing import ImageListing, Places, Stamp, in_sample_order, may_be_known, stamp_at
from fastbyol.data.inputs.packed_names import PackedNames, array_of
from fastbyol.data.inputs.splits import refuse_splits
from fastbyol.data.inputs.tar import TarScan, key_of
from fastbyol.host.cache_files import cache_file, kept_files
from fastbyol.host.durable_files import durable_file
from fastbyol.host.progress import Progress
from fastbyol.host.store_path import Place, StorePath, at_once, known_place

log = logging.getLogger("fastbyol")
_FORMAT = 4
_INDEX = "fastbyol-index"


class TarContent:
    """Content of one scanned tar: the images' names and places, what was skipped, the class tars and WebDataset's labels."""

    def __init__(
        self,
        path: Place,
        stamp: Stamp,
        *,
        names: Iterable[str],
        places: tuple[array[int], array[int]],
        skipped: list[tuple[str, str]],
        class_tars: set[str],
        labels: tuple[array[int], list[str]],
    ) -> None:
        """places: offset and size of each image. labels: number of each image's label, -1 for none, and the labels that the numbers mean."""
        self.path, self.stamp, self.names, self.skipped, self.class_tars = path, stamp, PackedNames.of(names), skipped, class_tars
        self.offsets, self.sizes = places
        self.label, self.label_names = labels

    @classmethod
    def of_scan(cls, path: Place, stamp: Stamp, scan: TarScan) -> TarContent:
        labels = _numbered_labels(scan.names, scan.labels)
        places = (scan.offsets, scan.sizes)
        return cls(path, stamp, names=scan.names, places=places, skipped=scan.skipped, class_tars=scan.class_tars, labels=labels)


def _numbered_labels(names: Sequence[str], labels: Mapping[str, str]) -> tuple[array[int], list[str]]:
    """Returns the number of each image's label and the labels, given those of WebDataset's keys."""
    number: dict[str, int] = {}
    if not labels:
        return array("i", [-1]) * len(names), []
    found = array("i")
    for name in names:
        text = labels.get(key_of(name))
        found.append(-1 if text is None else number.setdefault(text, len(number)))
    return found, list(number)


def list_tars(paths: Sequence[Place], *, labels: str, splits: str) -> ImageListing:
    """Returns the images of the tars, in order; several tars are one data set of shards, whose names begin with the shard's.

    Args:
        paths: the tars.
        labels: 'auto' takes WebDataset's .cls members if there are any, else the class folders of a single tar if most of its images are in
            folders, else none; 'folders' the class folders; 'none' no labels.
        splits: 'refuse' raises an error for folders such as train/ and val/; 'classes' accepts them as classes.
    """
    found = tar_images(contents := read_tars(paths))
    if labels == "none":
        return without_labels(found)
    if labels == "auto" and any(content.label_names for content in contents):
        return _by_label_member(found, contents)
    if len(paths) > 1:
        if labels == "auto":
            return without_labels(found)
        return _by_folder_in_shard(found)
    names = found.names
    # 'images/train/n01440764/x.JPEG' becomes 'n01440764/x.JPEG' if all images are in images/train.
    if top := _folders_above_classes(names.folders()[0]):
        names = PackedNames.of(name[len(top) :] for name in names)
    class_names = tuple(sorted({folder.partition("/")[0] for folder in names.folders()[0] if folder} | contents[0].class_tars))
    if splits == "refuse":
        refuse_splits(found.root, class_names, names)
    if labels == "auto" and len(class_names) < 2:
        return without_labels(found)
    if labels == "auto" and most_in_no_folder(names):
        return without_labels(replace(found, notes=(*found.notes, why_no_labels(found, set(class_names)))))
    if not class_names:
        raise UserError(f"{found.root}: its images are not in class folders (the first: {min(names)}); give --labels FILE or --labels none")
    return by_class_folder(replace(found, files=names, class_names=class_names))


def _folders_above_classes(folders: Sequence[str]) -> str:
    """Returns the longest common beginning of the folders, such as 'images/train/', after which each has at least one more level."""
    shared = PurePosixPath(os.path.commonpath(folders)).parts
    levels = min(folder.count("/") for folder in folders)
    return "".join(f"{folder}/" for folder in shared[:levels])


def _by_folder_in_shard(found: ImageListing) -> ImageListing:
    """Returns the images of several tars labelled by their folders in the tar; without one, the tar's own name is the class."""
    folders, number = found.names.folders()
    # The first part of a folder is the tar's name.
    class_of_folder = [folder.split("/")[1] if "/" in folder else folder for folder in folders]
    class_names = tuple(sorted(set(class_of_folder)))
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = np.array([label_of[name] for name in class_of_folder], dtype=np.int32)[number]
    return in_sample_order(replace(found, class_names=class_names), labels)


def tar_images(contents: Sequence[TarContent]) -> ImageListing:
    """Returns the images of all tars, in no particular order and without labels. Raises UserError if there are none."""
    one = len(contents) == 1
    stems = [""] if one else [f"{content.path.name.removesuffix('.tar')}/" for content in contents]
    if len(set(stems)) != len(stems):
        stems = [f"{_absolute(content.path).lstrip('/').removesuffix('.tar')}/" for content in contents]
    root = contents[0].path if one else _common_folder([content.path for content in contents])
    pairs = list(zip(stems, contents, strict=True))
    names = contents[0].names if one else PackedNames.joined([content.names.prefixed(stem) for stem, content in pairs])
    skipped = tuple((stem + name, why) for stem, content in pairs for name, why in content.skipped)
    if not len(names):
        told = f" (what is in it: {', '.join(name for name, _ in skipped[:3])})" if skipped else ""
        raise UserError(f"{root}: no image in it{told}; give a tar of images, of class folders, or of one tar per class")
    places = Places.joined([Places.of_one(c.path, c.offsets, c.sizes, stamp=c.stamp) for c in contents])
    return ImageListing(root, (), names, (), skipped, places)


def _absolute(path: Place) -> str:
    return path.as_path if isinstance(path, StorePath) else path.as_posix()


def _common_folder(paths: Sequence[Place]) -> Place:
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(_absolute(path))) for path in paths])
    first = paths[0]
    return first.above(folder) if isinstance(first, StorePath) else Path(folder)


def _by_label_member(found: ImageListing, contents: Sequence[TarContent]) -> ImageListing:
    """Returns the images labelled by WebDataset's .cls members: class numbers, or names."""
    class_names = tuple(in_class_order({value for content in contents for value in content.label_names}))
    label_of = {name: label for label, name in enumerate(class_names)}
    columns = []
    for content in contents:
        # The last one stands for -1, which is no label.
        numbers = np.array([*(label_of[value] for value in content.label_names), -1], dtype=np.int32)
        columns.append(numbers[np.frombuffer(content.label, dtype=np.int32)] if len(content.label) else numbers[:0])
    labels = np.concatenate(columns)
    without = int((labels < 0).sum())
    note = f"{found.root}: labels from .cls members: {len(class_names):,} classes" + (f"; {without:,} images have none" if without else "")
    return in_sample_order(replace(found, class_names=class_names, notes=(*found.notes, note)), labels)


def in_class_order(texts: Collection[str]) -> list[str]:
    """Returns the texts of labels in the order of their classes: by number if all are numbers, else by name."""
    by_number = all(text.isdecimal() for text in texts)
    return sorted(texts, key=lambda text: (int(text), text) if by_number else (0, text))


def read_tars(paths: Sequence[Place]) -> list[TarContent]:
    """Returns the content of each tar, from the index file if it has one and the tar has not changed since. Writes the index file.

    A single local tar has no index file: its headers are read in a moment. A tar at a URL has to be fetched whole to read them.
    """
    try:
        stamps = list(at_once(stamp_at, paths))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check the file") from error
    one_here = len(paths) == 1 and not isinstance(paths[0], StorePath)
    if one_here or not all(map(may_be_known, paths, stamps)):
        return _scan(paths, stamps)
    stamp_of_path = dict(zip(paths, stamps, strict=True))
    fresh: dict[Place, TarContent | None] = dict.fromkeys(paths)
    for index in kept_files(_beside(paths), name=_INDEX, of=paths):
        _take_known(fresh, _read_index(index, tell=log.debug), stamp_of_path)
    if all(content is not None and content.stamp == stamp_of_path[path] for path, content in fresh.items()):
        return [content for content in fresh.values() if content is not None]
    with cache_file(_beside(paths), name=_INDEX, of=paths) as index:
        if index:  # once more: another process may have written it meanwhile
            _take_known(fresh, _read_index(index), stamp_of_path)
        outdated = [path for path, content in fresh.items() if content is not None and content.stamp != stamp_of_path[path]]
        for path in outdated:
            log.warning("%s: has changed since it was indexed; it is indexed again", path)
        stale = [(path, stamp) for path, stamp in stamp_of_path.items() if fresh[path] is None or path in outdated]
        if stale:
            for content in _scan([path for path, _ in stale], [stamp for _, stamp in stale]):
                fresh[content.path] = content
            if index:
                _write_index(index, [content for content in fresh.values() if content])
    return [content for content in fresh.values() if content is not None]


def _beside(paths: Sequence[Place]) -> Path | None:
    """Returns the folder in which the index is kept; None for tars at URLs: the user's cache folder."""
    folder = paths[0].parent
    return None if isinstance(folder, StorePath) else folder


def _take_known(fresh: dict[Place, TarContent | None], known: Mapping[str, TarContent], stamp_of_path: Mapping[Place, Stamp]) -> None:
    """Fills `fresh` with the contents that an index knows, where it has none or one that is out of date."""
    for path, content in fresh.items():
        found = known.get(str(path.absolute()))
        if found is not None and (content is None or content.stamp != stamp_of_path[path]):
            fresh[path] = found


def _scan(paths: Sequence[Place], stamps: Sequence[Stamp]) -> list[TarContent]:
    what = f"{paths[0].name}: headers" if len(paths) == 1 else f"{paths[0].parent.name}: headers of {len(paths):,} tars"
    with Progress(what, sum(size for size, _ in stamps)) as progress:
        contents = []
        for path, stamp in zip(paths, stamps, strict=True):
            scan = TarScan(path)
            scan.read(progress)
            contents.append(TarContent.of_scan(path, stamp, scan))
    return contents


def _write_index(index: Path, contents: Sequence[TarContent]) -> None:
    facts = [
        {
            "path": str(content.path.absolute()),
            "stamp": content.stamp,
            "images": len(content.names),
            "skipped": content.skipped,
            "class_tars": sorted(content.class_tars),
            "label_names": content.label_names,
        }
        for content in contents
    ]
    columns = {
        "facts": _as_bytes(json.dumps({"format": _FORMAT, "tars": facts})),
        "names": PackedNames.joined([content.names for content in contents]).block,
        "label": np.concatenate([np.array(content.label, dtype=np.int32) for content in contents]),
        "offsets": np.concatenate([np.array(content.offsets, dtype=np.int64) for content in contents]),
        "sizes": np.concatenate([np.array(content.sizes, dtype=np.int64) for content in contents]),
    }
    try:
        with durable_file(index) as file:
            np.savez(file, allow_pickle=False, **columns)
    except OSError as error:
        log.warning("%s: cannot be written (%s); the tars will be read again next time", index, error.strerror)


def _read_index(index: Path, *, tell: Callable[..., None] = log.warning) -> dict[str, TarContent]:
    """Returns the indexed tars by their paths; {} if there is no index or it is damaged: then `tell` reports it, and everything is read again."""
    if not index.exists():
        return {}
    try:
        require_regular(index)
        with index.open("rb") as file:
            with zipfile.ZipFile(file) as archive:  # refuse what is compressed: a small file could unpack to fill the memory
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is compressed")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                facts: dict[str, Any] = json.loads(arrays["facts"].tobytes())
                if facts["format"] != _FORMAT:
                    raise ValueError("another version wrote it")
                block, offsets, sizes, label = (arrays[name] for name in ("names", "offsets", "sizes", "label"))
        names = PackedNames.of_block(block)
        counted = sum(fact["images"] for fact in facts["tars"])
        fits = len(names) == counted and all(column.shape == (counted,) and column.dtype.kind == "i" for column in (offsets, sizes, label))
        if not fits or (len(block) and block[-1]):
            raise ValueError("its columns do not fit together")
        found, first = {}, 0
        for fact in facts["tars"]:
            path, stamp, end = known_place(fact["path"]), (int(fact["stamp"][0]), int(fact["stamp"][1])), first + int(fact["images"])
            offset, size, number = offsets[first:end], sizes[first:end], label[first:end]
            texts = list(map(str, fact["label_names"]))
            if end > first and (offset.min() < 0 or size.min() < 0 or int((offset + size).max()) > stamp[0]):
                raise ValueError("a place beyond its tar")
            if end > first and not -1 <= number.min() <= number.max() < len(texts):
                raise ValueError("a label that is not there")
            found[fact["path"]] = TarContent(
                path,
                stamp,
                names=names.part(first, end),
                places=(array_of("q", offset), array_of("q", size)),
                skipped=[(str(name), str(why)) for name, why in fact["skipped"]],
                class_tars=set(map(str, fact["class_tars"])),
                labels=(array_of("i", number), texts),
            )
            first = end
    except Exception as error:  # a damaged zip file or array header raises anything
        tell("%s: is damaged (%s); the tars are read again", index, error)
        return {}
    return found


def _as_bytes(text: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(text.encode(errors="surrogateescape"), dtype=np.uint8)
