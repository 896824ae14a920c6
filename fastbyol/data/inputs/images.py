"""The inputs that every command takes: a folder of class folders, ImageNet's tars, images with a file of labels; all of them or a part."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

from fastbyol.config.errors import UserError
from fastbyol.data.inputs.folder import by_class_folder, list_image_folder, refuse_splits, scan_folder
from fastbyol.data.inputs.labels import LabelFile, label_images, read_devkit, read_label_file
from fastbyol.data.inputs.listing import ImageListing
from fastbyol.data.inputs.subset import drop_empty_classes, read_subset, restrict
from fastbyol.data.inputs.tar import TarScan

INPUTS = """\
inputs:
  a folder          one sub-folder of images per class, as torchvision.datasets.ImageFolder reads it
  a tar             ILSVRC2012_img_train.tar as downloaded (138 GB, read in place, nothing is unpacked), or any tar of class folders
  with --devkit     ILSVRC2012_img_val.tar, or its images in one folder, with ILSVRC2012_devkit_t12.tar.gz
  with --labels     images in one folder or tar, with a FILE.csv (columns filename,label) or a text file (lines 'name class', or a class per
                    line in the order of the names); a label is a class name, or the number of the class from 0
Order and labels are those of torchvision's ImageFolder for all of them: by class, then by name.
"""


def add_input_arguments(parser: ArgumentParser, *, option: str = "--data", required: bool = True) -> None:
    """Adds --data or '--source', and what `add_label_arguments` adds; `listing_from` reads them."""
    where = "folder of class folders, or a tar" if option == "--data" else "where the images came from: what the conversion had as --data"
    parser.add_argument(option, type=Path, required=required, metavar="PATH", help=where)
    add_label_arguments(parser)


def add_label_arguments(parser: ArgumentParser) -> None:
    """Adds --labels, --devkit, --subset and --drop-empty-classes."""
    parser.add_argument("--labels", type=Path, metavar="FILE", help="labels of images that lie together: FILE.csv or a text file")
    parser.add_argument("--devkit", type=Path, metavar="FILE", help="labels of ImageNet's validation images: ILSVRC2012_devkit_t12.tar.gz")
    parser.add_argument(
        "--subset", type=Path, metavar="LIST", help="only the images that this file names, one per line (data_prep/subset.py)"
    )
    parser.add_argument(
        "--drop-empty-classes", action="store_true", help="number the classes anew where the subset leaves some out (default: labels stay)"
    )


def listing_from(arguments: Namespace, *, option: str = "--data") -> ImageListing:
    """The images that the options of `add_input_arguments` describe."""
    return list_images(
        getattr(arguments, option.lstrip("-")),
        labels=arguments.labels,
        devkit=arguments.devkit,
        subset=arguments.subset,
        empty_classes="drop" if arguments.drop_empty_classes else "keep",
    )


def optional_listing_from(arguments: Namespace, *, option: str) -> ImageListing | None:
    """The same where the option may be left out. UserError if only what goes with it is given."""
    if getattr(arguments, option.lstrip("-")):
        return listing_from(arguments, option=option)
    for name in ("labels", "devkit", "subset", "drop_empty_classes"):
        if getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')}: describes what was converted; give that with {option}")
    return None


def list_images(
    data: Path, *, labels: Path | None = None, devkit: Path | None = None, subset: Path | None = None, empty_classes: str = "keep"
) -> ImageListing:
    """The images of a folder or tar, in order, with labels.

    Args:
        data: a folder or a tar.
        labels: file of labels, where the images are not sorted into classes.
        devkit: ImageNet's development kit, instead of `labels`.
        subset: a file of names: only those images.
        empty_classes: 'keep' the full set's labels and class names, so that they mean the same in a part of it, or 'drop' the classes
            without an image and number the others anew.

    Raises:
        UserError: anything that is missing, damaged, ambiguous or does not fit together.
    """
    listing = _list_all(data, _label_file(labels, devkit))
    if subset:
        listing = restrict(listing, read_subset(subset), source=subset)
    if empty_classes == "drop":
        if not subset:
            raise UserError("--drop-empty-classes: has no effect without --subset; every class has an image")
        listing = drop_empty_classes(listing)
    return listing


def _label_file(labels: Path | None, devkit: Path | None) -> LabelFile | None:
    if labels and devkit:
        raise UserError("--labels and --devkit: both give labels; give one of them")
    return read_label_file(labels) if labels else read_devkit(devkit) if devkit else None


def _list_all(data: Path, labels: LabelFile | None) -> ImageListing:
    if not data.exists():
        raise UserError(f"{data}: no such file or folder; give a folder with one sub-folder of images per class, or a tar")
    if data.is_file():
        return _list_tar(data, labels)
    if labels is None:
        return list_image_folder(data)
    scan = scan_folder(data)
    return label_images(ImageListing(data, (), tuple(scan.names), (), tuple(scan.skipped)), labels)


def _list_tar(path: Path, labels: LabelFile | None) -> ImageListing:
    scan = TarScan(path)
    scan.read()
    found = ImageListing(path, (), tuple(scan.names), (), tuple(scan.skipped), scan.offsets, scan.sizes)
    if not found.files:
        raise UserError(f"{path}: no image in it; give a tar of images, of class folders, or of one tar per class")
    if labels is not None:
        return label_images(found, labels)
    found = replace(found, files=_without_common_folder(found.files))
    class_names = tuple(sorted({name.partition("/")[0] for name in found.files if "/" in name} | scan.class_tars))
    if not class_names:
        raise UserError(f"{path}: its images lie in no class folders (the first: {min(found.files)}); give --labels or --devkit")
    refuse_splits(path, class_names)
    return by_class_folder(replace(found, class_names=class_names))


def _without_common_folder(names: tuple[str, ...]) -> tuple[str, ...]:
    """'images/train/n01440764/x.JPEG' -> 'n01440764/x.JPEG', where all lie in one folder and are deeper in it: it was packed as a whole."""
    while True:
        first = names[0].partition("/")[0] + "/"
        if not all(name.startswith(first) and name.count("/") > 1 for name in names):
            return names
        names = tuple(name[len(first) :] for name in names)
