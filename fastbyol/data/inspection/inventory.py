"""Statistics of a data set, before or after conversion: counts, sides, bytes, settings, as plain values for a table or JSON."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastbyol.data.backends.source import Pixels
from fastbyol.data.formats.manifest import numbered_class_names
from fastbyol.data.formats.pillow_decoding import UndecodableImage, decode_with_pillow, image_size
from fastbyol.data.inputs.listing import ImageListing
from fastbyol.data.inspection.converted import Converted, open_converted
from fastbyol.host.store_path import at_once, place_of

SAMPLED = 2000
"""Number of images of a folder or tar whose headers are read for their sides: a million would take an hour on a network disk."""


@dataclass(frozen=True)
class Sides:
    """Statistics of the sides, in pixels, of the images whose headers were read."""

    looked_at: int
    height_min: int
    height_median: int
    height_max: int
    width_min: int
    width_median: int
    width_max: int
    mean_pixels: float
    bytes_per_pixel: float


@dataclass(frozen=True)
class Inventory:
    """Statistics of a data set."""

    path: str
    kind: str
    """'beton', 'tar shards', 'folder', 'images in tars' or 'image files' (of a list or of several folders)."""
    images: int
    classes: int
    empty_classes: int
    class_min: int
    """Smallest number of images in a class that is not empty; `class_median` and `class_max` likewise."""
    class_median: float
    class_max: int
    unlabelled: int
    """Number of images with the label -1 (unlabelled)."""
    image_bytes: int
    sides: Sides | None
    """Sides of the images; None if no image could be read."""
    skipped: int
    """Number of entries of the folder or tar that were skipped; the first ones are in `skipped_first`."""
    skipped_first: tuple[tuple[str, str], ...]
    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    manifest: dict[str, Any] | None
    """The manifest's fields settings, source, software, shards and dropped; None without a manifest."""


class ImageSet:
    """Images of any data set by index, for pictures and statistics; not fast."""

    def __init__(self, data: Path | ImageListing) -> None:
        """data: path of converted data, or the listing of other images. Raises UserError in the same cases as `open_converted`."""
        self.images, self.manifest = open_converted(data) if isinstance(data, Path) else (data, None)
        if isinstance(self.images, Converted):
            self.labels = self.images.label
            self.class_names = self.manifest.class_names if self.manifest else numbered_class_names(self.images.path, self.labels)
        else:
            self.labels = np.array(self.images.labels, dtype=np.int64)
            self.class_names = self.images.class_names

    def name(self, index: int) -> str:
        """Returns the image's name in the listing; converted data keep none."""
        return f"image {index}" if isinstance(self.images, Converted) else self.images.files[index]

    def pixels(self, index: int) -> Pixels:
        """Returns an image as (H, W, 3) RGB. Raises UndecodableImage, or OSError if it cannot be read."""
        return self.images.pixels(index) if isinstance(self.images, Converted) else decode_with_pillow(self.images.location(index).read())


def take_inventory(data: Path | ImageListing, *, shown: str) -> Inventory:
    """Returns the statistics of converted data, or of a listing. shown: the path or URL as typed.

    Raises UserError in the same cases as `open_converted`.
    """
    images = ImageSet(data)
    num, found = len(images.labels), images.images
    if isinstance(found, Converted):  # its tables have the sides of all images; of others a random sample is read
        height, width, size = found.height, found.width, found.size
        image_bytes = int(size.sum())
        kind = ("tar shards" if found.path.is_dir() else "beton") + ("" if images.manifest else " without manifest")
    else:
        chosen = range(num) if num <= SAMPLED else sorted(random.Random(0).sample(range(num), SAMPLED))
        rows = [row for row in at_once(lambda index: _height_width_bytes(found, index), chosen) if row]
        height, width, size = np.array(rows, dtype=np.int64).reshape(-1, 3).T
        image_bytes = sum(map(found.num_bytes, range(num)))
        kind = "images in tars" if found.places else "folder" if place_of(shown).is_dir() else "image files"
    sides = None
    if len(size):
        pixels = height * width
        bounds = [int(find(side)) for side in (height, width) for find in (np.min, np.median, np.max)]
        bytes_per_pixel = round(float(size.sum() / max(pixels.sum(), 1)), 4)
        sides = Sides(len(size), *bounds, mean_pixels=round(float(pixels.mean()), 1), bytes_per_pixel=bytes_per_pixel)
    counts = np.bincount(images.labels[images.labels >= 0], minlength=len(images.class_names))
    counts_of_used = counts[counts > 0] if counts.any() else np.zeros(1, dtype=np.int64)
    skipped = () if isinstance(found, Converted) else found.skipped
    fields = asdict(images.manifest) if images.manifest else {}
    return Inventory(
        path=shown,
        kind=kind,
        images=num,
        classes=len(counts),
        empty_classes=int((counts == 0).sum()),
        class_min=int(counts_of_used.min()),
        class_median=float(np.median(counts_of_used)),
        class_max=int(counts_of_used.max()),
        unlabelled=int((images.labels < 0).sum()),
        image_bytes=image_bytes,
        sides=sides,
        skipped=len(skipped),
        skipped_first=skipped[:10],
        class_names=images.class_names,
        class_counts=tuple(counts.tolist()),
        manifest={name: fields[name] for name in ("settings", "source", "software", "shards", "dropped")} if fields else None,
    )


def _height_width_bytes(listing: ImageListing, index: int) -> tuple[int, int, int] | None:
    """Returns the sides and the size of an image, or None if it cannot be read."""
    try:
        data = listing.location(index).read()
        return *image_size(data), len(data)
    except (UndecodableImage, OSError):
        return None
