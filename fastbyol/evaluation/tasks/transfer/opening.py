"""Opens the transfer sets: torchvision's classes say which images belong to a split and what is in them, our loader decodes the images.

Nothing is downloaded unless asked for. A folder of the user's own, and the sets that torchvision does not know or cannot fetch any more, have
one of two layouts:

    DIR/train/CLASS/*  DIR/val/CLASS/*  [DIR/test/CLASS/*]    without test, val is the test and the validation images come from train
    DIR/images/CLASS/*  DIR/test.txt  [DIR/valid.txt]         split files: an image's name a line, all others are for training
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastbyol.config.errors import UserError, first_line
from fastbyol.data.backends.folder_source import FolderSource
from fastbyol.data.backends.source import Indices, Pixels, Source
from fastbyol.data.inputs.folder import list_image_folder
from fastbyol.data.inputs.listing import ImageListing
from fastbyol.data.inputs.name_matching import NameIndex, lines_of, read_text
from fastbyol.data.inputs.subset import read_subset
from fastbyol.evaluation.linear import held_out_mask
from fastbyol.evaluation.tasks.transfer.sets import CALTECH_TRAIN, TransferSet, missing_text
from fastbyol.evaluation.tasks.transfer.split import OWN_SHARE, held_out_count, hold_out, hold_out_of_each
from fastbyol.ranks.process_group import gather_everywhere

DOWNLOAD_TIMEOUT_S = 30.0
Computed = TypeVar("Computed")
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class SetRefused(UserError):
    """A set cannot be evaluated, and every rank knows it: all leave it out and go on to the next one."""


def on_every_rank(compute: Callable[[], Computed]) -> Computed:
    """Returns what this rank computes; every rank calls it. Raises SetRefused on all of them where one raises a UserError.

    A rank that cannot read an image must not leave the others waiting.
    """
    found: list[Computed] = []
    error: UserError | None = None
    try:
        found.append(compute())
    except UserError as raised:
        error = raised
    for failed in gather_everywhere(error):
        if failed is not None:
            raise SetRefused(str(failed)) from failed
    return found[0]


@dataclass(frozen=True)
class TransferImages:
    """An opened set.

    metric: of `metrics.METRICS`. labels: (num_images,) int64 class of each image; for VOC2007 (num_images, 20) int8: 1 in the image, -1
    not, 0 difficult objects only. train, valid, test: rows of the images, each at least one. open_source: a new decoder of all of them.
    state: digest of the set's files (`data_state`).
    """

    name: str
    metric: str
    class_names: tuple[str, ...]
    labels: NDArray[Any]
    train: Indices
    valid: Indices
    test: Indices
    open_source: Callable[[], Source] = field(repr=False)
    notes: tuple[str, ...] = ()
    state: str = ""

    @property
    def key(self) -> str:
        """The name under which parts of unfinished work on this set are kept; it changes with the set's files."""
        return f"{self.name} {self.state}"

    def __post_init__(self) -> None:
        for split in ("train", "valid", "test"):
            if not len(getattr(self, split)):
                raise UserError(f"{self.name}: has no {split} images")
        learnt = self.labels[self.train]
        counts = (learnt == 1).sum(0) if learnt.ndim == 2 else np.bincount(learnt, minlength=len(self.class_names))
        if (empty := np.flatnonzero(counts == 0)).size:
            raise UserError(f"{self.name}: class {self.class_names[empty[0]]!r} has no training image ({empty.size} such classes)")

    @property
    def sizes(self) -> dict[str, int]:
        return {"train": len(self.train), "valid": len(self.valid), "test": len(self.test)}


