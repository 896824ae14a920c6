"""Converts a folder of images to one .beton file for the FFCV backend."""

from __future__ import annotations

from pathlib import Path

from fastbyol.config.errors import one_line_errors
from fastbyol.data.command_line import conversion_parser, overwrite_mode
from fastbyol.data.writers_ffcv import write_beton

EXAMPLES = """\
examples:
  python data_prep/to_ffcv.py --data imagenet/train --out train.beton     1,281,167 images: 148 GB, as large as the images themselves
  python data_prep/to_ffcv.py --data demo/train --out demo/train.beton --workers 2 --overwrite

JPEG files of 1 or 3 components go in byte for byte; all else becomes RGB JPEG of quality 95. Every image is decoded once to check it.
train.beton.json, written beside it, names the classes and describes the file.
"""


@one_line_errors
def main() -> None:
    parser = conversion_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.beton", help="the file to make")
    arguments = parser.parse_args()
    manifest = write_beton(arguments.data, out=arguments.out, workers=arguments.workers, overwrite=overwrite_mode(arguments))
    print(f"{arguments.out}: {manifest.num_samples:,} images of {len(manifest.class_names):,} classes, {manifest.shards[0].bytes:,} bytes")


if __name__ == "__main__":
    main()
