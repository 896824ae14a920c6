"""The list of a data set's images: their order, labels, and the location of their bytes.

Images are ordered by class, and within a class as torchvision.datasets.ImageFolder orders them, for every kind of input. So a folder and a tar
of that folder have the same samples with the same indices. Worker processes import this module, so it imports only numpy beside the standard
library.
"""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.data.inputs.packed_names import PackedNames, array_of, labels_as
from fastbyol.host.store_path import Place, StorePath

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".avif", ".jfif", ".jp2")
"""File extensions of images, in upper or lower case: torchvision's, and others that Pillow reads."""
_UNREADABLE_EXTENSIONS = (".heic", ".heif")
"""Extensions of images that Pillow does not read: the reason for skipping them says so."""
_FOREIGN_FOLDERS = frozenset(
    ("lost+found", "@eadir", "__macosx", "$recycle.bin", "recycler", "system volume information", "#recycle", "#snapshot", "@recycle",
     "@recently-snapshot", "@__thumb", "network trash folder", "temporary items", "__pycache__")
)  # fmt: skip
"""Folders that file systems, Synology, QNAP, macOS, Windows and Python create among the user's files, in lower case."""
_THUMBNAILS = ("SYNOFILE_THUMB", "SYNOPHOTO_THUMB")


LEFT_OUT = -2
"""Label, in an array, of an image that is not a sample."""
_LONGEST_NAME, _MOST_FOLDERS = 4096, 256
"""Longest name of an image, in characters (Linux opens no longer path), and the most folders in it: all ends of a name, which are kept to match
lists with images, take memory with the square of its length."""
LONGEST_SHOWN = 1000
"""Characters of a name that a message shows."""
_SORTED = 1 << 15
"""Names that are sorted together where groups are smaller."""
Stamp = tuple[int, int]
"""(size in bytes, time of the last change in ns) of a file: another stamp means another content."""