def open_set(one: TransferSet | Path, root: Path, *, download: bool, seed: int) -> TransferImages:
    """Opens a set of the paper below the root, or a folder of the user's own. seed: for splits of which only the sizes are known.

    Raises UserError if it is not there or incomplete.
    """
    if isinstance(one, Path):
        return open_folder(one, name=_own_name(one), metric="top1", seed=seed)
    place = one.place(root)
    if place is None and not (download and one.downloads):
        raise UserError(missing_text(one, root))
    if place == root / one.name or one.name == "birdsnap":
        return open_folder(root / one.name, name=one.name, metric=one.metric, seed=seed, paper=one)
    before = socket.getdefaulttimeout()
    # torchvision downloads without a timeout: behind a firewall that drops packets it would wait for ever.
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        found = _OPENERS[one.name](root, download)
    except UserError:
        raise
    except Exception as error:  # torchvision's readers raise many kinds: RuntimeError, OSError, KeyError, zlib.error, ValueError ...
        raise UserError(f"{one.name}: cannot be opened ({first_line(error)}); expected {one.layout} in {root}") from error
    finally:
        socket.setdefaulttimeout(before)
    return _with_splits(one, found, seed=seed)


# ---- folders


def open_folder(path: Path, *, name: str, metric: str, seed: int, paper: TransferSet | None = None) -> TransferImages:
    """Opens a folder in one of the two layouts (see above). paper: the set that it is, whose sizes it should have."""
    if (path / "train").is_dir():
        return _open_split_folders(path, name=name, metric=metric, seed=seed, paper=paper)
    if (path / "images").is_dir():
        return _open_split_files(path, name=name, metric=metric, seed=seed, paper=paper)
    converted = ", of original images: a .beton keeps none" if (path / "train.beton").is_file() else ""
    raise UserError(f"{path}: has neither train and val nor images and test.txt{converted}")


def _open_split_folders(path: Path, *, name: str, metric: str, seed: int, paper: TransferSet | None) -> TransferImages:
    places = {split: path / split for split in ("train", "val", "test") if (path / split).is_dir()}
    if len(places) == 1:
        raise UserError(f"{path}: has train, and neither val nor test; expected {path / 'val'} beside it")
    found = {split: list_image_folder(place) for split, place in places.items()}
    names = found["train"].class_names
    for split, listing in found.items():
        if differing := sorted(set(listing.class_names) ^ set(names)):
            raise UserError(f"{path}: {split} and train differ in their classes {differing[:3]}; both need the same class folders")
    files = tuple(f"{split}/{file}" for split, listing in found.items() for file in listing.files)
    labels = np.concatenate([np.array(listing.labels, dtype=np.int64) for listing in found.values()])
    ends = np.cumsum([len(listing.files) for listing in found.values()])
    rows = {split: np.arange(end - len(found[split].files), end) for split, end in zip(found, ends.tolist(), strict=True)}
    listing = ImageListing(path, names, files, tuple(labels.tolist()))
    if len(rows) == 3:
        return _of_listing(listing, labels, rows["train"], rows["val"], rows["test"], name=name, metric=metric, paper=paper)
    train, valid = _held_out(rows["train"], labels, names, paper=paper, seed=seed)
    return _of_listing(listing, labels, train, valid, rows["test" if "test" in rows else "val"], name=name, metric=metric, paper=paper)


def _open_split_files(path: Path, *, name: str, metric: str, seed: int, paper: TransferSet | None) -> TransferImages:
    listing = list_image_folder(path / "images")
    labels = np.array(listing.labels, dtype=np.int64)
    test = _named_rows(path / "test.txt", listing)
    rest = np.setdiff1d(np.arange(len(labels)), test)
    if (path / "valid.txt").is_file():
        valid = _named_rows(path / "valid.txt", listing)
        if both := np.intersect1d(valid, test).tolist():
            raise UserError(f"{path / 'valid.txt'}: {listing.files[both[0]]} is a test image too ({len(both)} such images)")
        train = np.setdiff1d(rest, valid)
    else:
        train, valid = _held_out(rest, labels, listing.class_names, paper=paper, seed=seed)
    return _of_listing(listing, labels, train, valid, test, name=name, metric=metric, paper=paper)


