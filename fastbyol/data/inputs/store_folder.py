"""Lists images at URLs: those below a folder of an object store or of a web server, and the sizes that a listing does not tell."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from fastbyol.config.errors import UserError
from fastbyol.data.inputs.listing import ImageListing, why_not_a_folder, why_not_an_image
from fastbyol.host.progress import Progress
from fastbyol.host.store_path import StorePath, at_once
from fastbyol.host.stores import Absent


def scan_store(root: StorePath) -> ImageListing:
    """Finds all images below a folder at a URL, with their sizes, in no particular order; the listing has no labels yet.

    What is skipped, and why, is as in a folder of this machine. A store has no links.
    """
    names, sizes = list[str](), array("q")
    skipped: dict[str, str] = {}
    for name, size in root.walk():
        folders = name.split("/")[:-1]
        outside = next((place for place, folder in enumerate(folders) if why_not_a_folder(folder)), None)
        if outside is not None:
            skipped["/".join(folders[: outside + 1])] = why_not_a_folder(folders[outside])
        elif reason := why_not_an_image(name.rpartition("/")[2]):
            skipped[name] = reason
        else:
            names.append(name)
            sizes.append(size)
    unknown = [index for index, size in enumerate(sizes) if size < 0]
    for index, size in zip(unknown, sizes_of([root / names[index] for index in unknown], what=str(root)), strict=True):
        if size < 0:
            raise UserError(f"{root / names[index]}: was listed a moment ago and is gone; is the folder being changed?")
        sizes[index] = size
    return ImageListing(root, (), tuple(names), (), tuple(skipped.items()), sizes=sizes)


def sizes_of(places: Sequence[StorePath], *, what: str) -> list[int]:
    """Returns the size of each file, asking for many at a time; -1 for one that is not there. what: their list or folder, for the progress."""
    sizes = list[int]()
    if places:
        with Progress(f"{what}: sizes", len(places), unit="images") as progress:
            for size in at_once(_size_of, places):
                sizes.append(size)
                progress.advance()
    return sizes


def _size_of(place: StorePath) -> int:
    try:
        return place.stat().size
    except Absent:
        return -1
