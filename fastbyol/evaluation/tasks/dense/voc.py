"""Pascal VOC's layout: lists of images, label images with the extra annotations of SBD, objects with boxes.

    FOLDER/JPEGImages/ID.jpg    FOLDER/ImageSets/Main/LIST.txt, FOLDER/ImageSets/Segmentation/LIST.txt: an ID a line
    FOLDER/Annotations/ID.xml   FOLDER/SegmentationClass/ID.png   FOLDER/classes.txt: for other classes than VOC's twenty

FOLDER is the data folder itself, its VOC<year> or VOCdevkit/VOC<year>, or its voc (the scenes of python -m fastbyol demo-data).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from fastbyol.config.console import printable
from fastbyol.config.errors import UserError, shortened
from fastbyol.evaluation.tasks.dense.files import decoded_size, image_named, read_labels, read_names

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse", "motorbike"),
    *("person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
IGNORE = 255
"""Label of pixels that count neither in the loss nor in the score: VOC draws it around objects."""
TRAIN_AUG = ("train_aug", "trainaug")
"""Names of the list of VOC2012's training images with SBD's annotations, 10,582 images."""
_SBD = ("SBD", "sbd", "benchmark_RELEASE/dataset")
_MAX_XML_BYTES = 4 * 2**20
_MAX_MAT_BYTES = 16 * 2**20


def voc_folder(data: str, *, year: str) -> Path:
    """Returns the folder in VOC's layout. Raises UserError that says what must lie where."""
    root = Path(data)
    candidates = (root, root / f"VOC{year}", root / "VOCdevkit" / f"VOC{year}", root / "voc")
    for folder in candidates:
        if (folder / "JPEGImages").is_dir():
            # VOC2007's folder, where 2012's list is asked for, has lists of the same names.
            if folder is root and re.fullmatch(r"VOC2\d{3}", folder.name) and folder.name != f"VOC{year}":
                if not (beside := root.parent / f"VOC{year}").is_dir():
                    raise UserError(
                        f"--data {printable(data)}: is {folder.name}, and VOC{year} is needed; put that beside it, or give the folder that holds both"
                    )
                return beside
            return folder
    raise UserError(
        f"--data {printable(data)}: no images in Pascal VOC's layout; expected JPEGImages, Annotations, SegmentationClass and ImageSets in it, in its "
        f"VOCdevkit/VOC{year}, or in its voc (python -m fastbyol demo-data --kind scenes)"
    )


def sbd_folders(data: str) -> list[Path]:
    """Returns the folders in which SBD's annotations may lie, those that there are."""
    return [folder for name in _SBD if (folder := Path(data) / name).is_dir()]


def year_and_list(text: str) -> tuple[str, str]:
    """Returns the year and the list that a set is named by: 2012_train is (2012, train), and trainval alone is of 2007."""
    found = re.fullmatch(r"(\d{4})_(.+)", text)
    return (found[1], found[2]) if found else ("2007", text)


def class_names(folder: Path) -> tuple[str, ...]:
    """Returns the names in classes.txt, a line each, or VOC's twenty; the label of a pixel is the position, from 1."""
    path = folder / "classes.txt"
    if not path.is_file():
        return VOC_CLASSES
    names = tuple(read_names(path))
    if len(set(names)) < len(names) or len(names) >= IGNORE:
        raise UserError(f"{printable(str(path))}: {len(names)} names, {len(set(names))} different; must be fewer than {IGNORE}, each once")
    return names


# ---- segmentation


@dataclass(frozen=True)
class LabelledImage:
    """An image and its label image: of VOC a palette PNG, of SBD a .mat file."""

    image: Path
    labels: Path

    def read_labels(self, *, classes: int) -> Tensor:
        """Returns uint8 (H, W): 0 background, 1 to `classes`, or IGNORE. Raises UserError for another value or kind of file."""
        labels = _read_sbd(self.labels) if self.labels.suffix == ".mat" else read_labels(self.labels)
        wrong = labels[(labels > classes) & (labels != IGNORE)]
        if len(wrong):
            raise UserError(
                f"{printable(str(self.labels))}: has pixels of class {int(wrong.max())}; expected 0 to {classes} and {IGNORE} (ignore)"
            )
        return labels

    def check(self, *, classes: int) -> None:
        """Raises UserError if the label image has another size than the image, or a value out of range."""
        labels, size = self.read_labels(classes=classes), decoded_size(self.image)
        if tuple(labels.shape) != size:
            height, width = labels.shape
            raise UserError(f"{printable(str(self.labels))}: has {width} x {height} px, but its image {size[1]} x {size[0]}")


