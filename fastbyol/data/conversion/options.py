"""Options of both converters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fastbyol.config.errors import require, require_at_least, require_choice
from fastbyol.data.conversion.encode import EncodeSettings, find_turbojpeg
from fastbyol.data.conversion.work_folder import UNFINISHED

DROPPED_ALLOWED, DROPPED_SHARE_ALLOWED = 20, 0.01


@dataclass(frozen=True)
class ConversionOptions:
    """Options of a conversion. Only `encode` affects the bytes of the result."""

    encode: EncodeSettings = field(default_factory=EncodeSettings)
    strict: bool = False
    """Stop at the first image that cannot be kept."""
    max_dropped: float | None = None
    """Largest share of images that may be dropped. 1 allows any, even whole classes; None allows 1 %, or 20 images if that is more."""
    unfinished: str = "continue"
    """Treatment of an unfinished conversion to the same output: 'continue' it if there is one, 'require' one, or 'restart' without it."""
    flush_every_s: float = 10.0
    """Seconds between two saved points; a crash loses at most this much work."""

    def __post_init__(self) -> None:
        if self.max_dropped is not None:
            require(0.0 <= self.max_dropped <= 1.0, "max-dropped", self.max_dropped, "a share in [0, 1]")
        require_choice("unfinished", self.unfinished, UNFINISHED)
        require_at_least("flush-every", self.flush_every_s, 0.0)

    def dropped_allowed(self, images: int) -> int:
        """Returns how many of this number of images may be dropped."""
        if self.max_dropped is None:
            return max(DROPPED_ALLOWED, int(DROPPED_SHARE_ALLOWED * images))
        return math.floor(self.max_dropped * images + 1e-6)


def encode_settings_as_plain(settings: EncodeSettings) -> dict[str, int | str | float]:
    """Returns the settings as plain values for the manifest; optional ones only if they are used."""
    plain: dict[str, int | str | float] = {
        "transcode_quality": settings.quality,
        "exif": settings.exif,
        "max_pixels": settings.max_pixels,
        "checked_by": "TurboJPEG" if find_turbojpeg() else "Pillow",
    }
    if settings.max_side_px is not None:
        plain["max_side_px"] = settings.max_side_px
    if settings.raw_fraction:
        plain["raw_fraction"] = settings.raw_fraction
    return plain
