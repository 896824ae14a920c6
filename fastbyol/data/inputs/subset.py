"""Subsets of a listing: class-balanced with a seed, or from a file of names such as SimCLR's 1 % and 10 % lists.

The choice depends only on the seed and the names: images and classes are ranked by the hash of seed and name, without a random generator. So
it is the same on every machine, a larger subset with the same seed contains the smaller one, and train and val choose the same classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastbyol.config.errors import UserError, require
from fastbyol.data.inputs.listing import LONGEST_SHOWN, ImageListing
from fastbyol.data.inputs.name_matching import AMBIGUOUS, MISSING, NameIndex, lines_of, read_text
from fastbyol.host.durable_files import write_durably

_SHOWN = 3
"""Names that a message shows."""


def list_digest(path: Path) -> str:
    """Returns a short digest of a list's content, by which results of different lists are told apart."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def draw_fraction(listing: ImageListing, fraction: float, *, seed: int) -> ImageListing:
    """Returns a class-balanced fraction of the images: equal numbers per class, to within one, or the whole class if it has fewer.

    There is at least one image per class; images without a label are drawn as one more class. SimCLR's list of 1 % of ImageNet has 12,811 images;
    this has 12,812: 12 or 13 of each class.
    """
    require(0 < fraction <= 1, "fraction", fraction, "a share in (0, 1]")
    classes = len(set(listing.labels))
    return draw_images(listing, max(round(fraction * len(listing.files)), classes), seed=seed)


def draw_images(listing: ImageListing, num_images: int, *, seed: int) -> ImageListing:
    """Returns `num_images` images, class-balanced as in `draw_fraction`. If there are more classes than that, some have no image."""
    require(1 <= num_images <= len(listing.files), "images", num_images, f"from 1 to {len(listing.files):,}, which is how many there are")
    members: dict[int, list[int]] = {}
    for index, label in enumerate(listing.labels):
        members.setdefault(label, []).append(index)
    order = sorted(members, key=lambda label: _rank(seed, listing.class_names[label] if label >= 0 else ""))
    takes = balanced_counts([len(members[label]) for label in order], num_images)
    chosen: list[int] = []
    for label, take in zip(order, takes, strict=True):
        # By the file's name alone: a copy of the data with other folders in front gives the same choice.
        chosen += sorted(members[label], key=lambda index: _rank(seed, listing.files[index].rpartition("/")[2]))[:take]
    return listing.restricted(sorted(chosen))


def balanced_counts(available: Sequence[int], total: int) -> list[int]:
    """Returns how many of the `total` to take of each class: equal numbers, to within one, or all `available` if there are fewer.

    Earlier classes get the remainder.
    """
    counts = [0] * len(available)
    level = 0
    while (left := total - sum(counts)) > 0:
        open_places = [place for place, count in enumerate(available) if count > level]
        step = max(1, min(left // len(open_places), min(available[place] for place in open_places) - level))
        for place in open_places if left >= len(open_places) else open_places[:left]:
            counts[place] += step
        level += step
    return counts


def choose_classes(listing: ImageListing, wanted: int | Sequence[str], *, seed: int) -> ImageListing:
    """Returns all images of the wanted classes, given as a number, to be chosen with the seed, or as names. Labels do not change."""
    names = listing.class_names
    if isinstance(wanted, int):
        require(1 <= wanted <= len(names), "classes", wanted, f"from 1 to {len(names):,}, or class names")
        chosen = set(sorted(names, key=lambda name: _rank(seed, name))[:wanted])
    else:
        chosen = set(wanted)
        if unknown := sorted(chosen - set(names)):
            raise UserError(f"classes: {listing.root} has no class {', '.join(unknown[:_SHOWN])}; it has {', '.join(names[:_SHOWN])} …")
    kept = [label for label, name in enumerate(names) if name in chosen]
    return listing.restricted(np.flatnonzero(np.isin(listing.labels, kept)).tolist())


def restrict(listing: ImageListing, names: Iterable[str], *, source: Path) -> ImageListing:
    """Returns the images with these names, in the listing's order. Raises UserError, citing `source`, if a name matches no image or several."""
    index = NameIndex(listing.files, listing.root)
    places = {name: index.find(name) for name in names}
    problems = []
    for fault, what in ((MISSING, f"are not images of {listing.root}"), (AMBIGUOUS, "could each be several of its images")):
        if found := [name for name, place in places.items() if place == fault]:
            shown = ", ".join(name[:LONGEST_SHOWN] for name in found[:_SHOWN]) + " …" * (len(found) > _SHOWN)
            problems.append(f"{len(found):,} of its {len(places):,} names {what}: {shown}")
    if problems:
        raise UserError(
            f"{source}: {'; '.join(problems)} (the first image is {listing.files[0]}); correct the list, or give the data it belongs to"
        )
    chosen = sorted(set(places.values()))
    note = f"{source}: {len(places):,} names of {len(chosen):,} images, of the {len(listing.files):,} in {listing.root}"
    return replace(listing.restricted(chosen), notes=(*listing.notes, note))


def drop_empty_classes(listing: ImageListing) -> ImageListing:
    """Returns the same images without the empty classes; the other classes are renumbered in their order."""
    used = sorted(set(listing.labels) - {-1})
    label_of = {-1: -1} | {old: new for new, old in enumerate(used)}
    class_names = tuple(listing.class_names[label] for label in used)
    return replace(listing, class_names=class_names, labels=tuple(label_of[label] for label in listing.labels))


def read_subset(path: Path) -> list[str]:
    """Returns the names in a file, one per line. Raises UserError if it is empty or unreadable."""
    names = [line for line in lines_of(read_text(path)) if line.strip()]
    if not names:
        raise UserError(f"{path}: names no image; give a file with one name per line")
    return names


def write_subset(path: Path, listing: ImageListing) -> None:
    """Writes the names of the images, one per line, in the listing's order. An error leaves the file as it was."""
    write_durably(path, "".join(f"{name}\n" for name in listing.files))


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode(errors="surrogateescape")).digest()