def labelled_images(folder: Path, name: str, *, data: str) -> list[LabelledImage]:
    """Returns the images of a list of ImageSets/Segmentation; train_aug also from a copy of SBD as downloaded.

    Raises:
        UserError: no such list, image or label image.
    """
    lists = folder / "ImageSets" / "Segmentation"
    names = TRAIN_AUG if name in TRAIN_AUG else (name,)
    found = next((lists / f"{each}.txt" for each in names if (lists / f"{each}.txt").is_file()), None)
    sbd = next((root / each for root in (folder, Path(data)) for each in _SBD if (root / each / "cls").is_dir()), None)
    if found is not None:
        identities = read_names(found)
    elif name in TRAIN_AUG and sbd is not None:
        # What the field calls train_aug: everything annotated by VOC's train or by SBD that is not in VOC's val.
        held = set(read_names(lists / "val.txt"))
        listed = {*read_names(lists / "train.txt"), *read_names(sbd / "train.txt"), *read_names(sbd / "val.txt")}
        identities = sorted(listed - held)
    elif name in TRAIN_AUG:
        raise UserError(
            f"{printable(str(lists))}: has no train_aug.txt; put it there with SegmentationClassAug beside SegmentationClass, or SBD as downloaded "
            "(benchmark_RELEASE) into --data; or say --train_set train (1,464 images)"
        )
    else:
        raise UserError(f"{printable(str(lists / name))}.txt: no such list of images")
    return [LabelledImage(image_named(folder / "JPEGImages", each), _label_file(folder, each, sbd)) for each in identities]


def _label_file(folder: Path, identity: str, sbd: Path | None) -> Path:
    places = [folder / "SegmentationClass" / f"{identity}.png", folder / "SegmentationClassAug" / f"{identity}.png"]
    if sbd is not None:
        places.append(sbd / "cls" / f"{identity}.mat")
    for path in places:
        if path.is_file():
            return path
    raise UserError(f"{printable(str(places[0]))}: no such label image, nor in SegmentationClassAug or SBD, but it is listed")


def _read_sbd(path: Path) -> Tensor:
    from scipy.io import loadmat

    try:
        if path.stat().st_size > _MAX_MAT_BYTES:
            raise ValueError("larger than 16 MiB")
        labels = np.asarray(loadmat(str(path), variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0])
        if labels.ndim != 2 or labels.dtype != np.uint8:
            raise ValueError(f"Segmentation is {labels.dtype} of shape {labels.shape}, not uint8 of (H, W)")
    except Exception as error:  # scipy's reader raises whatever a damaged file leads it to
        raise UserError(f"{printable(str(path))}: is not a label file of SBD ({shortened(error)})") from error
    return torch.from_numpy(np.ascontiguousarray(labels))


# ---- detection


@dataclass(frozen=True)
class BoxedImage:
    """An image and its objects.

    boxes: (x_min, y_min, x_max, y_max) of each in px, corners counted from 0, the last two exclusive. labels: number of its class, from 1.
    """

    image: Path
    size: tuple[int, int]
    boxes: tuple[tuple[float, float, float, float], ...]
    labels: tuple[int, ...]
    difficult: tuple[bool, ...]


def boxed_images(folder: Path, name: str) -> list[tuple[Path, Path]]:
    """Returns the (image, XML file) pairs of a list of ImageSets/Main. Raises UserError if one is missing."""
    path = folder / "ImageSets" / "Main" / f"{name}.txt"
    if not path.is_file():
        raise UserError(f"{printable(str(path))}: no such list of images")
    pairs = []
    for identity in read_names(path):
        xml = folder / "Annotations" / f"{identity}.xml"
        if not xml.is_file():
            raise UserError(f"{printable(str(xml))}: no such file, but it is listed")
        pairs.append((image_named(folder / "JPEGImages", identity), xml))
    return pairs


def read_boxes(image: Path, xml: Path, *, classes: tuple[str, ...]) -> BoxedImage:
    """Returns the objects of an XML file of VOC, which may have none.

    Raises:
        UserError: not such a file, a class that is not in `classes`, or a box that is empty or outside the image.
    """
    height, width = decoded_size(image)
    boxes, labels, difficult = [], [], []
    for found in _objects(xml):
        name = (found.findtext("name") or "").strip()
        if name not in classes:
            raise UserError(f"{printable(str(xml))}: an object of class {name!r}; the classes are {', '.join(classes)}")
        corners = _corners(found, xml)
        x_min, y_min, x_max, y_max = corners
        if not (1 <= x_min <= x_max <= width and 1 <= y_min <= y_max <= height):
            raise UserError(
                f"{printable(str(xml))}: the box of {name} {', '.join(f'{each:g}' for each in corners)} is not in its image of {width} x {height} px; "
                "corners count from 1"
            )
        boxes.append((x_min - 1, y_min - 1, x_max, y_max))
        labels.append(classes.index(name) + 1)
        difficult.append((found.findtext("difficult") or "0").strip() == "1")
    return BoxedImage(image, (height, width), tuple(boxes), tuple(labels), tuple(difficult))


def _objects(xml: Path) -> list[Any]:
    try:
        if xml.stat().st_size > _MAX_XML_BYTES:
            raise ValueError("larger than 4 MiB")
        text = xml.read_bytes()
        if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
            raise ValueError("declares entities")  # a few of them expand to gigabytes
        return ElementTree.fromstring(text).findall("object")
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise UserError(f"{printable(str(xml))}: cannot be read as an annotation of VOC ({shortened(error)})") from error


def _corners(found: Any, xml: Path) -> tuple[float, float, float, float]:
    try:
        x_min, y_min, x_max, y_max = (float(found.findtext(f"bndbox/{name}")) for name in ("xmin", "ymin", "xmax", "ymax"))
    except (TypeError, ValueError) as error:
        raise UserError(f"{printable(str(xml))}: an object without the four corners of its bndbox") from error
    return x_min, y_min, x_max, y_max
