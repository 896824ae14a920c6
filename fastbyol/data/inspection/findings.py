"""The result of a verification: faults, each with its file and image, and notes on what could not be checked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

KEPT_FAULTS = 1000
"""Most faults that are kept; further ones are only counted."""


class Fault(NamedTuple):
    """A fault of a file or of one of its images."""

    file: str
    what: str
    image: int = -1
    """Index of the image; -1 if the fault is about the file."""

    def __str__(self) -> str:
        return f"{self.file}: " + (f"image {self.image}: " if self.image >= 0 else "") + self.what


@dataclass
class Findings:
    """All faults and notes of a verification, and the amount of data that was checked."""

    num_images: int = 0
    num_bytes: int = 0
    num_classes: int | None = None
    faults: list[Fault] = field(default_factory=list)
    """Faults sorted by file and image; at most KEPT_FAULTS."""
    num_faults: int = 0
    notes: list[str] = field(default_factory=list)
    """Notes on what could not be checked."""

    def add(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            self.num_faults += 1
            if self.num_faults <= KEPT_FAULTS:
                self.faults.append(fault)
