"""Compares a tar shard with its DALI index and the sample table: every member, label and sample number."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from tarfile import BLOCKSIZE, TarInfo

import numpy as np

from fastbyol.data.formats.regular_files import require_regular
from fastbyol.data.formats.tar_members import DamagedTarError, tar_members
from fastbyol.data.formats.tar_shards import INDEX_VERSION, index_path
from fastbyol.data.inputs.listing import EXTENSIONS
from fastbyol.data.inspection.converted import Converted
from fastbyol.data.inspection.findings import Fault

COMPONENTS = ("jpg", "cls", "idx")


def shard_faults(tar: Path, *, images: Converted, number: int) -> list[Fault]:
    """Returns the disagreements between a tar, its DALI index and the sample table. number: position of the tar in `images.files`."""
    expected = {f"{images.listed[index]:08d}": index for index in np.flatnonzero(images.file == number).tolist()}
    rows: list[str] = []
    faults: list[Fault] = []
    unknown: list[str] = []
    try:
        with open(tar, "rb", buffering=0) as file:
            for stem, members in _samples(tar_members(file)):
                rows.append(_index_row(members))
                index = expected.pop(stem, None)
                if index is None:
                    unknown.append(members[0].name)
                else:
                    faults += [Fault(str(tar), what, index) for what in _sample_faults(file.fileno(), index, members, images)]
        rest = [Fault(str(tar), f"{stem}.jpg is not in the tar", index) for stem, index in expected.items()]
        rest += [Fault(str(tar), what) for what in _index_faults(index_path(tar), rows)]
    except DamagedTarError as error:
        # The last image of this file whose members begin at or before the damage.
        in_front = np.flatnonzero((images.file == number) & (images.offset - BLOCKSIZE <= error.at))
        image = int(in_front[np.argmax(images.offset[in_front])]) if len(in_front) else -1
        rest = [Fault(str(tar), f"the tar is damaged within this image's components ({error})", image)]
    except OSError as error:
        return [Fault(str(tar), f"cannot be read ({error.strerror})")]
    if unknown:
        faults.append(Fault(str(tar), f"holds {len(unknown):,} images that the sample table does not know here, the first {unknown[0]}"))
    return faults + rest


def foreign_shard(tar: Path) -> tuple[list[tuple[int, int]], list[Fault]]:
    """Returns (offset, size) of every image in a tar that we did not write, and the faults of the tar and of its index, if there is one."""
    places: list[tuple[int, int]] = []
    rows: list[str] = []
    try:
        with open(tar, "rb", buffering=0) as file:
            for _, members in _samples(tar_members(file)):
                rows.append(_index_row(members))
                places += [(member.offset_data, member.size) for member in members if member.name.lower().endswith(EXTENSIONS)]
    except (DamagedTarError, OSError) as error:
        return places, [Fault(str(tar), f"damaged tar ({error})")]
    return places, [Fault(str(tar), what) for what in _index_faults(index_path(tar), rows)] if index_path(tar).exists() else []


def _samples(members: Iterator[TarInfo]) -> Iterator[tuple[str, list[TarInfo]]]:
    """Yields (stem, members) of each sample: consecutive files with the same stem, as WebDataset groups them."""
    for stem, group in groupby((member for member in members if member.isreg()), key=_stem):
        yield stem, list(group)


def _stem(member: TarInfo) -> str:
    """Returns the name up to the first dot after the folder; WebDataset takes the rest as the component's name."""
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _index_row(members: list[TarInfo]) -> str:
    return " ".join(f"{member.name[len(_stem(member)) + 1 :]} {member.offset_data} {member.size} {member.name}" for member in members)


def _sample_faults(descriptor: int, index: int, members: list[TarInfo], images: Converted) -> Iterator[str]:
    found = {member.name.partition(".")[2]: member for member in members}
    if tuple(found) != COMPONENTS:
        yield f"has the components {' '.join(found)}, should have {' '.join(COMPONENTS)}"
        return
    place, told = (found["jpg"].offset_data, found["jpg"].size), (int(images.offset[index]), int(images.size[index]))
    if place != told:
        yield f"lies at byte {place[0]:,} with {place[1]:,} bytes, the sample table says {told[0]:,} and {told[1]:,}"
    for component, wanted in (("cls", int(images.label[index])), ("idx", int(images.listed[index]))):
        member = found[component]
        # pread, because `tar_members` is in the middle of the same file.
        value = int.from_bytes(os.pread(descriptor, 8, member.offset_data), "little", signed=True)
        if member.size != 8 or value != wanted:
            yield f"its component .{component} says {value} in {member.size} bytes, should say {wanted}"


def _index_faults(path: Path, rows: list[str]) -> Iterator[str]:
    try:
        require_regular(path)
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        yield f"its index {path.name} cannot be read ({error.strerror})"
        return
    wanted = [line.encode(errors="surrogateescape") for line in (f"{INDEX_VERSION} {len(rows)}", *rows, "")]
    differing = [number for number, (line, want) in enumerate(zip(lines, wanted, strict=False), start=1) if line != want]
    for number in differing:
        sample = f" ({wanted[number - 1].decode(errors='replace').rsplit(' ', 1)[-1]})" if 1 < number <= len(rows) + 1 else ""
        yield f"its index {path.name} disagrees with it in line {number}{sample}"
    if not differing and len(lines) != len(wanted):
        yield f"its index {path.name} has {len(lines) - 1} lines, should have {len(wanted) - 1}"
