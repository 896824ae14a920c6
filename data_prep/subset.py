"""Writes a list of images: a class-balanced subset of a data set, some of its classes, or the images of a published list."""

from __future__ import annotations

from fastbyol.host.signals import end_at_once_when_stopped, stoppable

if __name__ == "__main__":
    end_at_once_when_stopped()  # the imports take a moment

from collections import Counter
from pathlib import Path

from fastbyol.config.arguments import OneLineParser, expand_home
from fastbyol.config.console import say
from fastbyol.config.errors import UserError, one_line_errors
from fastbyol.data.inputs.images import INPUTS, add_input_arguments, listing_from
from fastbyol.data.inputs.subset import choose_classes, draw_fraction, draw_images, read_subset, write_subset

EXAMPLES = f"""\
examples:
  python data_prep/subset.py --data imagenet/train --fraction 0.01 --out 1percent.txt         12,812 images, 12 or 13 of each class
  python data_prep/subset.py --data imagenet/train --subset simclr/1percent.txt --out 1percent.txt    SimCLR's own list, checked and completed
  python data_prep/subset.py --data imagenet/train --classes 100 --out 100classes.txt         all images of 100 classes
  python data_prep/subset.py --data imagenet/val --classes imagenet100.txt --out val100.txt   the classes that a file names, one per line

then:
  python data_prep/to_ffcv.py --data imagenet/train --subset 1percent.txt --out 1percent.beton

The same seed chooses the same images on any machine. With one seed, a larger subset contains the smaller one, and train and val get the same
classes. Labels are those of the full set, so that a classifier trained on a subset can be tested on all of val; the converters'
--drop-empty-classes renumbers them.
{INPUTS}"""


@stoppable
@one_line_errors
def main() -> None:
    parser = OneLineParser(description=__doc__, epilog=EXAMPLES)
    add_input_arguments(parser)
    written = "the list to write: one name per line, in the order of the data"
    parser.add_argument("--out", type=Path, required=True, metavar="LIST", help=written)
    parser.add_argument("--fraction", type=float, metavar="F", help="fraction of the images, class-balanced, at least one of each class")
    parser.add_argument("--images", type=int, metavar="N", help="number of images, class-balanced")
    classes = "number of classes, or their names (name,name or a file with one per line)"
    parser.add_argument("--classes", metavar="N|NAMES|FILE", help=classes)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random choice (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing list")
    arguments = parser.parse_args()
    if arguments.drop_empty_classes:
        raise UserError("--drop-empty-classes: a list holds names and no labels; give it to the converter")
    listing = listing_from(arguments)
    if arguments.classes:
        listing = choose_classes(listing, _classes(arguments.classes), seed=arguments.seed)
    if arguments.fraction is not None and arguments.images is not None:
        raise UserError("--fraction and --images: both say how many; give one of them")
    if arguments.fraction is not None:
        listing = draw_fraction(listing, arguments.fraction, seed=arguments.seed)
    elif arguments.images is not None:
        listing = draw_images(listing, arguments.images, seed=arguments.seed)
    elif not arguments.classes and not arguments.subset:
        raise UserError("which part? give --fraction, --images, --classes or --subset")
    out: Path = arguments.out
    if out.exists() and not arguments.overwrite:
        raise UserError(f"--out {out}: exists already; give another name, or --overwrite to replace it")
    try:
        write_subset(out, listing)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); give another file") from error
    counts = Counter(listing.labels).values()
    each = f"{min(counts):,}" if min(counts) == max(counts) else f"{min(counts):,} to {max(counts):,}"
    classes = (
        f"of {len(counts):,} classes ({each} of each), of {len(listing.class_names):,} in all" if listing.class_names else "without labels"
    )
    say(f"{out}: {len(listing.files):,} images {classes}")


def _classes(text: str) -> int | list[str]:
    """Parses --classes: a number of classes, a file of names, or names separated by commas."""
    if text.isdecimal():
        return int(text)
    file = Path(expand_home(text))
    names = read_subset(file) if file.is_file() else text.split(",")
    return [name.strip().removeprefix("./").rstrip("/") for name in names]  # as 'ls -d */' and 'find' write folders


if __name__ == "__main__":
    main()
