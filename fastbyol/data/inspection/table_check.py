"""Compares a conversion's manifest and tables with one another, before any image is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fastbyol.config.errors import UserError, shortened
from fastbyol.data.formats.manifest import Manifest, image_summary, is_sealed, numbered_class_names, read_manifest, refuse_other_counts
from fastbyol.data.formats.tar_shards import PARTS
from fastbyol.data.inspection.converted import Converted, converted_beton, converted_shards, is_converted, listed_positions, manifest_path
from fastbyol.data.inspection.findings import Fault, Findings
from fastbyol.data.inspection.shard_check import foreign_shard


def checked_manifest(path: Path, found: Findings) -> Manifest | None:
    """Returns the manifest, or None if there is no usable one; adds its faults to `found`. Raises UserError if there is nothing to verify."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give the output of `python -m fastbyol convert`")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: may not be read; check its permissions")
    # Shards of other tools have no manifest.
    if not (is_converted(path) or any(path.glob("*.tar"))):
        raise UserError(f"{path}: is neither a .beton nor a folder of tar shards; give the output of `python -m fastbyol convert`")
    where = manifest_path(path)
    if not where.exists():
        if any(path.glob(PARTS)):
            raise UserError(
                f"{path}: holds parts of a conversion on many machines; merge them first (python -m fastbyol convert --to dali --merge)"
            )
        found.notes.append(f"no manifest {where.name}: cannot check that the files are complete, and the names of the classes are unknown")
        return None
    try:
        manifest = read_manifest(where)
    except UserError as error:
        found.add([Fault(str(where), _without(error, where))])
        return None
    if not is_sealed(where):
        found.add([Fault(str(where), "has been edited: it is not what the conversion wrote")])
    found.num_classes = len(manifest.class_names)
    return manifest


def checked_tables(path: Path, manifest: Manifest | None, found: Findings) -> Converted | None:
    """Returns the images' locations, or None if the tables cannot be read; adds every disagreement with the manifest to `found`."""
    try:
        if path.is_file():
            images = converted_beton(path, manifest)
        elif manifest is not None:
            images = converted_shards(path, manifest)
        else:
            images = _foreign_shards(path, found)
    except UserError as error:
        found.add([Fault(str(path), _without(error, path))])
        return None
    if images.crc32 is None:
        found.notes.append("it has no checksums of its images: a changed image that still decodes cannot be detected")
    if manifest is None and path.is_file():
        try:
            numbered_class_names(path, images.label)
        except UserError as error:
            found.add([Fault(str(path), _without(error, path))])
    if manifest is not None:
        found.add(Fault(str(manifest_path(path)), what) for what in _disagreements(path, images, manifest))
    return images


def _foreign_shards(folder: Path, found: Findings) -> Converted:
    files = sorted(folder.glob("*.tar"))
    places: list[tuple[int, int, int]] = []
    for number, tar in enumerate(files):
        in_tar, faults = foreign_shard(tar)
        places += [(number, *place) for place in in_tar]
        found.add(faults)
    if not places:
        raise UserError(f"{folder}: no image in its {len(files)} tars; give a folder written by python -m fastbyol convert --to dali")
    file, offset, size = np.array(places, dtype=np.int64).T
    none, raw = np.zeros_like(file), np.zeros(len(file), dtype=np.bool_)
    return Converted(folder, tuple(files), file, offset, size, none, none, none, raw, None, np.arange(len(file)))


def _disagreements(path: Path, images: Converted, manifest: Manifest) -> Iterator[str]:
    """Yields every statement of the manifest that the tables or files contradict."""
    if manifest.kind != (kind := "beton" if path.is_file() else "tar"):
        yield f"describes data of the kind {shortened(manifest.kind)!r}, but this is a {kind}"
    if manifest.num_samples != len(images.label):
        yield f"says {manifest.num_samples} images, there are {len(images.label)}"
    else:
        try:
            listed_positions(manifest)
        except UserError as error:
            yield str(error)
    try:
        refuse_other_counts(path, images.label, manifest)
    except UserError as error:
        yield str(error)
    samples = np.bincount(images.file, minlength=len(images.files)).tolist()
    for shard, count in zip(manifest.shards, samples, strict=False):
        if shard.samples != count:
            yield f"says {shard.samples} images in {shard.name}, the sample table has {count}"
    measured = image_summary(images.height, images.width, images.size)
    for name in measured.keys() & manifest.images.keys():
        if manifest.images[name] != measured[name]:
            yield f"says {name} = {shortened(manifest.images[name])}, the images have {measured[name]}"


def _without(error: UserError, path: Path) -> str:
    """Returns the error's message without the path at its start."""
    return str(error).removeprefix(f"{path}: ")