def _named_rows(file: Path, listing: ImageListing) -> Indices:
    """Returns the rows of the images that a split file names. Raises UserError for a name that is not that of one image."""
    names = NameIndex(listing.files, listing.root)
    wanted = read_subset(file)
    rows = [names.find(one) for one in wanted]
    if wrong := [one for one, row in zip(wanted, rows, strict=True) if row < 0]:
        raise UserError(f"{file}: {len(wrong):,} of its {len(wanted):,} names are not those of one image of {listing.root}: {wrong[0]}")
    return np.unique(np.array(rows, dtype=np.int64))


def _held_out(
    rows: Indices, labels: NDArray[np.int64], class_names: Sequence[str], *, paper: TransferSet | None, seed: int
) -> tuple[Indices, Indices]:
    if paper is None:
        mask = held_out_mask(labels[rows], share=OWN_SHARE, seed=seed)
        return rows[~mask], rows[mask]
    if isinstance(paper.held_out, int):
        return hold_out_of_each(rows, labels, paper.held_out, class_names=class_names, seed=seed)
    return hold_out(rows, held_out_count(paper.sizes, len(rows)), seed=seed)


def _of_listing(
    listing: ImageListing,
    labels: NDArray[Any],
    train: Indices,
    valid: Indices,
    test: Indices,
    *,
    name: str,
    metric: str,
    paper: TransferSet | None,
) -> TransferImages:
    notes = () if paper is None else _size_notes(paper, len(listing.class_names), (len(train), len(valid), len(test)))
    return TransferImages(name, metric, listing.class_names, labels, train, valid, test, lambda: FolderSource(listing), notes)


def _size_notes(paper: TransferSet, classes: int, sizes: tuple[int, int, int]) -> tuple[str, ...]:
    if (classes, sizes) == (paper.classes, paper.sizes):
        return ()
    theirs, ours = (", ".join(f"{size:,}" for size in numbers) for numbers in ((paper.classes, *paper.sizes), (classes, *sizes)))
    return (f"{paper.name}: its classes, training, validation and test images are {ours}; in the paper {theirs}",)


def _own_name(path: Path) -> str:
    return path.resolve().name or str(path)


# ---- torchvision


@dataclass(frozen=True)
class _Found:
    """What torchvision knows of a set: images of every split one after the other, and how many each split has (0 validation images: not
    split yet).
    """

    listing: ImageListing
    labels: NDArray[Any]
    train: int
    valid: int
    arrays: NDArray[np.uint8] | None = None
    """The pixels themselves (N, H, W, 3), where images are no files."""


def _with_splits(one: TransferSet, found: _Found, *, seed: int) -> TransferImages:
    first, second = found.train, found.train + found.valid
    rows = np.arange(len(found.labels))
    train, valid, test = rows[:first], rows[first:second], rows[second:]
    if one.name == "caltech101":
        test, rest = hold_out_of_each(rows, found.labels, CALTECH_TRAIN, class_names=found.listing.class_names, seed=seed)
        train, valid = _held_out(rest, found.labels, found.listing.class_names, paper=one, seed=seed + 1)
    elif one.held_out != "official":
        train, valid = _held_out(train, found.labels, found.listing.class_names, paper=one, seed=seed)
    if found.arrays is None:
        return _of_listing(found.listing, found.labels, train, valid, test, name=one.name, metric=one.metric, paper=one)
    pixels, names = found.arrays, found.listing.class_names
    notes = _size_notes(one, len(names), (len(train), len(valid), len(test)))

    def source() -> Source:
        return ArraySource(pixels, labels=found.labels, class_names=names)

    return TransferImages(one.name, one.metric, names, found.labels, train, valid, test, source, notes)


class ArraySource(Source):
    """Decoded images of one size in memory (N, H, W, 3) as a source: the CIFAR sets are pickled arrays, not image files."""

    def __init__(self, pixels: NDArray[np.uint8], *, labels: Indices, class_names: tuple[str, ...]) -> None:
        super().__init__(labels=labels, class_names=class_names)
        self._pixels = pixels

    def sizes(self, indices: Indices) -> tuple[Indices, Indices]:
        height, width = (np.full(len(indices), side, dtype=np.int64) for side in self._pixels.shape[1:3])
        return height, width

    def decode(self, indices: Indices) -> Iterator[Pixels]:
        return (self._pixels[index] for index in indices.tolist())

    def sample_name(self, index: int) -> str:
        return f"image {index} of the array"


