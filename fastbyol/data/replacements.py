"""What takes the place of damaged images: one bad file among a million must not end a training.

Only original images are replaced. In converted data damage means that the disk or a copy is at fault, so there it ends the run.
"""

from __future__ import annotations

import logging
import threading

from fastbyol.config.errors import UserError
from fastbyol.data.backends.source import DamagedImage, Indices

log = logging.getLogger("fastbyol")
_ALLOWED_SHARE, _ALWAYS_ALLOWED = 0.01, 20


def damage_allowed(num_images: int) -> int:
    """Returns how many of this number of images may be damaged before that is an error: 1 %, or 20 if that is more."""
    return max(_ALWAYS_ALLOWED, int(_ALLOWED_SHARE * num_images))


class Replacements:
    """Replaces every damaged image by the next one in the listing that decodes.

    This depends on the files alone, so ranks, threads and a resumed run agree. May be used by several threads at once.
    num_samples: number of images in the listing.
    """

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        self._damaged: set[int] = set()
        self._lock = threading.Lock()

    def replaced(self, indices: Indices) -> Indices:
        """Returns the indices (N,) without those of images known to be damaged, each of which is replaced."""
        if not self._damaged:
            return indices
        replaced = indices.copy()
        for row, index in enumerate(indices.tolist()):
            while index in self._damaged:
                index = (index + 1) % self._num_samples
            replaced[row] = index
        return replaced

    def add(self, damage: DamagedImage) -> None:
        """Takes note of a damaged image, and logs it. Raises UserError if there are more than `damage_allowed`."""
        with self._lock:
            if damage.index in self._damaged:  # another thread met it too
                return
            # The check comes first, so that an image is always left for `replaced` to find.
            if len(self._damaged) + 1 > min(damage_allowed(self._num_samples), self._num_samples - 1):
                raise UserError(
                    f"{damage.what}, nor do {len(self._damaged):,} other images of {self._num_samples:,} that were read before it; python -m "
                    "fastbyol convert names all damaged images, and leaves out up to as many as --max-dropped allows"
                ) from damage
            self._damaged.add(damage.index)
        # An error, because ranks other than 0 log nothing less, and no other rank may have met this image.
        log.error("%s; it is left out", damage.what)
