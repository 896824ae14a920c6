"""Command-line options that describe the input images, and the function that lists these images.

Inputs are a folder of class folders, ImageNet's tars, or images with a file of labels; each in full or as a subset.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastbyol.config.console import say
from fastbyol.config.errors import UserError, require_choice
from fastbyol.data.inputs.folder import by_class_folder, list_image_folder, scan_folder
from fastbyol.data.inputs.labels import LabelFile, label_images, read_devkit
from fastbyol.data.inputs.listing import ImageListing, left_out_text
from fastbyol.data.inputs.name_matching import read_text
from fastbyol.data.inputs.splits import refuse_splits
from fastbyol.data.inputs.subset import drop_empty_classes, read_subset, restrict
from fastbyol.data.inputs.tar import TarScan

INPUTS = """\
inputs:
  a folder          one sub-folder of images per class, as torchvision.datasets.ImageFolder reads it
  a tar             ILSVRC2012_img_train.tar as downloaded (138 GB, read in place, nothing is unpacked), or any tar of class folders
  with --devkit     ILSVRC2012_img_val.tar, or its images in one folder, with ILSVRC2012_devkit_t12.tar.gz
  with --labels     images in one folder or tar, with a table of names and classes (comma, semicolon, tab or blanks between; the header
                    names the columns, as 'filename,label' does) or a class per line in the order of the names; a label is a class name,
                    or the number of the class from 0. How it was read is printed before the work starts
