"""Looks at a sample of a data set's images: sides, grey or colour, near-duplicates. Decodes them, so it costs milliseconds an image."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from fastbyol.config.errors import UserError
from fastbyol.data.formats.pillow_decoding import UndecodableImage
from fastbyol.data.inputs.images import NO_OPTION, list_images
from fastbyol.data.inspection.converted import converted_at
from fastbyol.data.inspection.inventory import ImageSet
from fastbyol.data.replacements import TOO_MANY, damage_allowed
from fastbyol.host.cores import default_workers
from fastbyol.host.quantities import count_text, names_text

SAMPLED = 1000
"""Most images that are decoded: photographs of 12 megapixels take a minute on two cores."""
GREY_LEVELS = 4.0
"""An image is grey if its channels differ by less than this, of 255, on average: JPEG adds one or two."""
GREY_SHARE = 0.95
ALIKE_BITS, ALIKE_LEVELS = 4, 4.0
"""Near-duplicates differ in at most so many of 72 bits of their hashes, and by less than so many levels on average: empty backgrounds share
hashes.
"""
_THUMBNAIL_PX = 9


class Look(NamedTuple):
    """One image: its shorter side in pixels, whether it is grey, and (9, 9, 3) pixels of it."""

    side: int
    grey: bool
    thumbnail: np.ndarray


@dataclass(frozen=True)
class Sample:
    """A data set as its sample shows it. Shares are of the images that were decoded."""

    images: int
    """Number of images of the whole set."""
    class_names: tuple[str, ...]
    looked_at: int
    unreadable: tuple[str, ...]
    """Names of the images that do not decode."""
    short_side: int
    """Median of the shorter sides, in pixels."""
    grey: float
    """Share of images without colour."""
    near_duplicates: float
    """Share of images that look like an earlier one of the sample."""

    @property
    def is_grey(self) -> bool:
        return self.grey >= GREY_SHARE


def look_at(data: str, *, option: str = "--data", seed: int = 0) -> Sample:
    """Returns what a random sample of the images shows. Raises UserError if there are no images, or none of the sample can be read."""
    path = converted_at(data)
    images = ImageSet(path or list_images(data, option=option, label_option=NO_OPTION))
    num = len(images.labels)
    chosen = range(num) if num <= SAMPLED else sorted(random.Random(seed).sample(range(num), SAMPLED))
    with ThreadPoolExecutor(default_workers()) as pool:
        found = list(zip(chosen, pool.map(lambda index: _look(images, index), chosen), strict=True))
    looks, unreadable = [look for _, look in found if look is not None], [images.name(index) for index, look in found if look is None]
    if not looks:
        raise UserError(f"{option} {data}: none of {count_text(len(chosen), 'image')} decodes: {names_text(unreadable)}")
    if path is not None and unreadable:
        raise UserError(f"{option} {data}: {names_text(unreadable)} does not decode; python -m fastbyol verify {data} names every fault")
    if len(unreadable) > damage_allowed(len(chosen)):
        raise UserError(
            f"{option} {data}: {len(unreadable):,} of {len(chosen):,} images that were looked at do not decode ({names_text(unreadable)}), too "
            f"many for a training; {TOO_MANY}"
        )
    return Sample(
        images=num,
        class_names=tuple(images.class_names) if (images.labels >= 0).any() else (),
        looked_at=len(looks),
        unreadable=tuple(unreadable),
        short_side=round(median(look.side for look in looks)),
        grey=sum(look.grey for look in looks) / len(looks),
        near_duplicates=sum(near_duplicates([look.thumbnail for look in looks])) / len(looks),
    )


def _look(images: ImageSet, index: int) -> Look | None:
    """Returns None for an image that does not decode. Raises UserError for a file that cannot be read."""
    try:
        pixels = images.pixels(index)
    except UndecodableImage:
        return None
    except OSError as error:
        raise UserError(
            f"{images.name(index)}: cannot be read ({error.strerror or error}); put it back, or take it out of the data"
        ) from error
    small = Image.fromarray(pixels).resize((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.BOX)
    colour = Image.fromarray(pixels).resize((64, 64), Image.Resampling.BOX)
    spread = np.ptp(np.asarray(colour, dtype=np.float32), axis=2).mean()
    return Look(min(pixels.shape[:2]), bool(spread < GREY_LEVELS), np.asarray(small, dtype=np.float32))


def near_duplicates(thumbnails: list[np.ndarray]) -> list[bool]:
    """Returns for each thumbnail (9, 9, 3) whether an earlier one looks the same.

    Two look the same if their difference hashes, whether each pixel is brighter than its right neighbour (N. Krawetz, 2013), differ in few
    bits, and their pixels hardly. Found: other sizes and qualities of one image. Not found: crops and mirror images.
    """
    pixels = torch.from_numpy(np.stack(thumbnails))
    grey = pixels.mean(dim=3).round()
    bits = (grey[:, :, 1:] > grey[:, :, :-1]).flatten(1).float()
    flat = pixels.flatten(1)
    alike = (torch.cdist(bits, bits, p=0) <= ALIKE_BITS) & (torch.cdist(flat, flat, p=1) / flat.shape[1] < ALIKE_LEVELS)
    return alike.tril(-1).any(dim=1).tolist()
