"""python -m fastbyol verify: checks every byte of a converted data set."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from fastbyol.config.arguments import OneLineParser, local_or_url
from fastbyol.config.console import say
from fastbyol.config.errors import require_at_least
from fastbyol.config.urls import is_url
from fastbyol.host.quantities import count_text
from fastbyol.host.signals import stoppable
from fastbyol.host.store_copies import forget
from fastbyol.host.store_path import StorePath

EXAMPLES = """\
examples:
  python -m fastbyol verify train.beton                                all 1,281,167 images of ImageNet, 148 GB
  python -m fastbyol verify train_tar --source imagenet/train          compares each image with its original, too
  python -m fastbyol verify val.beton --source ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz

exit code: 0 no faults, 1 faults (one per line: file, image, fault), 2 nothing to verify, 130 stopped by Ctrl-C

--source takes the options of the conversion:
"""


def add_verify(commands: Any) -> None:
    """Adds the command to the parser's sub-commands."""
    what = "check every byte of a .beton or of tar shards, and decode every image"
    commands.add_parser("verify", help=what, description=verify_data.__doc__, later=_add_options)


def _add_options(parser: OneLineParser) -> None:
    from fastbyol.data.inputs.images import INPUTS, add_input_arguments
    from fastbyol.data.inspection.findings import KEPT_FAULTS

    parser.epilog = EXAMPLES + INPUTS
    parser.add_argument("path", type=local_or_url, metavar="PATH", help="FILE.beton, or a folder of tar shards; a URL is fetched first")
    add_input_arguments(parser, option="--source", required=False)
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="threads that hash and decode (default: one per core)")
    most = f"largest number of faults to print, at most {KEPT_FAULTS:,}; all are counted (default: 100)"
    parser.add_argument("--faults", type=int, default=100, metavar="N", help=most)
    parser.set_defaults(command=verify_data)


@stoppable
def verify_data(options: argparse.Namespace) -> None:
    """Checks every byte of a .beton or a folder of tar shards: manifest, checksums, tables; decodes every image."""
    from fastbyol.data.formats.fetched import fetched_data
    from fastbyol.data.inputs.images import optional_listing_from
    from fastbyol.data.inspection.verification import verify

    require_at_least("faults", options.faults, 1)
    warnings.filterwarnings("ignore", module="PIL")  # the conversion's report has these warnings about originals already
    originals = optional_listing_from(options, option="--source")
    start = time.monotonic()
    path = fetched_data(StorePath.of(options.path), damaged="keep") if is_url(options.path) else Path(options.path)
    found = verify(path, originals=originals, workers=options.workers)
    for note in found.notes:
        say(f"{options.path}: note: {note}")
    shown = found.faults[: options.faults]
    for fault in shown:
        say(str(fault))
    images_per_s = found.num_images / max(time.monotonic() - start, 1e-9)
    # None: no file beside the data names the classes, so it is not known whether there are any.
    labels = "" if found.num_classes is None else f" of {found.num_classes:,} classes" if found.num_classes else " without labels"
    images = f"{found.num_images:,} images{labels}"
    more = f", the first {len(shown):,} shown" if len(shown) < found.num_faults else ""
    outcome = f"{count_text(found.num_faults, 'fault')}{more}" if found.num_faults else "all is well"
    say(f"{options.path}: {outcome}: {images}, {found.num_bytes:,} bytes of them, {images_per_s:,.0f} images/s")
    if found.num_faults and is_url(options.path):
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            forget(file)  # nobody else should use the copy
    sys.exit(1 if found.num_faults else 0)
