"""Command-line options that describe the input images, and the function that lists these images, in full or as a subset."""

from __future__ import annotations

import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastbyol.config.arguments import local_or_url
from fastbyol.config.console import say
from fastbyol.config.errors import UserError, require_choice
from fastbyol.data.inputs.folder import list_folder, scan_folder
from fastbyol.data.inputs.labels import LabelFile, label_images, read_devkit
from fastbyol.data.inputs.listing import ImageListing, Places, in_sample_order, left_out_text
from fastbyol.data.inputs.name_matching import read_text
from fastbyol.data.inputs.parquet import list_parquet
from fastbyol.data.inputs.path_list import list_paths
from fastbyol.data.inputs.sources import Data, GivenSource, given_sources
from fastbyol.data.inputs.subset import drop_empty_classes, read_subset, restrict
from fastbyol.data.inputs.tars import list_tars, read_tars, tar_images
from fastbyol.host.store_path import StorePath, place_of

LABEL_MODES = ("auto", "folders", "none")
CONVERTERS_OPTION = "--labels"
TRAINING_OPTION = "--data.labels"
PYTHON_OPTION = "DataConfig.labels"
NO_OPTION = "python -m fastbyol convert --labels"
"""How a user gives labels, for messages: to the converters and `embed`, to train.py, from Python, and, for commands without such an option,
by converting the images first.
"""
INPUTS = """\
inputs:
  a folder          images in it or anywhere below; sub-folders are taken as classes, as torchvision.datasets.ImageFolder does, if at least two
                    have images; --labels folders or none overrides this. Labels are never used for training
  a tar             ILSVRC2012_img_train.tar as downloaded (138 GB, read in place, nothing is unpacked), or any tar of images
  shards            a folder of tars, or 'part-{00000..00099}.tar' in quotes: WebDataset's, as img2dataset writes them; labels from .cls members
  a list            .txt with a path in each line; .csv or .tsv with a column of paths, and labels with --label-column NAME
  Parquet           a file, a folder or a pattern: Hugging Face's image data sets (needs pyarrow)
  a URL             any of these at s3://, gs://, hf:// or https:// (pip install 'fastbyol[remote]'; docs/data.md: Data in object stores)
  several           --data photos more/photos 'shards-*.tar'; in one text, 'photos::more/photos'
  with --devkit     ILSVRC2012_img_val.tar, or its images in one folder, with ILSVRC2012_devkit_t12.tar.gz
  with --labels     images in one folder or tar, with a table of names and classes (comma, semicolon, tab or blanks between; the header
                    names the columns, as 'filename,label' does) or a class per line in the order of the names; a label is a class name,
                    or the number of the class from 0. How it was read is printed before the work starts
Names in tables and lists may begin with other folders than the data's, or with none: /other/place/a/1.jpg and 1.jpg both fit a/1.jpg.
Order and labels are those of torchvision's ImageFolder for all of them: by class, then by name.
"""
LABEL_OPTIONS = ("labels", "path_column", "label_column", "devkit", "subset", "drop_empty_classes", "splits_are_classes")
"""Names, in the parsed arguments, of the options of `add_label_arguments`."""


def add_input_arguments(parser: ArgumentParser, *, option: str = "--data", required: bool = True) -> None:
    """Adds --data or --source, and the options of `add_label_arguments`; `listing_from` reads them."""
    where = (
        "folder, tar, shards, list or Parquet files"
        if option == "--data"
        else "the original images: what was given to the conversion as --data"
    )
    parser.add_argument(option, type=local_or_url, nargs="+", required=required, metavar="PATH", help=where)
    add_label_arguments(parser)


