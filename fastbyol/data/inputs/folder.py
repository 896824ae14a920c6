"""Lists image files in a folder: one sub-folder per class, as torchvision.datasets.ImageFolder does, or any tree, without labels.

It walks the folder itself because torch takes seconds to import, because os.walk follows a loop of links until the path is too long, and
because skipped files should be reported. A test compares it with torchvision's listing.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastbyol.config.errors import UserError
from fastbyol.data.inputs.listing import (
    EXTENSIONS,
    LEFT_OUT,
    ImageListing,
    has_line_break,
    in_sample_order,
    left_out_text,
    why_not_a_folder,
    why_not_an_image,
    why_too_long,
)
from fastbyol.data.inputs.packed_names import NamePacker, PackedNames
from fastbyol.data.inputs.splits import refuse_splits
from fastbyol.data.inputs.store_folder import scan_store
from fastbyol.host.store_path import Place, StorePath

Identity = tuple[int, int]
"""(device, inode): equal for two names of the same file or folder."""


def list_image_folder(root: Place, *, splits: str = "refuse") -> ImageListing:
    """Returns the images below `root`, with classes and files in torchvision's order.

    Skips, and lists in `skipped`: files without an image's extension, hidden files and folders and those of the system, thumbnails, images
    outside class folders, entries that are not files, broken links, folders that cannot be read, links to files or folders that are already
    listed (also a loop of links), names with a line break.

    Args:
        root: the folder of class folders.
        splits: 'refuse' raises an error for folders such as train/ and val/; 'classes' accepts them as classes.

    Raises:
        UserError: the folder is missing or empty, a class has no images, or the folders are splits.
    """
    class_names = _class_names(root)
    if splits == "refuse":
        refuse_splits(root, class_names, ())  # before the walk, which takes minutes for a large folder
    found = scan_folder(root)
    if splits == "refuse":
        refuse_splits(root, class_names, found.files)
    return by_class_folder(replace(found, class_names=class_names))


def list_folder(root: Place, *, labels: str = "auto", splits: str = "refuse") -> ImageListing:
    """Returns the images below `root`, in order.

    Args:
        root: any folder of images.
        labels: 'folders' as `list_image_folder`; 'none' takes every image of the tree, without labels; 'auto' takes the sub-folders as
            classes if at least two of them have images and these are most of the images, else no labels.
        splits: as for `list_image_folder`.
    """
    if labels == "folders":
        return list_image_folder(root, splits=splits)
    class_names = _class_names(root, required=False)
    if splits == "refuse":
        refuse_splits(root, class_names, ())
    found = scan_folder(root)
    if not found.files:
        told = left_out_text(sorted(found.skipped))
        raise UserError(
            f"{root}: no image found" + (f"; instead: {told}" if told else "; it is empty") + f" (looked for {' '.join(EXTENSIONS)})"
        )
    if splits == "refuse":
        refuse_splits(root, class_names, found.files)
    with_images = {folder.partition("/")[0] for folder in found.names.folders()[0] if folder}
    if labels == "none" or len(with_images) < 2 or most_in_no_folder(found.names):
        notes = () if labels == "none" else (*found.notes, why_no_labels(found, with_images))
        return without_labels(replace(found, notes=notes))
    return by_class_folder(replace(found, class_names=class_names))


def most_in_no_folder(names: PackedNames) -> bool:
    """Returns True if more than half of the images are in no folder: then the folders are not their classes."""
    folders, number = names.folders()
    return "" in folders and int((number == folders.index("")).sum()) > len(names) // 2


def why_no_labels(found: ImageListing, with_images: set[str]) -> str:
    """Returns the note on images whose folders were not taken as classes."""
    if len(with_images) == 1 and not any("/" not in name for name in found.files):
        (only,) = with_images
        folders = {name.split("/", 2)[1] if name.count("/") > 1 else "" for name in found.files}
        inside = (
            f", with {len(folders):,} folders in it; if they are the classes, give {found.root}/{only}"
            if "" not in folders and len(folders) > 1
            else ""
        )
        return f"{found.root}: no labels: all images are in one folder, {only!r}{inside}"
    where = "most of its images are in no folder" if with_images else "its images are in no folders"
    return f"{found.root}: no labels: {where} that could be classes; --labels FILE gives labels"


def without_labels(found: ImageListing) -> ImageListing:
    """Returns the images in order, all with the label -1."""
    return in_sample_order(replace(found, class_names=()), np.full(len(found.files), -1, dtype=np.int32))


def by_class_folder(found: ImageListing) -> ImageListing:
    """Returns the images in order, labelled by the first folder of their names. Raises UserError for a class without images."""
    label_of = {name: label for label, name in enumerate(found.class_names)}
    folders, number = found.names.folders()
    outside = tuple((name, "in no class folder") for name in found.files if "/" not in name) if "" in folders else ()
    found = replace(found, skipped=found.skipped + outside)
    if empty := sorted(label_of.keys() - {folder.partition("/")[0] for folder in folders}):
        told = next((f"; skipped {name}: {reason}" for name, reason in sorted(found.skipped) if name.split("/")[0] == empty[0]), "")
        looked_for = f"looked for {' '.join(EXTENSIONS)}"
        raise UserError(
            f"{found.root / empty[0]}: no image in this class folder ({looked_for}{told}); fill or remove it, or give --labels none"
        )
    label_of_folder = np.array([label_of.get(folder.partition("/")[0], LEFT_OUT) if folder else LEFT_OUT for folder in folders])
    return in_sample_order(found, label_of_folder.astype(np.int32)[number])


def _class_names(root: Place, *, required: bool = True) -> tuple[str, ...]:
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give a folder with one sub-folder of images per class")
    try:
        folders = (
            root.children()[1] if isinstance(root, StorePath) else sorted(entry.name for entry in os.scandir(root) if is_folder(entry))
        )
    except OSError as error:
        raise UserError(f"{root}: cannot be read ({error.strerror}); check its permissions") from error
    # Folders with a line break in the name are kept here, so that the check below raises an error for them.
    names = [name for name in folders if has_line_break(name) or not why_not_a_folder(name)]
    if not names and required:
        raise UserError(f"{root}: has no sub-folders, which --labels folders takes as classes; give --labels none, or a file of labels")
    for name in names:
        if has_line_break(name):
            raise UserError(f"{str(root / name)!r}: a class name may not hold a line break; rename the folder")
    return tuple(names)


def scan_folder(root: Place) -> ImageListing:
    """Finds all images below `root`, in no particular order; the listing has no labels yet."""
    if isinstance(root, StorePath):
        return scan_store(root)
    scan = _FolderScan(root)
    scan.walk()
    scan.drop_links_to_listed_files()
    return ImageListing(root, (), scan.names, (), tuple(scan.skipped))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Returns True for a folder and for a link to one. `entry.is_dir` alone raises an error for a link that points to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


class _FolderScan:
    """Walks a folder and visits every sub-folder once: real folders before links to folders, so that the real path of an image is listed."""

    def __init__(self, root: Path) -> None:
        self.names: Sequence[str] = ()
        self.skipped: list[tuple[str, str]] = []
        self._root = root
        self._found = NamePacker()
        self._visited: dict[Identity, str] = {}
        self._linked_folders: list[str] = []
        self._linked_files: dict[str, Identity] = {}
        # Device and inode of each name in turn, to find links to it. os.scandir returns the inode with each entry, without a system call per file.
        self._identities = array("Q")

    def walk(self) -> None:
        tops = [""]
        while tops:
            for top in tops:
                pending = [top]
                while pending:
                    pending += self._visit(pending.pop())
            # Sorted, so that the same one of several links is listed on every machine; a linked folder may hold further links.
            tops, self._linked_folders = sorted(self._linked_folders), []
        self.names = self._found.packed()

    def _visit(self, folder: str) -> list[str]:
        """Adds the folder's files; returns its real sub-folders."""
        try:
            status = os.stat(self._root / folder)
            entries = os.scandir(self._root / folder)
        except OSError as error:
            if "/" not in folder:  # a class folder: without it the whole class would be missing
                raise UserError(f"{self._root / folder}: cannot be read ({error.strerror}); check its permissions") from error
            self.skipped.append((folder, f"cannot be read ({error.strerror})"))
            return []
        first = self._visited.setdefault((status.st_dev, status.st_ino), folder)
        if first != folder:
            self.skipped.append((folder, f"the same folder as {first or self._root}"))
            return []
        # One by one: the entries of a folder of ten million files would take gigabytes.
        try:
            with entries:
                return list(self._take(folder, entries, status.st_dev))
        except OSError as error:
            raise UserError(f"{self._root / folder}: cannot be read to its end ({error.strerror}); check the disk") from error

    def _take(self, folder: str, entries: Iterable[os.DirEntry[str]], device: int) -> Iterator[str]:
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                if reason := why_not_a_folder(entry.name) or why_too_long(f"{name}/"):
                    self.skipped.append((name, reason))
                else:
                    yield name
            elif entry.is_symlink():
                self._take_link(name, entry)
            elif reason := why_not_an_image(entry.name) or ("" if entry.is_file(follow_symlinks=False) else "not a regular file"):
                self.skipped.append((name, reason))
            else:
                self._add(name, (device, entry.inode()))

    def _take_link(self, name: str, entry: os.DirEntry[str]) -> None:
        try:
            target = entry.stat()
        except OSError as error:  # the target is missing, or ELOOP: the link points to itself
            self.skipped.append((name, f"a broken link ({error.strerror})"))
            return
        folder = entry.is_dir()
        if reason := why_not_a_folder(entry.name) if folder else why_not_an_image(entry.name):
            self.skipped.append((name, reason))
        elif folder:
            self._linked_folders.append(name)
        elif not entry.is_file():
            self.skipped.append((name, "not a regular file"))
        else:
            self._linked_files[name] = target.st_dev, target.st_ino
            self._add(name, self._linked_files[name])

    def _add(self, name: str, identity: Identity) -> None:
        self._found.append(name)
        self._identities.extend(identity)

    def drop_links_to_listed_files(self) -> None:
        """Drops links to a listed file, and of several links to one file all but the first.

        Hard links are kept: a tool that saves disk space turns ImageNet's exact duplicates into these."""
        if not self._linked_files:
            return
        targets, owner = set(self._linked_files.values()), dict[Identity, str]()
        rows = zip(self.names, zip(self._identities[::2], self._identities[1::2], strict=True), strict=True)
        for name, identity in sorted(rows, key=lambda row: (row[0] in self._linked_files, row[0])):
            if identity in targets:
                owner.setdefault(identity, name)
        repeated = {name: owner[identity] for name, identity in self._linked_files.items() if owner[identity] != name}
        self.names = PackedNames.of(name for name in self.names if name not in repeated)
        self.skipped += [(name, f"a link to {first}, which is listed") for name, first in repeated.items()]
