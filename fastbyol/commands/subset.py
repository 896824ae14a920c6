"""python -m fastbyol subset: a list of some images of a data set."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from fastbyol.config.arguments import OneLineParser, expand_home, through_links
from fastbyol.config.console import say
from fastbyol.config.errors import UserError
from fastbyol.host.signals import stoppable

EXAMPLES = """\
examples:
  python -m fastbyol subset --data imagenet/train --fraction 0.01 --out 1percent.txt         12,812 images, 12 or 13 of each class
  python -m fastbyol subset --data imagenet/train --subset simclr/1percent.txt --out 1percent.txt    SimCLR's own list, checked and completed
  python -m fastbyol subset --data imagenet/train --classes 100 --out 100classes.txt         all images of 100 classes
  python -m fastbyol subset --data imagenet/val --classes imagenet100.txt --out val100.txt   the classes that a file names, one per line

then:
  python -m fastbyol convert --data imagenet/train --subset 1percent.txt --out 1percent.beton

The same seed chooses the same images on any machine. With one seed, a larger subset contains the smaller one, and train and val get the same
classes. Images without a label are drawn as one more class. Labels are those of the full set, so that a classifier trained on a subset can be
tested on all of val; the converters' --drop-empty-classes renumbers them.
"""


def add_subset(commands: Any) -> None:
    """Adds the command to the parser's sub-commands."""
    what = "list a class-balanced part of a data set, or some of its classes"
    commands.add_parser("subset", help=what, description=write_list.__doc__, later=_add_options)


def _add_options(parser: OneLineParser) -> None:
    from fastbyol.data.inputs.images import INPUTS, add_input_arguments

    parser.epilog = EXAMPLES + INPUTS
    add_input_arguments(parser)
    written = "the list to write: one name per line, in the order of the data"
    parser.add_argument("--out", type=Path, required=True, metavar="LIST", help=written)
    parser.add_argument("--fraction", type=float, metavar="F", help="fraction of the images, class-balanced, at least one of each class")
    parser.add_argument("--images", type=int, metavar="N", help="number of images, class-balanced")
    classes = "number of classes, or their names (name,name or a file with one per line)"
    parser.add_argument("--classes", metavar="N|NAMES|FILE", help=classes)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random choice (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing list")
    parser.set_defaults(command=write_list)


@stoppable
def write_list(options: argparse.Namespace) -> None:
    """Writes a list of images: a class-balanced subset of a data set, some of its classes, or the images of a published list."""
    from fastbyol.data.inputs.images import listing_from
    from fastbyol.data.inputs.subset import choose_classes, draw_fraction, draw_images, write_subset

    if options.drop_empty_classes:
        raise UserError("--drop-empty-classes: a list holds names and no labels; give it to the converter")
    listing = listing_from(options)
    if options.classes:
        listing = choose_classes(listing, _classes(options.classes), seed=options.seed)
    if options.fraction is not None and options.images is not None:
        raise UserError("--fraction and --images: both say how many; give one of them")
    if options.fraction is not None:
        listing = draw_fraction(listing, options.fraction, seed=options.seed)
    elif options.images is not None:
        listing = draw_images(listing, options.images, seed=options.seed)
    elif not options.classes and not options.subset:
        raise UserError("which part? give --fraction, --images, --classes or --subset")
    out = through_links(options.out)
    if out.exists() and not options.overwrite:
        raise UserError(f"--out {out}: exists already; give another name, or --overwrite to replace it")
    try:
        write_subset(out, listing)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); give another file") from error
    of_class = Counter(listing.labels)
    without = of_class.pop(-1, 0)
    counts = of_class.values()
    classes = "without labels"
    if counts:
        each = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
        classes = f"of {len(counts):,} classes ({each} of each), of {len(listing.class_names):,} in all"
        classes += f", and {without:,} without a label" if without else ""
    say(f"{out}: {len(listing.files):,} images {classes}")


def _classes(text: str) -> int | list[str]:
    """Parses --classes: a number of classes, a file of names, or names separated by commas."""
    if text.isdecimal():
        return int(text)
    from fastbyol.data.inputs.subset import read_subset

    file = Path(expand_home(text))
    names = read_subset(file) if file.is_file() else text.split(",")
    return [name.strip().removeprefix("./").rstrip("/") for name in names]  # 'find' writes folders as './name', 'ls -d */' as 'name/'
