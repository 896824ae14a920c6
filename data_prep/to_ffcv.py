"""Converts images to one .beton file for the FFCV backend."""

from __future__ import annotations

from fastbyol.host.signals import end_at_once_when_stopped, stoppable

if __name__ == "__main__":
    end_at_once_when_stopped()  # the imports take a moment

from functools import partial
from pathlib import Path

from fastbyol.config.arguments import through_links
from fastbyol.config.errors import one_line_errors, require
from fastbyol.data.conversion.beton_writer import write_beton
from fastbyol.data.conversion.command_line import conversion_options, conversion_parser, print_outcome
from fastbyol.data.conversion.report import report_path
from fastbyol.data.inputs.images import listing_from

EXAMPLES = """\
examples (sizes: ImageNet's 1,281,167 training images, 147 GB of JPEG files):
  python data_prep/to_ffcv.py --data imagenet/train --out train.beton                           148 GB: the images' own bytes
  python data_prep/to_ffcv.py --data imagenet/train --out train.beton --max-side 512 --quality 90    about 65 GB
  python data_prep/to_ffcv.py --data imagenet/train --out train.beton --max-side 256 --raw      about 170 GB: no decoding at all
  python data_prep/to_ffcv.py --data ILSVRC2012_img_train.tar --out train.beton                 as downloaded, read in place
  python data_prep/to_ffcv.py --data ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz --out val.beton    6.7 GB
  python data_prep/to_ffcv.py --data demo/train --out demo/train.beton --workers 2 --overwrite

Beside train.beton: train.beton.json, the manifest (class names, settings, checksum), and train.beton.report.json.
"""


@stoppable
@one_line_errors
def main() -> None:
    parser = conversion_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.beton", help="the file to make")
    parser.add_argument("--shuffle-seed", type=int, metavar="N", help="store the images in a random order with this seed, for readers that "
                        "read the file sequentially (default: the listing's order; our loader shuffles by itself)")  # fmt: skip
    parser.add_argument("--raw", action="store_true", help="store pixels instead of JPEGs: at least 5 times the size, but no decoding")
    parser.add_argument("--raw-fraction", type=float, metavar="SHARE", help="store this share of the images as pixels")
    arguments = parser.parse_args()
    require(not (arguments.raw and arguments.raw_fraction is not None), "raw-fraction", arguments.raw_fraction, "left out beside --raw")
    out = through_links(arguments.out)
    raw_fraction = 1.0 if arguments.raw else arguments.raw_fraction or 0.0
    manifest = write_beton(
        partial(listing_from, arguments),
        out=out,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        shuffle_seed=arguments.shuffle_seed,
        options=conversion_options(arguments, raw_fraction=raw_fraction),
    )
    print_outcome(out, manifest, report_path(out))


if __name__ == "__main__":
    main()