def _joined(root: Path, class_names: Sequence[str], *splits: tuple[Sequence[str | Path], Sequence[int]], valid: bool = False) -> _Found:
    """Returns the splits (paths, labels), in the order train, [valid,] test, as one listing below the root."""
    files = tuple(os.path.relpath(path, root) for paths, _ in splits for path in paths)
    labels = np.array([label for _, labels in splits for label in labels], dtype=np.int64)
    if len(labels) and not (labels.min() >= 0 and labels.max() < len(class_names)):
        raise UserError(f"{root}: a label is {labels.min()} or {labels.max()}, and there are {len(class_names)} classes; unpack it again")
    if outside := next((file for file in files if file.startswith("..")), ""):
        raise UserError(f"{root}: its list names {outside}, outside of it; unpack it again")
    listing = ImageListing(root, tuple(class_names), files, tuple(labels.tolist()))
    return _Found(listing, labels, len(splits[0][1]), len(splits[1][1]) if valid else 0)


def _food101(root: Path, download: bool) -> _Found:
    from torchvision.datasets import Food101

    splits = [Food101(root, split, download=download) for split in ("train", "test")]
    return _joined(root / "food-101", splits[0].classes, *((split._image_files, split._labels) for split in splits))


def _cifar(kind: str) -> Callable[[Path, bool], _Found]:
    def opened(root: Path, download: bool) -> _Found:
        from torchvision import datasets

        # torchvision compares the files' digests with the published ones before it unpickles them, which could run code.
        train, test = (getattr(datasets, kind)(root, train, download=download) for train in (True, False))
        pixels = np.concatenate([train.data, test.data])
        labels = np.array([*train.targets, *test.targets], dtype=np.int64)
        listing = ImageListing(root, tuple(train.classes), (), ())
        return _Found(listing, labels, len(train.targets), 0, arrays=np.ascontiguousarray(pixels))

    return opened


def _sun397(root: Path, download: bool) -> _Found:
    from torchvision.datasets import SUN397

    whole, folder = SUN397(root, download=download), root / "SUN397"
    label_of = {os.path.relpath(path, folder): label for path, label in zip(whole._image_files, whole._labels, strict=True)}
    splits = []
    for file in (folder / "Training_01.txt", folder / "Testing_01.txt"):
        if not file.is_file():
            raise UserError(f"sun397: no {file}; the paper uses the authors' first split: unpack their Partitions.zip there")
        names = [line.strip().lstrip("/") for line in lines_of(read_text(file)) if line.strip()]
        if unknown := [name for name in names if name not in label_of]:
            raise UserError(f"{file}: {len(unknown):,} of its {len(names):,} images are not in {folder}: {unknown[0]}")
        splits.append(([folder / name for name in names], [label_of[name] for name in names]))
    return _joined(folder, whole.classes, *splits)


def _cars(root: Path, download: bool) -> _Found:
    from torchvision.datasets import StanfordCars

    splits = [StanfordCars(root, split) for split in ("train", "test")]
    files = [([path for path, _ in split._samples], [int(label) for _, label in split._samples]) for split in splits]
    return _joined(root / "stanford_cars", splits[0].classes, *files)


def _aircraft(root: Path, download: bool) -> _Found:
    from torchvision.datasets import FGVCAircraft

    splits = [FGVCAircraft(root, split, download=download) for split in ("train", "val", "test")]
    files = ((split._image_files, split._labels) for split in splits)
    return _joined(root / "fgvc-aircraft-2013b", splits[0].classes, *files, valid=True)