def stamp_of(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns


def stamp_at(place: Place) -> Stamp:
    """Returns the stamp of a file; for a file at a URL, its size and a number for the version that the store reports. Raises OSError or UserError."""
    if isinstance(place, StorePath):
        size, version = place.stat()
        return size, version
    return stamp_of(place.stat())


def may_be_known(place: Place, stamp: Stamp) -> bool:
    """Returns False for a file at a URL whose stamp is only its size: earlier results about it could be out of date."""
    return bool(stamp[1]) or not isinstance(place, StorePath)


@dataclass(frozen=True, slots=True)
class ImageLocation:
    """Location of one image's bytes: a file, or a byte range of one, here or at a URL. Small, because it is sent to worker processes."""

    name: str
    """Relative name with '/', unique in its listing. Only for display: no file is opened or written by this name."""
    path: Place
    offset: int = 0
    size: int | None = None
    """Number of bytes; None for the whole file."""
    stamp: Stamp | None = None
    """Stamp of the container when it was listed; None if it is not compared."""

    def read(self) -> bytes:
        """Returns the image's bytes. Raises OSError if they cannot be read completely, or if the container has changed since it was listed,
        and Lost if a store no longer answers.
        """
        if isinstance(self.path, StorePath):
            return self._read_from_store(self.path)
        with open(self.path, "rb", buffering=0) as file:
            if self.size is None:
                return file.readall()
            # One system call of 1 us: a shard that was written anew holds other bytes at this offset, perhaps those of another image.
            if self.stamp is not None and stamp_of(os.fstat(file.fileno())) != self.stamp:
                raise OSError(f"{self.path} has changed since it was listed")
            data = os.pread(file.fileno(), self.size, self.offset)
        if len(data) != self.size:
            raise OSError(f"{self.path} has {len(data)} of {self.size} bytes at offset {self.offset}: it was cut or replaced")
        return data

    def _read_from_store(self, path: StorePath) -> bytes:
        try:
            data = path.read_bytes() if self.size is None else path.read(self.offset, self.size)
        except UserError as error:
            raise OSError(str(error)) from None
        # Asking for a container's version with each of its images would double the requests: a conversion does so once, at its end.
        if self.size is None and self.stamp is not None and len(data) != self.stamp[0]:
            raise OSError(f"{path} has changed since it was listed")
        return data


@dataclass(frozen=True)
class Places:
    """The byte ranges of images in files that hold many: container number, offset and size of each image, 20 bytes in memory."""

    containers: tuple[Place, ...]
    stamps: tuple[Stamp, ...]
    """Stamp of each container when it was listed."""
    container: array[int]
    """Number of each image's container."""
    offsets: array[int]
    sizes: array[int]

    @classmethod
    def of_one(cls, path: Place, offsets: array[int], sizes: array[int], *, stamp: Stamp) -> Places:
        """Returns the places of images that are all in one file."""
        return cls((path,), (stamp,), array("i", [0]) * len(offsets), offsets, sizes)

    @classmethod
    def of_locations(cls, locations: Sequence[ImageLocation]) -> Places:
        """Returns the places of these images, some of which may be files of their own. Raises UserError if such a file no longer exists."""
        numbers: dict[tuple[Place, Stamp], int] = {}
        container, offsets, sizes = _arrays()
        for location in locations:
            stamp = location.stamp or _listed_stamp(location.path)
            container.append(numbers.setdefault((location.path, stamp), len(numbers)))
            offsets.append(location.offset)
            sizes.append(stamp[0] if location.size is None else location.size)
        return cls(tuple(path for path, _ in numbers), tuple(stamp for _, stamp in numbers), container, offsets, sizes)

    @classmethod
    def joined(cls, parts: Sequence[Places]) -> Places:
        """Returns the places of all parts, one after the other."""
        places = cls(tuple(path for part in parts for path in part.containers), tuple(s for part in parts for s in part.stamps), *_arrays())
        first = 0
        for part in parts:
            places.container.frombytes((np.frombuffer(part.container, dtype=np.int32) + np.int32(first)).tobytes())
            places.offsets.extend(part.offsets)
            places.sizes.extend(part.sizes)
            first += len(part.containers)
        return places

    def location(self, index: int, name: str) -> ImageLocation:
        number = self.container[index]
        return ImageLocation(name, self.containers[number], self.offsets[index], self.sizes[index], self.stamps[number])

    def restricted(self, indices: NDArray[np.int64]) -> Places:
        container, offsets, sizes = (
            array_of(column.typecode, np.frombuffer(column, dtype=column.typecode)[indices])
            for column in (self.container, self.offsets, self.sizes)
        )
        return replace(self, container=container, offsets=offsets, sizes=sizes)


def _arrays() -> tuple[array[int], array[int], array[int]]:
    return array("i"), array("q"), array("q")


@dataclass(frozen=True)
class ImageListing:
    """The images of a data set in order; sample i is file i. Takes the bytes of its name and 17 more per image, and 20 for a place."""

    root: Place
    """The folder, tar or other source that was listed; images that are files of their own have their names relative to it."""
    class_names: tuple[str, ...]
    """Class names in label order; () if no image has a label."""
    files: Sequence[str]
    """Names with '/', unique, without line breaks. Bytes that are not UTF-8 are kept with surrogateescape. They become `PackedNames`."""
    labels: tuple[int, ...]
    """Class of each image; -1 for an image without a label."""
    skipped: tuple[tuple[str, str], ...] = ()
    """(name, reason) of every entry below the root that is not a sample."""
    places: Places | None = field(default=None, repr=False)
    """Places of images in tars and the like; None if each image is a file of its own."""
    notes: tuple[str, ...] = ()
    """Messages on how the input was interpreted, to be shown to the user before work starts."""
    sizes: array[int] | None = field(default=None, repr=False)
    """Size in bytes of each image, if the images are files of their own in a store, which lists sizes with names; None otherwise."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", PackedNames.of(self.files))

    @property
    def names(self) -> PackedNames:
        """The `files` with their real type."""
        assert isinstance(self.files, PackedNames)
        return self.files

    def location(self, index: int) -> ImageLocation:
        name = self.files[index]
        if self.places is not None:
            return self.places.location(index, name)
        return ImageLocation(name, self.root / name, stamp=None if self.sizes is None else (self.sizes[index], 0))

    def path(self, index: int) -> Place:
        """Returns the path of the file that contains the image."""
        return self.location(index).path

    def num_bytes(self, index: int) -> int:
        """Returns the image's size in bytes. Raises UserError if its file no longer exists."""
        if self.places is not None:
            return self.places.sizes[index]
        return _listed_stamp(self.root / self.files[index])[0] if self.sizes is None else self.sizes[index]

    def digest(self) -> str:
        """Returns the SHA-256 of every image's name, size and label in order; equal digests mean the same listing."""
        lines = hashlib.sha256()
        for index, (name, label) in enumerate(zip(self.files, self.labels, strict=True)):
            lines.update(f"{name}\0{self.num_bytes(index)}\0{label}\n".encode(errors="surrogateescape"))
        return lines.hexdigest()

    def with_absolute_paths(self) -> ImageListing:
        """Returns the same listing with paths that mean the same in every process, whatever its working folder."""
        places = self.places and replace(self.places, containers=tuple(path.absolute() for path in self.places.containers))
        return replace(self, root=self.root.absolute(), places=places)

    def restricted(self, indices: Sequence[int] | NDArray[np.int64]) -> ImageListing:
        """Returns the samples at these positions, in this order. Labels and class names do not change."""
        chosen = np.asarray(indices, dtype=np.int64)
        return self.taken(chosen, np.array(self.labels, dtype=np.int32))

    def taken(self, chosen: NDArray[np.int64], labels: NDArray[np.int32]) -> ImageListing:
        """Returns the images at these positions, in this order. labels: (N,) new labels of all images of this listing."""
        return replace(
            self,
            files=self.names.take(chosen),
            labels=labels_as(labels[chosen]),
            places=None if self.places is None else self.places.restricted(chosen),
            sizes=None if self.sizes is None else array_of("q", np.frombuffer(self.sizes, dtype=np.int64)[chosen]),
        )

    def require_unchanged(self) -> None:
        """Raises UserError if a file at a URL that holds many images has changed since it was listed."""
        for place, stamp in zip(self.places.containers, self.places.stamps, strict=True) if self.places is not None else ():
            if isinstance(place, StorePath) and stamp_at(place) != stamp:
                raise UserError(f"{place}: has changed since it was listed; repeat the command with --restart")


def _listed_stamp(path: Place) -> Stamp:
    """Returns the stamp of an image's file. Raises UserError if it no longer exists."""
    try:
        return stamp_at(path)
    except OSError as error:
        raise UserError(f"{path}: was listed a moment ago and is gone ({error.strerror}); is the folder being changed?") from error


def names_digest(names: Iterable[str]) -> str:
    """Returns the SHA-256 of the names in order, each followed by a zero byte."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


def in_sample_order(found: ImageListing, labels: Sequence[int | None] | NDArray[np.int32]) -> ImageListing:
    """Returns the images in the order of samples. `found` may have any order; labels[i] belongs to its image i.

    An image whose label is None, or LEFT_OUT in an array, is left out; -1 keeps it without a label, before those of the classes.
    """
    label = labels
    if not isinstance(label, np.ndarray):
        label = np.fromiter((LEFT_OUT if each is None else each for each in labels), dtype=np.int32, count=len(found.files))
    # torchvision's order within a class: by the folder's path, then by the file's name.
    _, folder = found.names.folders()
    order = np.lexsort((folder, label))
    order = order[label[order] != LEFT_OUT]
    _sort_names_within(order, found.names, group_starts=_changes(label[order]) | _changes(folder[order]))
    return replace(found.taken(order, label), skipped=tuple(sorted(found.skipped)))


def _changes(values: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Returns (N,) bool: True for the first value and for each one that differs from the value before it."""
    return np.concatenate([np.ones(min(1, len(values)), dtype=np.bool_), values[1:] != values[:-1]])


def _sort_names_within(order: NDArray[np.int64], names: PackedNames, *, group_starts: NDArray[np.bool_]) -> None:
    """Sorts the indices of `order`, in place, by name within each group. Small groups are sorted together, so that many groups cost no more."""
    starts = np.append(np.flatnonzero(group_starts), len(order))
    first = 0
    while first < len(starts) - 1:
        # As many whole groups as hold up to _SORTED names, at least one.
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + _SORTED, side="right")) - 1)
        piece = slice(int(starts[first]), int(starts[last]))
        chosen = names.take(order[piece])
        if last == first + 1:
            order[piece] = order[piece][chosen.sorted_order()]
        else:
            keys = list(zip(np.cumsum(group_starts[piece]).tolist(), chosen, strict=True))
            order[piece] = order[piece][sorted(range(len(keys)), key=keys.__getitem__)]
        first = last


