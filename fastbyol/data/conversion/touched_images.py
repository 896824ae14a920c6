"""Notes on the images that a conversion transcoded, dropped or found unusual: a file of JSON lines, in the order of conversion.

Every image may have one (all of a set of PNGs have), so they are read one at a time and never held together.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from fastbyol.config.errors import UserError, shortened
from fastbyol.data.formats.regular_files import require_regular

OUTCOMES = ("transcoded", "dropped", "noted")


def touched_line(index: int, outcome: str, reason: str, detail: str) -> bytes:
    """Returns the line of a note on an image, given by its position in the listing."""
    return (json.dumps({"index": index, "outcome": outcome, "reason": reason, "detail": detail}) + "\n").encode()


class TouchedImages:
    """The notes of one or several files, in the listing's order. Takes 20 bytes of memory for each.

    Attributes:
        counts: {outcome: {reason: number of notes}}.
    """

    def __init__(self, files: Mapping[Path, str], *, images: int) -> None:
        """Reads all notes once, to count them and to find out their order.

        Args:
            files: path of each file, and the advice that the error for a damaged one gives.
            images: number of images in the listing.

        Raises:
            UserError: a file is missing, or a line of it is not a note on one of the images.
        """
        self._files, self._images = files, images
        self.counts: dict[str, dict[str, int]] = {outcome: {} for outcome in OUTCOMES}
        index, offset, number = array("q"), array("q"), array("i")
        for place, path in enumerate(files):
            start = 0
            for line in self._lines(path):
                note = self._parsed(path, line)
                reasons = self.counts[note["outcome"]]
                reasons[note["reason"]] = reasons.get(note["reason"], 0) + 1
                index.append(note["index"])
                offset.append(start)
                number.append(place)
                start += len(line)
        self._offset, self._number = np.frombuffer(offset, dtype=np.int64), np.frombuffer(number, dtype=np.int32)
        # Stable: the notes on one image are next to each other, and stay so.
        self._order = np.argsort(np.frombuffer(index, dtype=np.int64), kind="stable")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields each note, in the order of the images' positions, outcomes and reasons."""
        for _, notes in groupby(self._in_order(), key=lambda note: note["index"]):
            yield from sorted(notes, key=lambda note: (note["outcome"], note["reason"]))

    def _in_order(self) -> Iterator[dict[str, Any]]:
        with ExitStack() as stack:
            files = [(path, stack.enter_context(path.open("rb"))) for path in self._files]
            for row in self._order:
                path, file = files[self._number[row]]
                file.seek(int(self._offset[row]))
                yield self._parsed(path, file.readline())

    def _lines(self, path: Path) -> Iterator[bytes]:
        try:
            require_regular(path)
            with path.open("rb") as file:
                yield from file
        except FileNotFoundError:
            raise UserError(f"{path}: missing; {self._files[path]}") from None

    def _parsed(self, path: Path, line: bytes) -> dict[str, Any]:
        try:
            note = json.loads(line)
            if type(note["index"]) is not int or not 0 <= note["index"] < self._images:
                raise ValueError("a number out of range")
            if note["outcome"] not in OUTCOMES or not isinstance(note["reason"], str) or not isinstance(note["detail"], str):
                raise ValueError("an image without a reason")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path}: damaged ({shortened(error)}); {self._files[path]}") from error
        return note
