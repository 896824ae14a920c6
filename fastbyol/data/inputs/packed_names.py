"""The names of many images in one block of bytes: a Python string takes 50 bytes more than its text, half a gigabyte for ten million."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

_AT_ONCE, _BYTES_AT_ONCE = 4096, 1 << 24
"""Names that are decoded or packed together, and bytes that are searched together."""
_WIDEST = 64
"""Longest part after the common beginning, in bytes, for which numpy sorts the names: it pads all names to the longest."""


class PackedNames(Sequence[str]):
    """A sequence of names that is equal to any other sequence of the same names. A name holds no zero byte, which ends each in the block.

    Bytes that are not UTF-8 are kept, as surrogateescape shows them.
    """

    __slots__ = ("_block", "_ends", "_folders")

    def __init__(self, block: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        """block: the names, a zero byte after each; ends: (N,) offset after each name's zero byte."""
        self._block, self._ends = block, ends
        self._folders: tuple[list[str], NDArray[np.int32]] | None = None

    @classmethod
    def of(cls, names: Iterable[str]) -> PackedNames:
        if isinstance(names, PackedNames):
            return names
        packer = NamePacker()
        for name in names:
            packer.append(name)
        return packer.packed()

    @classmethod
    def joined(cls, parts: Sequence[PackedNames]) -> PackedNames:
        """Returns the names of all parts, one after the other."""
        return cls.of_block(np.concatenate([np.zeros(0, dtype=np.uint8), *(part.block for part in parts)]))

    @classmethod
    def of_block(cls, block: NDArray[np.uint8]) -> PackedNames:
        """Returns the names of a block of bytes, in which a zero byte follows each."""
        ends = array("q")  # in pieces: a truth value for each byte would take as much as the names
        for first in range(0, len(block), _BYTES_AT_ONCE):
            ends.frombytes((np.flatnonzero(block[first : first + _BYTES_AT_ONCE] == 0) + first + 1).tobytes())
        return cls(block, np.frombuffer(ends, dtype=np.int64))

    @property
    def block(self) -> NDArray[np.uint8]:
        """The names' bytes, a zero byte after each."""
        return self._block

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> PackedNames: ...
    def __getitem__(self, index: int | slice) -> str | PackedNames:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"name {index} of {len(self)}")
        index %= len(self)
        start = int(self._ends[index - 1]) if index else 0
        return self._block[start : int(self._ends[index]) - 1].tobytes().decode(errors="surrogateescape")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for first in range(0, len(self), _AT_ONCE):
            end = int(self._ends[min(first + _AT_ONCE, len(self)) - 1])
            yield from self._block[start : end - 1].tobytes().decode(errors="surrogateescape").split("\0")
            start = end

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PackedNames):
            return np.array_equal(self._block, other._block)
        if isinstance(other, Sequence) and not isinstance(other, str):
            return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"PackedNames({list(self)!r})"

    def _starts(self) -> NDArray[np.int64]:
        """Returns the offset of each name, (N,)."""
        return np.concatenate([np.zeros(min(1, len(self)), dtype=np.int64), self._ends[:-1]])

    def part(self, first: int, last: int) -> PackedNames:
        """Returns the names [first, last) as a view of the same bytes."""
        start = int(self._ends[first - 1]) if first else 0
        end = int(self._ends[last - 1]) if last > first else start
        return PackedNames(self._block[start:end], self._ends[first:last] - start)

    def prefixed(self, prefix: str) -> PackedNames:
        """Returns the names with a text in front of each."""
        block, start, front = bytearray(), 0, prefix.encode(errors="surrogateescape")
        for first in range(0, len(self), _AT_ONCE):
            end = int(self._ends[min(first + _AT_ONCE, len(self)) - 1])
            block += front + self._block[start : end - 1].tobytes().replace(b"\0", b"\0" + front) + b"\0"
            start = end
        return PackedNames.of_block(np.frombuffer(block, dtype=np.uint8))

    def take(self, indices: NDArray[np.int64]) -> PackedNames:
        """Returns the names at these indices, in this order."""
        starts = self._starts()
        lengths = (self._ends - starts)[indices]
        ends = np.cumsum(lengths)
        block = np.empty(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
        for first in range(0, len(indices), _AT_ONCE):
            piece = slice(first, first + _AT_ONCE)
            length, start = lengths[piece], starts[indices[piece]]
            before = int(ends[first - 1]) if first else 0
            # A byte's place in the old block is its place in this piece plus a shift that is the same for all bytes of a name.
            shift = start - (ends[piece] - length - before)
            block[before : int(ends[piece][-1])] = self._block[np.arange(int(length.sum())) + np.repeat(shift, length)]
        return PackedNames(block, ends)

    def folders(self) -> tuple[list[str], NDArray[np.int32]]:
        """Returns the folders, sorted, and the number of each name's folder, (N,). The folder of 'a/b/1.jpg' is 'a/b', that of '1.jpg' is ''."""
        if self._folders is not None:
            return self._folders
        seen: dict[str, int] = {}
        number = np.fromiter((seen.setdefault(name.rpartition("/")[0], len(seen)) for name in self), dtype=np.int32, count=len(self))
        found = sorted(seen)
        rank = np.empty(len(seen), dtype=np.int32)
        rank[[seen[folder] for folder in found]] = np.arange(len(seen), dtype=np.int32)
        self._folders = found, rank[number]
        return self._folders

    def sorted_order(self) -> NDArray[np.int64]:
        """Returns the indices that sort the names as Python sorts strings; equal names keep their order."""
        if all(before <= after for before, after in pairwise(self)):
            return np.arange(len(self))
        order = self._sorted_by_bytes() if len(self) > _AT_ONCE else None
        if order is None:
            names = list(self)
            order = np.array(sorted(range(len(names)), key=names.__getitem__), dtype=np.int64)
        return order

    def _sorted_by_bytes(self) -> NDArray[np.int64] | None:
        """Returns the order from numpy's sort of fixed-width bytes, a quarter of the memory; None if the names are not plain or differ much."""
        if self._block.max() >= 0x80:  # with surrogates, the bytes' order is not that of the characters
            return None
        first, last = min(self), max(self)
        common = len(os.path.commonprefix([first, last]))  # noqa: RUF071 (characters are meant, not folders)
        starts = self._starts() + common
        widths = self._ends - 1 - starts
        if (width := int(widths.max())) > _WIDEST:
            return None
        table = np.zeros((len(self), max(width, 1)), dtype=np.uint8)
        for column in range(width):
            longer = np.flatnonzero(widths > column)
            table[longer, column] = self._block[starts[longer] + column]
        return np.argsort(table.view(f"S{table.shape[1]}")[:, 0], kind="stable")

    def repeated(self) -> list[int]:
        """Returns the indices of names that are equal to an earlier one, ascending."""
        hashes = np.fromiter(map(hash, self), dtype=np.int64, count=len(self))
        order = np.argsort(hashes)
        alike = np.flatnonzero(np.diff(hashes[order]) == 0)
        suspects = np.union1d(order[alike], order[alike + 1]).tolist()
        seen: set[str] = set()
        found = []
        for index in suspects:
            name = self[index]
            if name in seen:
                found.append(index)
            seen.add(name)
        return found


class NamePacker:
    """Collects names one by one in one growing block, to which some thousand are added at a time."""

    def __init__(self) -> None:
        self._block = bytearray()
        self._some: list[str] = []
        self._packed = 0

    def append(self, name: str) -> None:
        self._some.append(name)
        if len(self._some) >= _AT_ONCE:
            self._pack()

    def __len__(self) -> int:
        return self._packed + len(self._some)

    def _pack(self) -> None:
        if self._some:
            self._block += ("\0".join(self._some) + "\0").encode(errors="surrogateescape")
            self._packed += len(self._some)
            self._some = []

    def packed(self) -> PackedNames:
        """Returns the names, and forgets them. Raises ValueError if one of them holds a zero byte."""
        self._pack()
        packed, expected = PackedNames.of_block(np.frombuffer(self._block, dtype=np.uint8)), self._packed
        self._block, self._packed = bytearray(), 0
        if len(packed) != expected:
            raise ValueError("a name holds a zero byte")
        return packed


def labels_as(labels: NDArray[np.integer]) -> tuple[int, ...]:
    """Returns the labels of an array as a tuple in which equal numbers are one object: ten million of them take 80 MB instead of 400."""
    known = list(range(-1, int(labels.max()) + 1)) if len(labels) else []
    return tuple(known[label + 1] for first in range(0, len(labels), _AT_ONCE) for label in labels[first : first + _AT_ONCE].tolist())


def array_of(code: str, values: NDArray[Any]) -> array[Any]:
    """Returns a standard array of numpy's values."""
    found = array(code)
    found.frombytes(np.ascontiguousarray(values, dtype=found.typecode).tobytes())
    return found
