"""Finds the images inside a tar, which are then read in place. Nothing is unpacked, so a malicious name cannot write outside a folder.

Layouts: ImageNet's ILSVRC2012_img_train.tar (a tar of one tar per class), a tar of class folders, images without class folders
(ILSVRC2012_img_val.tar), and WebDataset's samples, whose members have one key: '7.jpg', '7.json', '7.txt', and in '7.cls' the label: a text,
or 8 bytes in the shards that `tar_writer` writes.
"""

from __future__ import annotations

import os
import posixpath
import struct
import tarfile
from array import array
from collections.abc import Iterator
from typing import BinaryIO

from fastbyol.config.errors import UserError
from fastbyol.data.formats.regular_files import require_regular
from fastbyol.data.formats.tar_members import DamagedTarError, tar_members
from fastbyol.data.inputs.listing import has_line_break, why_not_a_folder, why_not_an_image, why_too_long
from fastbyol.host.progress import Progress
from fastbyol.host.store_path import Place, StorePath, open_unbuffered

_MOST_LINKS = 40
"""Longest chain of links that is followed, as in Linux."""
_LABEL, _LONGEST_LABEL = ".cls", 100
"""Extension of WebDataset's member with a sample's label, and the most bytes of one that is read."""
_NUMBER = ".idx"
"""Extension of the member of our own shards with a sample's number, 8 bytes as its label. Its key is that number, by which our shards are recognised."""
_SHOWN = 200
"""Number of characters that are kept, for messages, of a name that is too long."""
_INT64 = struct.Struct("<q")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarScan:
    """Finds the images of a tar: name, offset and size of each, in the tar's order.

    Images in a class tar `n01440764.tar` are named 'n01440764/…', as if the class tar had been unpacked to a folder. Links are followed
    within the tar, with the same result as for the unpacked folder: a hard link is an image of its own; a symbolic link is one only if its
    target isn't listed.
    """

    def __init__(self, path: Place) -> None:
        self.names: list[str] = []
        self.offsets, self.sizes = array("q"), array("q")
        self.skipped: list[tuple[str, str]] = []
        self.class_tars: set[str] = set()
        """Names of the classes that have their own tar."""
        self.labels: dict[str, str] = {}
        """Label of each WebDataset sample that has one, by its key."""
        self._path = path
        self._rows: dict[str, int] = {}
        """Row in `offsets` and `sizes` of each image, by name."""
        self._others: dict[str, tuple[int, int]] = {}
        """(offset, size) of each file whose name or folder is not an image's, by name: a link may point to it."""
        self._label_members: dict[str, bytes] = {}
        """Content of each of WebDataset's members with a label, read while its header is at hand, by name."""
        self._numbered: set[str] = set()
        """Keys of the samples of our own shards: their labels are numbers of 8 bytes."""
        self._links: dict[str, tuple[bool, str, str]] = {}
        """(is it symbolic, target as a name within the tar, target as written in the tar) of each link, by name."""

    def read(self, progress: Progress) -> None:
        """Reads every header once, and adds the tar's bytes to `progress`. Raises UserError if the tar is truncated, damaged or compressed."""
        self._reached = 0
        try:
            if not isinstance(self._path, StorePath):
                require_regular(self._path)
            with open_unbuffered(self._path) as file:
                start, size = file.read(8), file.seek(0, os.SEEK_END)
                if kind := next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), ""):
                    raise UserError(
                        f"{self._path}: is compressed ({kind}); images are read in place, so decompress it to a plain .tar first"
                    )
                for member in self._members(file, 0, size, within=self._path.name):
                    self._show(member, progress)
                    name = self._safe_name(member, member.name)
                    if name.endswith(".tar") and "/" not in name and not why_not_a_folder(name):
                        self._take_class_tar(file, member, name, progress)
                    elif name:
                        self._take(file, member, name, top="")
                self._follow_links()
                self._keep_one_image_of_each_key()
                self._read_labels()
                progress.advance(size - self._reached)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({error.strerror or error}); check the file") from error

    def _show(self, member: tarfile.TarInfo, progress: Progress) -> None:
        progress.advance(member.offset_data - self._reached)
        self._reached = member.offset_data

    def _keep_one_image_of_each_key(self) -> None:
        """Skips all but one image of each WebDataset key that images and other files share, for example 'x.mask.png' beside 'x.jpg' and 'x.cls'.

        Images of all other keys are kept: 'trip.1.jpg' and 'trip.2.jpg' are two photographs, whatever else is in the tar.
        """
        keys = {_split_key(name)[0] for name in self._others}.intersection(_split_key(name)[0] for name in self.names)
        if not keys:
            return
        # Captions and the like belong to a sample: to name each as left out would take more memory than the images' names.
        self.skipped = [entry for entry in self.skipped if entry[0] not in self._others or _split_key(entry[0])[0] not in keys]
        best: dict[str, tuple[bool, int]] = {}
        for row, name in enumerate(self.names):
            key, extension = _split_key(name)
            if key in keys:
                # The one whose whole extension is an image's comes first, then the first in the tar.
                best[key] = min(best.get(key, (True, row)), ("." in extension, row))
        one_of_key = {row for _, row in best.values()}
        kept = [row for row, name in enumerate(self.names) if row in one_of_key or key_of(name) not in keys]
        self.skipped += [(self.names[row], "a further image of its key") for row in sorted(set(range(len(self.names))).difference(kept))]
        self.names = [self.names[row] for row in kept]
        self.offsets, self.sizes = (array("q", (column[row] for row in kept)) for column in (self.offsets, self.sizes))

    def _read_labels(self) -> None:
        for name, content in self._label_members.items():
            key = key_of(name)
            text = (
                str(*_INT64.unpack(content))
                if key in self._numbered and len(content) == _INT64.size
                else content.decode("utf-8", "replace").strip()
            )
            if text and text != "-1" and not has_line_break(text):  # our own shards have -1 for an image without a label
                self.labels[key] = text

    def _take_class_tar(self, file: BinaryIO, class_tar: tarfile.TarInfo, name: str, progress: Progress) -> None:
        if not class_tar.isreg() or class_tar.issparse():
            self.skipped.append((name, _kind(class_tar)))
            return
        start, class_name = class_tar.offset_data, name.removesuffix(".tar")
        self.class_tars.add(class_name)
        for member in self._members(file, start, start + class_tar.size, within=name):
            self._show(member, progress)
            inner = self._safe_name(member, f"{class_name}/{member.name}")
            if inner:
                self._take(file, member, inner, top=f"{class_name}/")

    def _take(self, file: BinaryIO, member: tarfile.TarInfo, name: str, *, top: str) -> None:
        """Adds an image or a link, or notes why it is skipped. top: prefix of the names of a class tar's members, 'n01440764/', else ''."""
        reason = _why_no_sample(name)
        if name in self._rows or name in self._links:
            self.skipped.append((name, "the same name again"))
        elif member.issym() or member.islnk():
            start = posixpath.dirname(name) if member.issym() else top
            # An absolute target stays absolute here, so it matches no name in the tar.
            target = posixpath.normpath(posixpath.join(start, member.linkname))
            self._links[name] = member.issym(), target, member.linkname
        elif not member.isreg() or member.issparse():
            self.skipped.append((name, reason or _kind(member)))
        elif reason:
            self.skipped.append((name, reason))
            self._others[name] = (member.offset_data, member.size)
            if name.lower().endswith(_LABEL) and 0 < member.size <= _LONGEST_LABEL:
                file.seek(member.offset_data)
                self._label_members[name] = file.read(member.size)
            elif name.endswith(_NUMBER) and member.size == _INT64.size:
                file.seek(member.offset_data)
                stem = name.rpartition("/")[2].removesuffix(_NUMBER)
                if stem.isdecimal() and len(stem) < 20 and file.read(member.size) == _INT64.pack(int(stem)):
                    self._numbered.add(key_of(name))
        else:
            self._add(name, (member.offset_data, member.size))

    def _add(self, name: str, place: tuple[int, int]) -> None:
        self._rows[name] = len(self.names)
        self.names.append(name)
        self.offsets.append(place[0])
        self.sizes.append(place[1])

    def _follow_links(self) -> None:
        """Adds the images that are links. Hard links come first, so that a symbolic link to one does not list its image again."""
        owner: dict[tuple[int, int], str] = {}
        for name in sorted(self._links, key=lambda name: (self._links[name][0], name)):
            target, symbolic = name, False
            for _ in range(_MOST_LINKS):
                if target in self._links:
                    symbolic, target = symbolic or self._links[target][0], self._links[target][1]
            place = self._others.get(target)
            if target in self._rows:
                place = self.offsets[self._rows[target]], self.sizes[self._rows[target]]
            if reason := _why_no_sample(name):
                self.skipped.append((name, reason))
            elif place is None:
                self.skipped.append((name, f"a link in a tar (to {self._links[name][2]})"))
            elif symbolic and (first := target if target in self._rows else owner.get(place)):
                self.skipped.append((name, f"a link to {first}, which is listed"))
            else:
                owner.setdefault(place, name)
                self._add(name, place)

    def _safe_name(self, member: tarfile.TarInfo, name: str) -> str:
        """Returns the member's name without './', or '' for a folder or an unsafe name, which is skipped."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        reason = "an absolute name" if member.name.startswith("/") else "a name that leads out of the tar" if ".." in parts else ""
        if "\0" in name:  # an extended header may say so
            name, reason = name.replace("\0", "?"), "a zero byte in its name"
        if too_long := why_too_long(name):
            name, reason = f"{name[:_SHOWN]}…", too_long
        if reason and not member.isdir():
            self.skipped.append((name, reason))
        return "" if reason or member.isdir() else "/".join(parts)

    def _members(self, file: BinaryIO, start: int, end: int, *, within: str) -> Iterator[tarfile.TarInfo]:
        try:
            yield from tar_members(file, start=start, end=end)
        except DamagedTarError as error:
            where = "" if within == self._path.name else f" (in {within})"
            raise UserError(f"{self._path}: is not a complete tar: {error}{where}; download or copy it again") from error


def _split_key(name: str) -> tuple[str, str]:
    """Returns WebDataset's key and extension of a member: everything up to the first dot of the file's name, and the rest in lower case."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def key_of(name: str) -> str:
    """Returns WebDataset's key of a member."""
    return _split_key(name)[0]


def _why_no_sample(name: str) -> str:
    """Returns why a member of this name is not a sample, or '' if it may be one."""
    parts = name.split("/")
    return next(filter(None, map(why_not_a_folder, parts)), "") or why_not_an_image(parts[-1])


def _kind(member: tarfile.TarInfo) -> str:
    return "a sparse file" if member.issparse() else "not a regular file"