def _voc2007(root: Path, download: bool) -> _Found:
    from torchvision.datasets import VOCDetection

    folder = root / "VOCdevkit" / "VOC2007"
    if download and not (folder / "ImageSets" / "Main" / "test.txt").is_file():
        for image_set in ("trainval", "test"):
            VOCDetection(root, year="2007", image_set=image_set, download=True)
    splits = [VOCDetection(root, year="2007", image_set=image_set) for image_set in ("train", "val", "test")]
    labels = np.concatenate([_voc_labels(folder, name) for name in ("train", "val", "test")])
    found = _joined(folder, VOC_CLASSES, *((split.images, [0] * len(split.images)) for split in splits), valid=True)
    if len(labels) != len(found.listing.files):
        raise UserError(f"{folder}: ImageSets/Main has {len(labels):,} labels of {len(found.listing.files):,} images; unpack it again")
    return _Found(found.listing, labels, found.train, found.valid)


def _voc_labels(folder: Path, split: str) -> NDArray[np.int8]:
    """Returns the development kit's own labels (N, 20): 1, -1, and 0 for an image whose objects of the class are all difficult."""
    columns = []
    for name in VOC_CLASSES:
        file = folder / "ImageSets" / "Main" / f"{name}_{split}.txt"
        flags = [line.split()[1:] for line in lines_of(read_text(file)) if line.strip()]
        if any(flag not in (["1"], ["-1"], ["0"]) for flag in flags):
            raise UserError(f"{file}: each line must be an image and 1, -1 or 0; unpack the set again")
        columns.append([int(flag[0]) for flag in flags])
    if len(set(map(len, columns))) != 1:
        raise UserError(f"{folder}: the classes' lists of {split} differ in length; unpack the set again")
    return np.array(columns, dtype=np.int8).T


def _dtd(root: Path, download: bool) -> _Found:
    from torchvision.datasets import DTD

    splits = [DTD(root, split, partition=1, download=download) for split in ("train", "val", "test")]
    files = ((split._image_files, split._labels) for split in splits)
    return _joined(root / "dtd" / "dtd", splits[0].classes, *files, valid=True)


def _pets(root: Path, download: bool) -> _Found:
    from torchvision.datasets import OxfordIIITPet

    splits = [OxfordIIITPet(root, split, download=download) for split in ("trainval", "test")]
    return _joined(root / "oxford-iiit-pet", splits[0].classes, *((split._images, split._labels) for split in splits))


def _caltech101(root: Path, download: bool) -> _Found:
    # Not torchvision's listing: it leaves the background class out, and the paper's sizes need 102 classes.
    if download:
        from torchvision.datasets import Caltech101

        Caltech101(root, download=True)
    listing = list_image_folder(root / "caltech101" / "101_ObjectCategories")
    return _Found(listing, np.array(listing.labels, dtype=np.int64), 0, 0)


def _flowers102(root: Path, download: bool) -> _Found:
    from torchvision.datasets import Flowers102

    splits = [Flowers102(root, split, download=download) for split in ("train", "val", "test")]
    files = ((split._image_files, split._labels) for split in splits)
    return _joined(root / "flowers-102", Flowers102.classes, *files, valid=True)


def _places365(root: Path, download: bool) -> _Found:
    from torchvision.datasets import Places365

    folder = root / "places365"
    if download:
        folder.mkdir(exist_ok=True)
    small = (folder / "data_256_standard").is_dir() or not (folder / "data_large_standard").is_dir()
    splits = [Places365(folder, split, small=small, download=download) for split in ("train-standard", "val")]
    files = (([path for path, _ in split.imgs], [-1 if label is None else label for label in split.targets]) for split in splits)
    return _joined(folder, splits[0].classes, *files)


_OPENERS: dict[str, Callable[[Path, bool], _Found]] = {
    "food101": _food101,
    "cifar10": _cifar("CIFAR10"),
    "cifar100": _cifar("CIFAR100"),
    "sun397": _sun397,
    "cars": _cars,
    "aircraft": _aircraft,
    "voc2007": _voc2007,
    "dtd": _dtd,
    "pets": _pets,
    "caltech101": _caltech101,
    "flowers102": _flowers102,
    "places365": _places365,
}
