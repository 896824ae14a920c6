"""Images inside a tar, read where they lie: nothing is ever unpacked, so no name in a tar can lead out of a folder.

Three layouts: ImageNet's ILSVRC2012_img_train.tar (a tar of one tar per class), a tar of class folders, and images that lie together
(ILSVRC2012_img_val.tar), whose labels come from elsewhere.
"""

from __future__ import annotations

import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from fastbyol.config.errors import UserError
from fastbyol.data.inputs.listing import why_not_an_image
from fastbyol.data.progress import Progress
from fastbyol.data.tar_members import DamagedTarError, tar_members

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarScan:
    """The images of a tar: name, first byte and size of each, in the order of the tar. UserError for a tar that is cut, damaged or compressed.

    An image of a class tar `n01440764.tar` gets the name 'n01440764/…', as if the class tar had been unpacked to a folder.
    """

    def __init__(self, path: Path) -> None:
        self.names: list[str] = []
        self.offsets, self.sizes = array("q"), array("q")
        self.skipped: list[tuple[str, str]] = []
        self.class_tars: set[str] = set()
        """Classes that have a tar of their own."""
        self._path = path
        self._seen: set[str] = set()

    def read(self) -> None:
        """Reads every header once, from one to the next."""
        try:
            with (
                open(self._path, "rb", buffering=0) as file,
                Progress(f"{self._path.name}: headers", self._path.stat().st_size) as progress,
            ):
                self._refuse_compressed(file.read(8))
                for member in self._members(file, 0, self._path.stat().st_size, within=self._path.name):
                    progress.reach(member.offset_data)
                    name = self._safe_name(member, member.name)
                    if name.endswith(".tar") and "/" not in name:
                        self._take_class_tar(file, member, name, progress)
                    elif name:
                        self._take(member, name)
        except OSError as error:
            raise UserError(f"{self._path}: cannot be read ({error.strerror or error}); check the file") from error

    def _refuse_compressed(self, start: bytes) -> None:
        for magic, kind in _COMPRESSED.items():
            if start.startswith(magic):
                raise UserError(f"{self._path}: is compressed ({kind}); images are read in place, so decompress it to a plain .tar first")

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
                self._take(member, inner)

    def _take(self, member: tarfile.TarInfo, name: str) -> None:
        reason = "" if member.isreg() and not member.issparse() else _kind(member)
        reason = reason or ("the same name again" if name in self._seen else why_not_an_image(PurePosixPath(name).name))
        if reason:
            self.skipped.append((name, reason))
            return
        self._seen.add(name)
        self.names.append(name)
        self.offsets.append(member.offset_data)
        self.sizes.append(member.size)

    def _safe_name(self, member: tarfile.TarInfo, name: str) -> str:
        """The member's name without './'; '' for a folder, and for a name that is skipped."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        reason = "an absolute name" if member.name.startswith("/") else _why_not_a_place(parts)
        if reason and not member.isdir():
            self.skipped.append((name, reason))
        return "" if reason or member.isdir() else "/".join(parts)

    def _members(self, file: BinaryIO, start: int, end: int, *, within: str) -> Iterator[tarfile.TarInfo]:
        try:
            yield from tar_members(file, start=start, end=end)
        except DamagedTarError as error:
            where = "" if within == self._path.name else f" (in {within})"
            raise UserError(f"{self._path}: is no whole tar: {error}{where}; download or copy it again") from error


def _why_not_a_place(parts: list[str]) -> str:
    """Why nothing by a name of these parts is taken; '' if it may be."""
    if ".." in parts:
        return "a name that leads out of the tar"
    if any("\n" in part or "\r" in part for part in parts):
        return "a line break in its name"
    return "hidden" if any(part.startswith(".") for part in parts) else ""


def _kind(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return f"a link in a tar (to {member.linkname})"
    return "a sparse file" if member.issparse() else "not a regular file"