Names in tables and lists may have other folders in front than the data, or none.
Order and labels are those of torchvision's ImageFolder for all of them: by class, then by name.
"""
LABEL_OPTIONS = ("labels", "path_column", "label_column", "devkit", "subset", "drop_empty_classes", "splits_are_classes")
"""Names, in the parsed arguments, of the options of `add_label_arguments`."""


def add_input_arguments(parser: ArgumentParser, *, option: str = "--data", required: bool = True) -> None:
    """Adds --data or --source, and the options of `add_label_arguments`; `listing_from` reads them."""
    where = "folder of class folders, or a tar" if option == "--data" else "the original images: the path that the conversion had as --data"
    parser.add_argument(option, type=Path, required=required, metavar="PATH", help=where)
    add_label_arguments(parser)


def add_label_arguments(parser: ArgumentParser) -> None:
    """Adds --labels, --path-column, --label-column, --devkit, --subset, --drop-empty-classes and --splits-are-classes."""
    parser.add_argument("--labels", type=Path, metavar="FILE", help="labels of images in one folder or tar: a table, or a class per line")
    for option, what in (("path", "names of the images"), ("label", "classes")):
        column = f"the column of --labels that has the {what}, by name or by number from 1 (default: by its header)"
        parser.add_argument(f"--{option}-column", f"--{option}_column", metavar="NAME", help=column)
    parser.add_argument("--devkit", type=Path, metavar="FILE", help="labels of ImageNet's validation images: ILSVRC2012_devkit_t12.tar.gz")
    names = "use only the images that this file names, one per line (data_prep/subset.py)"
    parser.add_argument("--subset", type=Path, metavar="LIST", help=names)
    renumber = "renumber the classes if the subset leaves some without images (default: labels stay)"
    parser.add_argument("--drop-empty-classes", action="store_true", help=renumber)
    accept = "accept folders such as train/ and val/ as classes (default: refuse them)"
    parser.add_argument("--splits-are-classes", action="store_true", help=accept)


def listing_from(arguments: Namespace, *, option: str = "--data", tell: Callable[[str], None] | None = None) -> ImageListing:
    """Returns the images that the options of `add_input_arguments` describe.

    Calls `tell` with messages on how the input was interpreted and what was skipped; None prints them to stderr.
    """
    tell = tell or (lambda note: say(f"fastbyol: note: {note}", file=sys.stderr))
    listing = list_images(
        getattr(arguments, option.lstrip("-")),
        labels=arguments.labels,
        path_column=arguments.path_column,
        label_column=arguments.label_column,
        devkit=arguments.devkit,
        subset=arguments.subset,
        empty_classes="drop" if arguments.drop_empty_classes else "keep",
        splits="classes" if arguments.splits_are_classes else "refuse",
    )
    for note in (*listing.notes, *([f"{listing.root}: left out: {text}"] if (text := left_out_text(listing.skipped)) else [])):
        tell(note)
    return listing


def optional_listing_from(arguments: Namespace, *, option: str) -> ImageListing | None:
    """Returns the images as `listing_from` does, or None if `option` is not given. Raises UserError if only options that need it are given."""
    if getattr(arguments, option.lstrip("-")):
        return listing_from(arguments, option=option)
    for name in label_options(arguments):
        raise UserError(f"--{name}: describes what was converted; give that with {option}")
    return None


def label_options(arguments: Namespace) -> list[str]:
    """Returns the names, without dashes, of the options of `add_label_arguments` that are given."""
    return [name.replace("_", "-") for name in LABEL_OPTIONS if getattr(arguments, name)]


def list_images(
    data: Path,
    *,
    labels: Path | None = None,
    path_column: str | None = None,
    label_column: str | None = None,
    devkit: Path | None = None,
    subset: Path | None = None,
    empty_classes: str = "keep",
    splits: str = "refuse",
) -> ImageListing:
    """Returns the images of a folder or tar, in order, with labels.

    Args:
        data: a folder or a tar.
        labels: file of labels, if the images are not in class folders.
        path_column: its column of image names, by name or by number from 1; None detects it, or raises an error if that is ambiguous.
        label_column: its column of classes, likewise.
        devkit: ImageNet's development kit, instead of `labels`.
        subset: a file of names; only these images are used.
        empty_classes: 'keep' keeps the labels and class names of the full set, so that they mean the same in a subset; 'drop' removes classes
            without images and renumbers the others.
        splits: 'refuse' raises an error for folders such as train/ and val/; 'classes' accepts them as classes.

    Raises:
        UserError: something is missing, damaged, ambiguous or inconsistent.
    """
    require_choice("splits", splits, ("refuse", "classes"))
    if (path_column or label_column) and not labels:
        raise UserError(f"--{'path' if path_column else 'label'}-column: has no effect without --labels")
    if labels and devkit:
        raise UserError("--labels and --devkit: both give labels; give one of them")
    label_file = read_devkit(devkit) if devkit else None
    if labels:
        label_file = LabelFile(labels, read_text(labels), path_column, label_column)
    if not data.exists():
        raise UserError(f"{data}: no such file or folder; give a folder with one sub-folder of images per class, or a tar")
    if data.is_file():
        listing = _list_tar(data, label_file, splits)
    elif label_file:
        listing = label_images(scan_folder(data), label_file)
    else:
        listing = list_image_folder(data, splits=splits)
    if subset:
        listing = restrict(listing, read_subset(subset), source=subset)
    if empty_classes == "drop":
        if not subset:
            raise UserError("--drop-empty-classes: has no effect without --subset; every class has an image")
        listing = drop_empty_classes(listing)
    return listing


def _list_tar(path: Path, labels: LabelFile | None, splits: str) -> ImageListing:
    scan = TarScan(path)
    scan.read()
    found = ImageListing(path, (), tuple(scan.names), (), tuple(scan.skipped), scan.offsets, scan.sizes)
    if not found.files:
        raise UserError(f"{path}: no image in it; give a tar of images, of class folders, or of one tar per class")
    if labels is not None:
        return label_images(found, labels)
    names = found.files
    # 'images/train/n01440764/x.JPEG' becomes 'n01440764/x.JPEG' if all images are in images/train.
    while (top := names[0].partition("/")[0] + "/") and all(name.startswith(top) and name.count("/") > 1 for name in names):
        names = tuple(name.removeprefix(top) for name in names)
    class_names = tuple(sorted({name.partition("/")[0] for name in names if "/" in name} | scan.class_tars))
    if not class_names:
        raise UserError(f"{path}: its images are not in class folders (the first: {min(names)}); give --labels or --devkit")
    if splits == "refuse":
        refuse_splits(path, class_names, names)
    return by_class_folder(replace(found, files=names, class_names=class_names))
