"""Which images a data set has, in which order, with which labels, and where the bytes of each lie: what every reader of images starts from.

One order for all kinds of input: by class, then as torchvision.datasets.ImageFolder orders the files of a class. So a folder and the tar it
came from give the same samples under the same numbers. Worker processes import this module: it needs the standard library only.
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
"""What torchvision takes for an image, in any case of letters."""
_FOREIGN_FOLDERS = frozenset(
    ("lost+found", "@eadir", "__macosx", "$recycle.bin", "recycler", "system volume information", "#recycle", "#snapshot", "@recycle",
     "@recently-snapshot", "@__thumb", "network trash folder", "temporary items", "__pycache__")
)  # fmt: skip
"""What file systems, Synology, QNAP, macOS, Windows and Python keep beside people's files, in lower case."""
_THUMBNAILS = ("SYNOFILE_THUMB", "SYNOPHOTO_THUMB")


@dataclass(frozen=True, slots=True)
class ImageLocation:
    """Where one image's bytes lie: a file, or a part of one. Small, for worker processes."""

    name: str
    """Relative, '/'-separated, unique in its listing. Only ever shown: nothing is opened or written by this name."""
    path: Path
    offset: int = 0
    size: int | None = None
    """Bytes; None: the whole file."""

    def read(self) -> bytes:
        """The image's bytes. Raises OSError if they cannot be read or are not all there."""
        with open(self.path, "rb", buffering=0) as file:
            if self.size is None:
                return file.readall()
            data = os.pread(file.fileno(), self.size, self.offset)
        if len(data) != self.size:
            raise OSError(f"{self.path} has {len(data)} of {self.size} bytes at offset {self.offset}: it was cut or replaced")
        return data


@dataclass(frozen=True)
class ImageListing:
    """Sample i is file i. About 120 bytes per image in memory."""

    root: Path
    """The folder, or the tar."""
    class_names: tuple[str, ...]
    """In label order."""
    files: tuple[str, ...]
    """Names relative to the root, '/'-separated, unique, without line breaks. Bytes that are not UTF-8 are kept by surrogateescape."""
    labels: tuple[int, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    """(name, reason) of what lies at the root but is no sample."""
    offsets: Sequence[int] | None = field(default=None, repr=False)
    """In a tar, the first byte of each image; None: each image is a file of its own."""
    sizes: Sequence[int] = field(default=(), repr=False)
    """In a tar, the bytes of each image."""
    notes: tuple[str, ...] = ()
    """What was understood of the input that the user should see before work starts."""

    def location(self, index: int) -> ImageLocation:
        name = self.files[index]
        if self.offsets is None:
            return ImageLocation(name, self.root / name)
        return ImageLocation(name, self.root, self.offsets[index], self.sizes[index])

    def path(self, index: int) -> Path:
        """The file that holds the image."""
        return self.root / self.files[index] if self.offsets is None else self.root

    def num_bytes(self, index: int) -> int:
        """Size of the image's file. UserError if the file has gone."""
        if self.offsets is not None:
            return self.sizes[index]
        path = self.root / self.files[index]
        try:
            return path.stat().st_size
        except OSError as error:
            raise UserError(f"{path}: was listed a moment ago and is gone ({error.strerror}); is the folder being changed?") from error

    def digest(self) -> str:
        """sha256 over every image's name, size and label, in order: tells whether two listings hold the same files."""
        lines = hashlib.sha256()
        for index, (name, label) in enumerate(zip(self.files, self.labels, strict=True)):
            lines.update(f"{name}\0{self.num_bytes(index)}\0{label}\n".encode(errors="surrogateescape"))
        return lines.hexdigest()

    def restricted(self, indices: Sequence[int]) -> ImageListing:
        """The samples at these positions, in this order. Labels and class names stay: they mean the same in both."""
        return replace(
            self,
            files=tuple(self.files[i] for i in indices),
            labels=tuple(self.labels[i] for i in indices),
            offsets=None if self.offsets is None else array("q", (self.offsets[i] for i in indices)),
            sizes=() if self.offsets is None else array("q", (self.sizes[i] for i in indices)),
        )


def names_digest(names: Iterable[str]) -> str:
    """sha256 of the names in order, each ended by a zero byte."""
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


def in_sample_order(found: ImageListing, labels: Sequence[int | None]) -> ImageListing:
    """The listing of images that were found in any order, by their labels; those without one are left out."""
    members: list[list[int]] = [[] for _ in found.class_names]
    for index, label in enumerate(labels):
        if label is not None:
            members[label].append(index)
    order = [index for indices in members for index in sorted(indices, key=lambda i: _torchvision_order(found.files[i]))]
    labelled = replace(found, labels=tuple(-1 if label is None else label for label in labels), skipped=tuple(sorted(found.skipped)))
    return labelled.restricted(order)


def _torchvision_order(name: str) -> tuple[str, str]:
    """Within a class: folders by path, then the files of each by name."""
    folder, _, file = name.rpartition("/")
    return folder, file


def why_not_an_image(file_name: str) -> str:
    """Why a file of this name is no sample; '' if it may be one."""
    if file_name.startswith("."):
        return "hidden"  # '._x.jpg', which macOS writes beside x.jpg, is no image
    if file_name.startswith(_THUMBNAILS):
        return "a thumbnail"
    if "\n" in file_name or "\r" in file_name:
        return "a line break in its name: it could stand in no list of names"
    return "" if file_name.lower().endswith(EXTENSIONS) else "not an image by its extension"


def why_not_a_folder(name: str) -> str:
    """Why nothing within a folder of this name is a sample; '' if it may be."""
    if name.startswith("."):
        return "hidden"
    if name.lower() in _FOREIGN_FOLDERS:
        return "a folder of the system's"
    return "a line break in its name" if "\n" in name or "\r" in name else ""


def left_out(skipped: Iterable[tuple[str, str]]) -> dict[str, tuple[int, str]]:
    """How many entries were left out for which kind of reason, and the first of each, most frequent first."""
    found: dict[str, tuple[int, str]] = {}
    for name, reason in skipped:
        kind = re.split(r" \(| to |: | as ", reason)[0]
        count, first = found.get(kind, (0, name))
        found[kind] = count + 1, first
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def left_out_text(skipped: Iterable[tuple[str, str]]) -> str:
    """'3 in no class folder (the first: 'x.jpg'), 1 hidden (the first: '.git')'; '' where nothing is left out."""
    return ", ".join(f"{count:,} {kind} (the first: {first!r})" for kind, (count, first) in left_out(skipped).items())
