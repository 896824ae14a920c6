"""The images of an evaluation: the train and val images of a data folder with their classes, or one set of images without labels."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from fastbyol.config.errors import UserError
from fastbyol.config.urls import is_url
from fastbyol.config.views import ViewPair
from fastbyol.data.batch import ImageBatch
from fastbyol.data.inputs.name_matching import NameIndex
from fastbyol.data.inputs.sources import is_original
from fastbyol.data.inputs.subset import read_subset
from fastbyol.host.store_path import Place, place_of

log = logging.getLogger("fastbyol")
HELD_BYTES = 2**30
"""A split whose float32 images need at most this much memory is decoded once and kept."""


class ImageBatches(Protocol):
    """The part of an image loader that an evaluation needs."""

    @property
    def num_samples(self) -> int: ...

    @property
    def class_names(self) -> Sequence[str]: ...

    def batches_of(self, index: NDArray[np.int64]) -> Iterator[ImageBatch]: ...

    def decodable(self, index: NDArray[np.int64]) -> NDArray[np.int64]: ...

    def image_names(self) -> list[str]: ...

    def fingerprint(self) -> dict[str, str]: ...

    def close(self) -> None: ...


class Split:
    """The centre-cropped images of one split, numbered from 0; iterating it yields ImageBatch, any number of times. A small split is decoded
    once and kept.

    Args:
        loader: loads the images.
        size_px: side of the crops.
        held_bytes: a split that needs at most this much memory is kept.
        class_names: classes to number the labels by; images of other classes get the label -1, no label.
        positions: which of the loader's images, ascending; None: all.
        source: where the loader reads them, for another loader of the same images.
    """

    def __init__(
        self,
        loader: ImageBatches,
        *,
        size_px: int,
        held_bytes: int = HELD_BYTES,
        class_names: Sequence[str] | None = None,
        positions: NDArray[np.int64] | None = None,
        source: str = "",
    ) -> None:
        self._loader = loader
        self.positions = np.arange(loader.num_samples) if positions is None else positions
        self.num_samples = len(self.positions)
        self.num_available = loader.num_samples
        self._fits = self.num_samples * 3 * size_px**2 * 4 <= held_bytes
        self._held: list[ImageBatch] = []
        self.class_names = tuple(loader.class_names if class_names is None else class_names)
        self._own_names = tuple(loader.class_names)
        self.source = source

    def leave_out_damaged(self) -> int:
        """Takes the images that do not decode off the split, see `decodable`. Decodes all of them; returns how many are left out."""
        before, self._held = self.num_samples, []
        self.positions = self._loader.decodable(self.positions)
        self.num_samples = len(self.positions)
        return before - self.num_samples

    def fingerprint(self) -> dict[str, str]:
        """Returns what identifies all images of the loader, see `Source.fingerprint`."""
        return self._loader.fingerprint()

    def __iter__(self) -> Iterator[ImageBatch]:
        if not self._fits:
            return self._batches_of(torch.arange(self.num_samples))
        if not self._held:
            self._held = list(self._batches_of(torch.arange(self.num_samples)))
        return iter(self._held)

    def _batches_of(self, rows: torch.Tensor) -> Iterator[ImageBatch]:
        first = 0
        for batch in self._loader.batches_of(self.positions[rows.numpy()]):
            own = rows[first : first + len(batch.index)]
            if batch.index.tolist() != self.positions[own.numpy()].tolist():
                raise RuntimeError("an image loader must yield the images that it was asked for, in that order")
            yield batch._replace(label=renumbered(batch.label, self._own_names, self.class_names), index=own)
            first += len(own)

    def close(self) -> None:
        """Closes the loader; images in memory stay."""
        self._loader.close()

    def pick(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns these images (N, 3, S, S), by their numbers in the split, in the given order; repeats are allowed."""
        wanted, found = rows.unique(), {}
        for batch in self if self._fits else self._batches_of(wanted):
            kept = torch.isin(batch.index, wanted)
            found.update(zip(batch.index[kept].tolist(), batch.image[kept], strict=True))
            if len(found) == len(wanted):
                break
        return torch.stack([found[row] for row in rows.tolist()])

    @cached_property
    def _names(self) -> list[str]:
        return self._loader.image_names()

    def name(self, row: int) -> str:
        """Returns the name of an image by its number in the split."""
        return self._names[int(self.positions[row])]


