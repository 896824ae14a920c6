"""Lists the images inside a tar, which are then read in place. Nothing is unpacked, so a malicious name cannot write outside a folder.

Three layouts: ImageNet's ILSVRC2012_img_train.tar (a tar of one tar per class), a tar of class folders, and images without class folders
(ILSVRC2012_img_val.tar), whose labels come from another file.
"""

from __future__ import annotations

import posixpath
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastbyol.config.errors import UserError
from fastbyol.data.formats.tar_members import DamagedTarError, tar_members
from fastbyol.data.inputs.listing import why_not_a_folder, why_not_an_image
from fastbyol.host.progress import Progress

_MOST_LINKS = 40
"""Longest chain of links that is followed, as in Linux."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarScan:
    """Finds the images of a tar: name, offset and size of each, in the tar's order.

    Images in a class tar `n01440764.tar` are named 'n01440764/…', as if the class tar had been unpacked to a folder. Links are followed
    within the tar, with the same result as for the unpacked folder: a hard link is an image of its own; a symbolic link is one only if its
    target isn't listed.
    """

    def __init__(self, path: Path) -> None:
        self.names: list[str] = []
        self.offsets, self.sizes = array("q"), array("q")
        self.skipped: list[tuple[str, str]] = []
        self.class_tars: set[str] = set()
        """Names of the classes that have their own tar."""
        self._path = path
        self._rows: dict[str, int] = {}
        """Row in `offsets` and `sizes` of each image, by name."""
        self._others: dict[str, tuple[int, int]] = {}
        """(offset, size) of each file whose name or folder is not an image's, by name: a link may point to it."""
        self._links: dict[str, tuple[bool, str, str]] = {}
        """(is it symbolic, target as a name within the tar, target as written in the tar) of each link, by name."""

    def read(self) -> None:
        """Reads every header once. Raises UserError if the tar is truncated, damaged or compressed."""
        try:
            with (
                open(self._path, "rb", buffering=0) as file,
                Progress(f"{self._path.name}: headers", self._path.stat().st_size) as progress,
            ):
                start = file.read(8)
                if kind := next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), ""):
                    raise UserError(
                        f"{self._path}: is compressed ({kind}); images are read in place, so decompress it to a plain .tar first"
                    )
                for member in self._members(file, 0, self._path.stat().st_size, within=self._path.name):
                    progress.reach(member.offset_data)
                    name = self._safe_name(member, member.name)
                    if name.endswith(".tar") and "/" not in name and not why_not_a_folder(name):
                        self._take_class_tar(file, member, name, progress)
                    elif name:
                        self._take(member, name, top="")
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({error.strerror or error}); check the file") from error
        self._follow_links()

    def _take_class_tar(self, file: BinaryIO, class_tar: tarfile.TarInfo, name: str, progress: Progress) -> None:
        if not class_tar.isreg() or class_tar.issparse():
            self.skipped.append((name, _kind(class_tar)))
            return
        start, class_name = class_tar.offset_data, name.removesuffix(".tar")
        self.class_tars.add(class_name)
        for member in self._members(file, start, start + class_tar.size, within=name):
            progress.reach(member.offset_data)
            inner = self._safe_name(member, f"{class_name}/{member.name}")
            if inner:
                self._take(member, inner, top=f"{class_name}/")

    def _take(self, member: tarfile.TarInfo, name: str, *, top: str) -> None:
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
        if reason and not member.isdir():
            self.skipped.append((name, reason))
        return "" if reason or member.isdir() else "/".join(parts)

    def _members(self, file: BinaryIO, start: int, end: int, *, within: str) -> Iterator[tarfile.TarInfo]:
        try:
            yield from tar_members(file, start=start, end=end)
        except DamagedTarError as error:
            where = "" if within == self._path.name else f" (in {within})"
            raise UserError(f"{self._path}: is not a complete tar: {error}{where}; download or copy it again") from error


def _why_no_sample(name: str) -> str:
    """Returns why a member of this name is not a sample, or '' if it may be one."""
    parts = name.split("/")
    return next(filter(None, map(why_not_a_folder, parts)), "") or why_not_an_image(parts[-1])


def _kind(member: tarfile.TarInfo) -> str:
    return "a sparse file" if member.issparse() else "not a regular file"
