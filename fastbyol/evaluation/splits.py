"""The labelled train and val images of a data folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch

from fastbyol.config.errors import UserError
from fastbyol.config.views import ViewPair
from fastbyol.data.batch import ImageBatch

log = logging.getLogger("fastbyol")
HELD_BYTES = 2**30
"""A split whose float32 images need at most this much memory is decoded once and kept."""


class ImageBatches(Protocol):
    """The part of an image loader that an evaluation needs: every image once, in index order."""

    @property
    def num_samples(self) -> int: ...

    @property
    def class_names(self) -> Sequence[str]: ...

    def __iter__(self) -> Iterator[ImageBatch]: ...

    def close(self) -> None: ...


class Split:
    """The centre-cropped images of one split; iterating it yields ImageBatch, any number of times. A small split is decoded once and kept.

    Args:
        loader: loads all images.
        size_px: side of the crops.
        held_bytes: a split that needs at most this much memory is kept.
        class_names: classes to number the labels by; images of other classes get the label -1, no label.
    """

    def __init__(
        self, loader: ImageBatches, *, size_px: int, held_bytes: int = HELD_BYTES, class_names: Sequence[str] | None = None
    ) -> None:
        self._loader = loader
        self._fits = loader.num_samples * 3 * size_px**2 * 4 <= held_bytes
        self._held: list[ImageBatch] = []
        self.num_samples = loader.num_samples
        self.class_names = tuple(loader.class_names if class_names is None else class_names)
        self._own_names = tuple(loader.class_names)

    def __iter__(self) -> Iterator[ImageBatch]:
        if not self._fits:
            return self._labelled()
        if not self._held:
            self._held = list(self._labelled())
        return iter(self._held)

    def _labelled(self) -> Iterator[ImageBatch]:
        return (batch._replace(label=renumbered(batch.label, self._own_names, self.class_names)) for batch in self._loader)

    def close(self) -> None:
        """Closes the loader; images in memory stay."""
        self._loader.close()

    def pick(self, index: torch.Tensor) -> torch.Tensor:
        """Returns the images (N, 3, S, S) at these positions of the data set, in the given order; repeats are allowed. Takes at most one
        pass.
        """
        wanted, found = set(index.tolist()), {}
        for batch in self:
            found.update((int(i), image) for i, image in zip(batch.index, batch.image, strict=True) if int(i) in wanted)
            if len(found) == len(wanted):
                break
        return torch.stack([found[int(i)] for i in index])


@dataclass(frozen=True)
class Splits:
    """The two splits of a data folder, labelled with the same classes."""

    train: Split
    val: Split

    def __post_init__(self) -> None:
        if self.train.class_names != self.val.class_names:
            differing = sorted(set(self.train.class_names) ^ set(self.val.class_names))
            raise UserError(f"train and val differ in their classes {differing[:5]}: both splits must have the same classes")

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.train.close()
        self.val.close()


def split_paths(data: str | Path) -> tuple[Path, Path]:
    """Returns DIR/train.beton and DIR/val.beton, or the folders DIR/train and DIR/val (images or tar shards); each split is looked up on
    its own.

    Raises UserError naming both expected paths if one is missing.
    """
    return _split_path(Path(data), "train"), _split_path(Path(data), "val")


def _split_path(data: Path, name: str) -> Path:
    file, folder = data / f"{name}.beton", data / name
    if file.is_file():
        return file
    if folder.is_dir():
        return folder
    raise UserError(f"--data {data}: no {name} images; expected the folder {folder} or the file {file}")


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


def open_splits(data: str | Path, *, views: ViewPair, batch: int, workers: int = 0) -> Splits:
    """Opens both splits of a data folder, centre-cropped and normalised as in the run, labelled by the classes that both have."""
    from fastbyol.data import build_image_loader

    with ExitStack() as opened:
        loaders = [
            opened.enter_context(build_image_loader(str(path), views=views, batch=batch, workers=workers)) for path in split_paths(data)
        ]
        names = common_classes(*(loader.class_names for loader in loaders))
        train, val = (Split(loader, size_px=views.size_px, class_names=names) for loader in loaders)
        opened.pop_all()
    return Splits(train=train, val=val)