@dataclass(frozen=True)
class Splits:
    """The two splits of a data folder, labelled with the same classes; or, as `train` alone, the images of data that has no splits.

    unscored: why no accuracy can be measured on them; empty if it can.
    """

    train: Split
    val: Split | None
    unscored: str = ""

    def __post_init__(self) -> None:
        if self.val is not None and self.train.class_names != self.val.class_names:
            differing = sorted(set(self.train.class_names) ^ set(self.val.class_names))
            raise UserError(f"train and val differ in their classes {differing[:5]}: both splits must have the same classes")

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names

    @property
    def num_samples(self) -> int:
        return self.train.num_samples + (self.val.num_samples if self.val else 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.train.close()
        if self.val:
            self.val.close()


def split_paths(data: str | Path) -> tuple[str, str]:
    """Returns DIR/train.beton and DIR/val.beton, or the folders DIR/train and DIR/val (images or tar shards); each split is looked up on its
    own. The second one is empty if there is no val; data that has neither is the first one itself.

    Raises UserError naming both expected paths if there is val alone.
    """
    if is_url(data) and is_original(str(data)):
        return str(data), ""  # one file, or several sources: there is nothing below it to look for
    found = {name: next((str(path) for path in _split_candidates(data, name) if path.exists()), "") for name in ("train", "val")}
    if found["val"] and not found["train"]:
        raise UserError(f"--data {data}: {_missing(data, 'train')}")
    return found["train"] or str(data), found["val"]


def _split_candidates(data: str | Path, name: str) -> tuple[Place, Place]:
    folder = place_of(str(data))
    return folder / f"{name}.beton", folder / name


def _missing(data: str | Path, name: str) -> str:
    file, folder = _split_candidates(data, name)
    return f"no {name} images; expected the folder {folder} or the file {file}"


def renumbered(label: torch.Tensor, own: Sequence[str], wanted: Sequence[str]) -> torch.Tensor:
    """Returns labels (N,) that number the classes `own` as numbers of the classes `wanted`: -1 for a class that is not among them, and for
    an image without a label.
    """
    number = {name: i for i, name in enumerate(wanted)}
    # The extra -1 at the end is what label -1 (none) reads.
    return torch.tensor([*(number.get(name, -1) for name in own), -1])[label.clamp(min=-1)]


def common_classes(train: Sequence[str], val: Sequence[str], *, names: tuple[str, str] = ("train", "val")) -> tuple[str, ...]:
    """Returns the classes that both splits have, in train's order, and warns about the others. names: of the splits. Raises UserError if
    there are none.
    """
    common = tuple(name for name in train if name in set(val))
    if not common:
        differing = sorted(set(train) ^ set(val))
        raise UserError(
            f"{names[1]}: its classes differ from {names[0]}'s in {differing[:5]}, none is in both; both need the same class folders"
        )
    for split, classes in zip(names, (train, val), strict=True):
        if left_out := sorted(set(classes) - set(common)):
            some = ", ".join(map(repr, left_out[:5])) + (", ..." if len(left_out) > 5 else "")
            log.warning("%d classes are in %s only, their images are left out of the figures: %s", len(left_out), split, some)
    return common


def open_splits(
    data: str | Path,
    *,
    views: ViewPair,
    batch: int,
    workers: int = 0,
    subset: str | Path | None = None,
    at_most: int | None = None,
    scored: bool = True,
) -> Splits:
    """Opens the images of a data folder, centre-cropped and normalised as in the run, labelled by the classes that train and val both have.

    Args:
        data: a folder that holds train and val, or any images that a loader reads.
        views: size, interpolation and normalisation are used.
        batch: images per forward.
        workers: decoding threads; 0: one for each core of the process's share.
        subset: file with the names of the train images to use, one a line; val stays whole.
        at_most: where no accuracy is measured, a random choice of so many images is used, the same in every call; None: all.
        scored: False: no accuracy is wanted, so val is not opened.
    """
    from fastbyol.data import build_image_loader

    paths = split_paths(data) if scored else (split_paths(data)[0], "")
    with ExitStack() as opened:
        loaders = [
            opened.enter_context(build_image_loader(path, views=views, batch=batch, workers=workers, option="--data"))
            for path in paths
            if path
        ]
        train = loaders[0]
        positions = np.arange(train.num_samples)
        if subset is not None:
            positions = named_positions(Path(subset), train.image_names(), source=paths[0])
        if len(loaders) == 2:
            unscored = why_unscored(_counts(train.class_names, train.labels[positions]), loaders[1].class_counts())
        elif (train.labels < 0).all():
            unscored = "its images have no labels"
        else:
            unscored = _missing(data, "val") if paths[0] != str(data) else "it has no train and val"
        if unscored and at_most is not None and len(positions) > at_most:
            positions = np.sort(np.random.default_rng(0).choice(positions, size=at_most, replace=False))
        if unscored:
            names = tuple(dict.fromkeys(name for loader in loaders for name in loader.class_names))
        else:
            names = common_classes(*(loader.class_names for loader in loaders))
        splits = [
            Split(loader, size_px=views.size_px, class_names=names, positions=rows, source=path)
            for loader, rows, path in zip(loaders, (positions, None), paths, strict=False)
        ]
        opened.pop_all()
    return Splits(train=splits[0], val=splits[1] if len(splits) == 2 else None, unscored=unscored)


def _counts(names: Sequence[str], labels: NDArray[np.int64]) -> dict[str, int]:
    return dict(zip(names, np.bincount(labels[labels >= 0], minlength=len(names)).tolist(), strict=False))


def why_unscored(train: Mapping[str, int], val: Mapping[str, int]) -> str:
    """Returns why no accuracy can be measured, given the number of images of each class; empty if two classes have images in both."""
    labelled = [{name for name, count in counts.items() if count} for counts in (train, val)]
    for name, classes in zip(("train", "val"), labelled, strict=True):
        if not classes:
            return f"{name} has no labels"
        if len(classes) == 1:
            return f"all labelled images of {name} are of one class, {classes.pop()!r}"
    common = labelled[0] & labelled[1]
    if not common:
        return f"no class is in both train and val, such as {sorted(labelled[0] ^ labelled[1])[:5]}"
    return "" if len(common) > 1 else f"only the class {common.pop()!r} is in both train and val"


def named_positions(subset: Path, names: Sequence[str], *, source: str) -> NDArray[np.int64]:
    """Returns the positions, ascending, of the images that the list names. Raises UserError if a name matches no image or several."""
    index = NameIndex(names, place_of(source))
    wanted = read_subset(subset)
    places = [index.find(name) for name in wanted]
    if wrong := [name for name, place in zip(wanted, places, strict=True) if place < 0]:
        raise UserError(
            f"--subset {subset}: {len(wrong):,} of its {len(wanted):,} names are not those of one image of {source}: {wrong[0]} (its first "
            f"image is {names[0]}); correct the list, or evaluate the folder that it was made from (a .beton keeps no names)"
        )
    return np.unique(np.array(places, dtype=np.int64))