def add_label_arguments(parser: ArgumentParser) -> None:
    """Adds --labels, --path-column, --label-column, --devkit, --subset, --drop-empty-classes and --splits-are-classes."""
    how = "auto (default); folders: the top-level folders are the classes; none; or a file of labels: a table, or a class per line"
    parser.add_argument("--labels", type=local_or_url, metavar="HOW", help=how)
    for option, what in (("path", "names of the images"), ("label", "classes")):
        column = f"the column of a table that has the {what}, by name or by number from 1 (default: by its header)"
        parser.add_argument(f"--{option}-column", metavar="NAME", help=column)
    parser.add_argument("--devkit", type=Path, metavar="FILE", help="labels of ImageNet's validation images: ILSVRC2012_devkit_t12.tar.gz")
    names = "use only the images that this file names, one per line (python -m fastbyol subset)"
    parser.add_argument("--subset", type=Path, metavar="LIST", help=names)
    renumber = "renumber the classes if the subset leaves some without images (default: keep the labels)"
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
        option=option,
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
    data: Data,
    *,
    labels: str | Path | None = None,
    path_column: str | None = None,
    label_column: str | None = None,
    devkit: Path | None = None,
    subset: Path | None = None,
    empty_classes: str = "keep",
    splits: str = "refuse",
    option: str = "--data",
    label_option: str = CONVERTERS_OPTION,
) -> ImageListing:
    """Returns the images of one or several sources (`INPUTS` says of which kinds), in order, with labels where there are any.

    Args:
        data: a path or a pattern, several of them, or a text with '::' between several.
        labels: 'auto' (as None), 'folders', 'none', or a file of labels.
        path_column: column of image names in `labels`, or in the table that `data` is, by name or by number from 1; None detects it, or raises
            an error if that is ambiguous.
        label_column: the column of classes, likewise; a table given as `data` has labels only if this is given.
        devkit: ImageNet's development kit, instead of `labels`.
        subset: a file of names; only these images are used.
        empty_classes: 'keep' keeps the labels and class names of the full set, so that they mean the same in a subset; 'drop' removes classes
            without images and renumbers the others.
        splits: 'refuse' raises an error for folders such as train/ and val/; 'classes' accepts them as classes.
        option: name of the option behind `data`, for error messages.
        label_option: how the typed command gives labels, for messages and notes.

    Raises:
        UserError: something is missing, damaged, ambiguous or inconsistent.
    """
    for each in map(str, [data] if isinstance(data, Path | StorePath | str) else data):
        if each.endswith(".beton") and not Path(each).is_dir():
            raise UserError(f"{option} {each}: is converted already; give the original images, from which it was made")
    try:
        listing = _list_images(
            data,
            labels=labels,
            path_column=path_column,
            label_column=label_column,
            devkit=devkit,
            subset=subset,
            empty_classes=empty_classes,
            splits=splits,
            option=option,
        )
    except UserError as error:
        raise UserError(worded_for(label_option, str(error))) from error
    return replace(listing, notes=tuple(worded_for(label_option, note) for note in listing.notes))


def worded_for(label_option: str, text: str) -> str:
    """Returns the text with the converters' label options in it replaced by those of the command that was typed."""
    before = label_option.removesuffix("labels")
    spelled = {"labels": "labels", "label-column": "label_column", "path-column": "path_column"}
    if label_option in (CONVERTERS_OPTION, NO_OPTION):
        spelled = {name: name for name in spelled}
    return re.sub(rf"(?<!\S)--({'|'.join(spelled)})(?![\w-])", lambda found: before + spelled[found[1]], text)


def _list_images(
    data: Data,
    *,
    labels: str | Path | None,
    path_column: str | None,
    label_column: str | None,
    devkit: Path | None,
    subset: Path | None,
    empty_classes: str,
    splits: str,
    option: str,
) -> ImageListing:
    require_choice("splits", splits, ("refuse", "classes"))
    mode = str(labels) if labels is not None and str(labels) in LABEL_MODES else "auto"
    label_path = None if labels is None or str(labels) in LABEL_MODES else place_of(str(labels))
    if label_path and devkit:
        raise UserError("--labels and --devkit: both give labels; give one of them")
    label_file = read_devkit(devkit) if devkit else None
    if label_path:
        label_file = LabelFile(label_path, read_text(label_path), path_column, label_column)
    sources = given_sources(data, option=option)
    if not label_file:
        _refuse_columns_without_use(sources, path_column, label_column, mode)
    listings = [
        _list_source(source, mode, label_file, splits=splits, path_column=path_column, label_column=label_column) for source in sources
    ]
    listing = listings[0] if len(listings) == 1 else join_listings(listings)
    if subset:
        listing = restrict(listing, read_subset(subset), source=subset)
    if empty_classes == "drop":
        if not subset:
            raise UserError("--drop-empty-classes: has no effect without --subset; every class has an image")
        listing = drop_empty_classes(listing)
    return listing


