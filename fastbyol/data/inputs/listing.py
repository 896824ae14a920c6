"""The list of a data set's images: their order, labels, and the location of their bytes.

Images are ordered by class, and within a class as torchvision.datasets.ImageFolder orders them, for every kind of input. So a folder and a tar
of that folder have the same samples with the same indices. Worker processes import this module, so it uses only the standard library.
"""

from __future__ import annotations

import hashlib
import os
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastbyol.config.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""File extensions that torchvision accepts as images, in upper or lower case."""
_FOREIGN_FOLDERS = frozenset(
    ("lost+found", "@eadir", "__macosx", "$recycle.bin", "recycler", "system volume information", "#recycle", "#snapshot", "@recycle",
     "@recently-snapshot", "@__thumb", "network trash folder", "temporary items", "__pycache__")
)  # fmt: skip
"""Folders that file systems, Synology, QNAP, macOS, Windows and Python create among the user's files, in lower case."""
_THUMBNAILS = ("SYNOFILE_THUMB", "SYNOPHOTO_THUMB")


@dataclass(frozen=True, slots=True)
class ImageLocation:
    """Location of one image's bytes: a file, or a byte range of one. Small, because it is sent to worker processes."""

    name: str
    """Relative name with '/', unique in its listing. Only for display: no file is opened or written by this name."""
    path: Path
    offset: int = 0
    size: int | None = None
    """Number of bytes; None for the whole file."""

    def read(self) -> bytes:
        """Returns the image's bytes. Raises OSError if they cannot be read completely."""
        with open(self.path, "rb", buffering=0) as file:
            if self.size is None:
                return file.readall()
            data = os.pread(file.fileno(), self.size, self.offset)
        if len(data) != self.size:
            raise OSError(f"{self.path} has {len(data)} of {self.size} bytes at offset {self.offset}: it was cut or replaced")
        return data


@dataclass(frozen=True)
class ImageListing:
    """The images of a data set in order; sample i is file i. Takes about 120 bytes of memory per image."""

    root: Path
    """Path of the folder or tar."""
    class_names: tuple[str, ...]
    """Class names in label order."""
    files: tuple[str, ...]
    """Names relative to the root, with '/', unique, without line breaks. Bytes that are not UTF-8 are kept with surrogateescape."""
    labels: tuple[int, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    """(name, reason) of every entry below the root that is not a sample."""
    offsets: Sequence[int] | None = field(default=None, repr=False)
    """Offset of each image's first byte in a tar; None if each image is its own file."""
    sizes: Sequence[int] = field(default=(), repr=False)
    """Size of each image in a tar, in bytes."""
    notes: tuple[str, ...] = ()
    """Messages on how the input was interpreted, to be shown to the user before work starts."""

    def location(self, index: int) -> ImageLocation:
        name = self.files[index]
        if self.offsets is None:
            return ImageLocation(name, self.root / name)
        return ImageLocation(name, self.root, self.offsets[index], self.sizes[index])

    def path(self, index: int) -> Path:
        """Returns the path of the file that contains the image."""
        return self.root / self.files[index] if self.offsets is None else self.root

    def num_bytes(self, index: int) -> int:
        """Returns the image's size in bytes. Raises UserError if its file no longer exists."""
        if self.offsets is not None:
            return self.sizes[index]
        path = self.path(index)
        try:
            return path.stat().st_size
        except OSError as error:
            raise UserError(f"{path}: was listed a moment ago and is gone ({error.strerror}); is the folder being changed?") from error

    def digest(self) -> str:
        """Returns the SHA-256 of every image's name, size and label in order; equal digests mean the same listing."""
        lines = hashlib.sha256()
        for index, (name, label) in enumerate(zip(self.files, self.labels, strict=True)):
            lines.update(f"{name}\0{self.num_bytes(index)}\0{label}\n".encode(errors="surrogateescape"))
        return lines.hexdigest()

    def restricted(self, indices: Sequence[int]) -> ImageListing:
        """Returns the samples at these positions, in this order. Labels and class names do not change."""
        return replace(
            self,
            files=tuple(self.files[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices),
            offsets=None if self.offsets is None else array("q", (self.offsets[i] for i in indices)),
            sizes=() if self.offsets is None else array("q", (self.sizes[i] for i in indices)),
        )


def names_digest(names: Iterable[str]) -> str:
    """Returns the SHA-256 of the names in order, each followed by a zero byte."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


def in_sample_order(found: ImageListing, labels: Sequence[int | None]) -> ImageListing:
    """Returns the images that have a label, sorted into the order of samples. `found` may have any order; labels[i] belongs to its image i."""
    members: list[list[int]] = [[] for _ in found.class_names]
    for index, label in enumerate(labels):
        if label is not None:
            members[label].append(index)
    # torchvision's order within a class: by the folder's path, then by the file's name.
    order = [index for indices in members for index in sorted(indices, key=lambda index: found.files[index].rpartition("/")[::2])]
    labelled = replace(found, labels=tuple(-1 if label is None else label for label in labels), skipped=tuple(sorted(found.skipped)))
    return labelled.restricted(order)


def why_not_an_image(file_name: str) -> str:
    """Returns why a file of this name is not a sample, or '' if it may be one."""
    if file_name.startswith("."):
        return "hidden"  # also '._x.jpg', which macOS writes beside x.jpg: it is not an image
    if file_name.startswith(_THUMBNAILS):
        return "a thumbnail"
    if has_line_break(file_name):
        return "a line break in its name: a list of names could not hold it"
    return "" if file_name.lower().endswith(EXTENSIONS) else "not an image by its extension"


def why_not_a_folder(name: str) -> str:
    """Returns why a folder of this name is skipped with all its files, or '' if it is not."""
    if name.startswith("."):
        return "hidden"
    if name.lower() in _FOREIGN_FOLDERS:
        return "a system folder"
    return "a line break in its name" if has_line_break(name) else ""


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
