"""What a verification finds: faults, each with its file and image, and what could not be checked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

KEPT_FAULTS = 1000
"""Faults beyond are counted only."""


class Fault(NamedTuple):
    """Something that is not as it should be."""

    file: str
    image: int
    """Its number; -1: about the file."""
    what: str

    def __str__(self) -> str:
        return f"{self.file}: " + (f"image {self.image}: " if self.image >= 0 else "") + self.what


@dataclass
class Findings:
    """What was found."""

    num_images: int = 0
    num_bytes: int = 0
    num_classes: int | None = None
    faults: list[Fault] = field(default_factory=list)
    """By file, then by image; at most KEPT_FAULTS."""
    num_faults: int = 0
    notes: list[str] = field(default_factory=list)
    """What could not be checked."""

    def add(self, faults: Iterable[Fault]) -> None:
        for fault in faults:
            self.num_faults += 1
            if self.num_faults <= KEPT_FAULTS:
                self.faults.append(fault)