def why_not_an_image(file_name: str) -> str:
    """Returns why a file of this name is not a sample, or '' if it may be one."""
    if file_name.startswith("."):
        return "hidden"  # also '._x.jpg', which macOS writes beside x.jpg: it is not an image
    if file_name.startswith(_THUMBNAILS):
        return "a thumbnail"
    if has_line_break(file_name):
        return "a line break in its name: a list of names could not hold it"
    if file_name.lower().endswith(_UNREADABLE_EXTENSIONS):
        return "HEIC, which Pillow does not read"
    return "" if file_name.lower().endswith(EXTENSIONS) else "not an image by its extension"


def why_not_a_folder(name: str) -> str:
    """Returns why a folder of this name is skipped with all its files, or '' if it is not."""
    if name.startswith("."):
        return "hidden"
    if name.lower() in _FOREIGN_FOLDERS:
        return "a system folder"
    return "a line break in its name" if has_line_break(name) else ""


def why_too_long(name: str) -> str:
    """Returns why an image's name with its folders is too long to be a sample's, or '' if it is not."""
    is_long = len(name) > _LONGEST_NAME or name.count("/") > _MOST_FOLDERS
    return f"a name of more than {_LONGEST_NAME:,} characters or {_MOST_FOLDERS} folders" if is_long else ""


def has_line_break(name: str) -> bool:
    return "\n" in name or "\r" in name


def left_out(skipped: Iterable[tuple[str, str]]) -> dict[str, tuple[int, str]]:
    """Returns {kind of reason: (number of skipped entries, name of the first)}, the most frequent first."""
    found: dict[str, tuple[int, str]] = {}
    for name, reason in skipped:
        kind = re.split(r" \(| to |: | as ", reason)[0]
        count, first = found.get(kind, (0, name))
        found[kind] = count + 1, first
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def left_out_text(skipped: Iterable[tuple[str, str]]) -> str:
    """Returns e.g. '3 in no class folder (the first: 'x.jpg'), 1 hidden (the first: '.git')', or '' if nothing was skipped."""
    return ", ".join(f"{count:,} {kind} (the first: {first!r})" for kind, (count, first) in left_out(skipped).items())