def _list_source(
    source: GivenSource, mode: str, label_file: LabelFile | None, *, splits: str, path_column: str | None, label_column: str | None
) -> ImageListing:
    if source.kind in ("list", "parquet") and (label_file or mode == "folders"):
        raise UserError(
            f"--labels {label_file.path if label_file else mode}: has no effect on {source.given}; a list or table has its labels in a column, "
            "--label-column"
        )
    if source.kind == "list":
        column = label_column if mode != "none" else None
        return list_paths(source.paths[0], path_column=path_column, label_column=column)
    if source.kind == "parquet":
        return list_parquet(source.paths, root=source.given, label_column=label_column, labels=mode)
    if source.kind == "tar":
        return (
            label_images(tar_images(read_tars(source.paths)), label_file)
            if label_file
            else list_tars(source.paths, labels=mode, splits=splits)
        )
    (folder,) = source.paths
    return label_images(scan_folder(folder), label_file) if label_file else list_folder(folder, labels=mode, splits=splits)


def _refuse_columns_without_use(sources: list[GivenSource], path_column: str | None, label_column: str | None, mode: str) -> None:
    kinds = {source.kind for source in sources}
    if path_column and "list" not in kinds:
        raise UserError("--path-column: has no effect without a table of images or --labels FILE")
    if label_column and (mode == "none" or not kinds & {"list", "parquet"}):
        raise UserError("--label-column: has no effect without a table of images or --labels FILE")


def join_listings(listings: list[ImageListing]) -> ImageListing:
    """Returns the images of several sources as one data set, in order. Classes of the same name are one class.

    Raises UserError if some of the sources have labels and others have none.
    """
    labelled = [listing for listing in listings if listing.class_names]
    if labelled and len(labelled) < len(listings):
        without = next(listing.root for listing in listings if not listing.class_names)
        raise UserError(f"{labelled[0].root} has labels and {without} has none; give --labels none, or sources that are alike")
    roots = [listing.root.as_path if isinstance(listing.root, StorePath) else os.path.abspath(listing.root) for listing in listings]
    root = Path(
        os.path.commonpath([at if listing.root.is_dir() else os.path.dirname(at) for at, listing in zip(roots, listings, strict=True)])
    )
    class_names = tuple(sorted({name for listing in listings for name in listing.class_names}))
    label_of = {name: label for label, name in enumerate(class_names)}
    tops = [os.path.relpath(at, root) for at in roots]
    stems = [top if listing.places is None else top.removesuffix(".tar") for top, listing in zip(tops, listings, strict=True)]
    of_stem = Counter(stem for _, stem in set(zip(tops, stems, strict=True)))
    names: dict[str, int] = {}
    skipped: list[tuple[str, str]] = []
    kept: list[tuple[int, int]] = []
    for number, listing in enumerate(listings):
        # 'photos' and 'photos.tar' are two sources, and the images of the second keep its whole name.
        top = stems[number] if of_stem[stems[number]] == 1 else tops[number]
        top = "" if top == "." else f"{top}/"
        skipped += [(top + name, reason) for name, reason in listing.skipped]
        for index, (name, label) in enumerate(zip(listing.files, listing.labels, strict=True)):
            if top + name in names:
                skipped.append((top + name, "the same image again"))
            else:
                names[top + name] = label_of[listing.class_names[label]] if label >= 0 else -1
                kept.append((number, index))
    places = None
    # The common root is a local path, from which images at URLs could not be found.
    if any(listing.places is not None or isinstance(listing.root, StorePath) for listing in listings):
        places = Places.of_locations([listings[number].location(index) for number, index in kept])
    notes = tuple(note for listing in listings for note in listing.notes)
    found = ImageListing(root, class_names, tuple(names), (), tuple(skipped), places, notes)
    return in_sample_order(found, list(names.values()))
