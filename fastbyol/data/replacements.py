"""Replaces damaged images by others, so that one bad file among a million does not end a training.

Only original images are replaced. In converted data damage means that the disk or a copy is at fault, so there it ends the run.
"""

from __future__ import annotations

import logging
import math
import threading
from itertools import count

from fastbyol.config.errors import UserError
from fastbyol.data.backends.source import DamagedImage, Indices
from fastbyol.host.quantities import count_text

log = logging.getLogger("fastbyol")
_ALLOWED_SHARE, _ALWAYS_ALLOWED = 0.01, 20
LOGGED = 20
"""Number of damaged images that a process names."""
TOO_MANY = "python -m fastbyol convert lists all damaged images, and --max-dropped sets how many it may leave out"
"""Way out where more images are damaged than may be."""


def damage_allowed(num_images: int) -> int:
    """Returns how many of this number of images may be damaged before that is an error: 1 %, or 20 if that is more."""
    return max(_ALWAYS_ALLOWED, int(_ALLOWED_SHARE * num_images))


class Replacements:
    """Replaces every damaged image by another one that decodes.

    Which one depends on the files alone, so ranks, threads and a resumed run agree. May be used by several threads at once.
    num_samples: number of images in the listing.
    """

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples
        # Far from its neighbours, which are often damaged too. Coprime to the number of images, so that all of them are reached.
        self._step = next(step for step in count(max(1, int(0.618 * num_samples))) if math.gcd(step, num_samples) == 1)
        self._damaged: set[int] = set()
        self._lock = threading.Lock()

    def replace(self, indices: Indices) -> None:
        """Replaces, in place, each of the indices (N,) that is known to be damaged."""
        if not self._damaged:
            return
        for row, index in enumerate(indices.tolist()):
            while index in self._damaged:
                index = (index + self._step) % self._num_samples
            indices[row] = index

    def add(self, damage: DamagedImage) -> None:
        """Takes note of a damaged image; the first are logged. Raises UserError if there are more than `damage_allowed`."""
        with self._lock:
            if damage.index in self._damaged:  # another thread met it too
                return
            # Both checks come first, so that an image is always left for `replace` to find.
            damaged, allowed = len(self._damaged) + 1, damage_allowed(self._num_samples)
            if damaged == self._num_samples:
                raise UserError(f"{damage.what}; none of {count_text(damaged, 'image')} decodes") from damage
            if damaged > allowed:
                others = f"and {damaged - 1:,} other images of {self._num_samples:,} don't either, where {allowed:,} may"
                raise UserError(f"{damage.what}, {others}; {TOO_MANY}") from damage
            self._damaged.add(damage.index)
        # An error, because ranks other than 0 log nothing less, and no other rank may have met this image.
        if damaged <= LOGGED:
            log.error("%s; it is left out%s", damage.what, "; further damaged images are not named" if damaged == LOGGED else "")
