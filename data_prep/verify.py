"""Checks every byte of a .beton or a folder of tar shards: manifest, checksums, tables; decodes every image."""

from __future__ import annotations

from fastbyol.host.signals import end_at_once_when_stopped, stoppable

if __name__ == "__main__":
    end_at_once_when_stopped()  # the imports take a moment

import sys
import time
import warnings
from pathlib import Path

from fastbyol.config.arguments import OneLineParser
from fastbyol.config.console import say
from fastbyol.config.errors import one_line_errors, require_at_least
from fastbyol.data.inputs.images import INPUTS, add_input_arguments, optional_listing_from
from fastbyol.data.inspection.verification import verify
from fastbyol.host.quantities import count_text

EXAMPLES = f"""\
examples:
  python data_prep/verify.py train.beton                                all 1,281,167 images of ImageNet, 148 GB
  python data_prep/verify.py train_tar --source imagenet/train          compares each image with its original, too
  python data_prep/verify.py val.beton --source ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz

exit code: 0 no faults, 1 faults (one per line: file, image, fault), 2 nothing to verify, 130 stopped by Ctrl-C

--source takes the options of the conversion:
{INPUTS}"""


@stoppable
@one_line_errors
def main() -> None:
    parser = OneLineParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("path", type=Path, metavar="PATH", help="FILE.beton, or a folder of tar shards")
    add_input_arguments(parser, option="--source", required=False)
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="threads that hash and decode (default: one per core)")
    parser.add_argument("--faults", type=int, default=100, metavar="N", help="most faults to print; all are counted (default: 100)")
    arguments = parser.parse_args()
    require_at_least("faults", arguments.faults, 1)
    warnings.filterwarnings("ignore", module="PIL")  # the conversion's report has these warnings about originals already
    originals = optional_listing_from(arguments, option="--source")
    start = time.monotonic()
    found = verify(arguments.path, originals=originals, workers=arguments.workers)
    for note in found.notes:
        say(f"{arguments.path}: note: {note}")
    for fault in found.faults[: arguments.faults]:
        say(str(fault))
    images_per_s = found.num_images / max(time.monotonic() - start, 1e-9)
    # None: nothing beside the data names the classes, so whether there are any is not known.
    labels = "" if found.num_classes is None else f" of {found.num_classes:,} classes" if found.num_classes else " without labels"
    images = f"{found.num_images:,} images{labels}"
    more = f", the first {arguments.faults} shown" if found.num_faults > arguments.faults else ""
    outcome = f"{count_text(found.num_faults, 'fault')}{more}" if found.num_faults else "all is well"
    say(f"{arguments.path}: {outcome}: {images}, {found.num_bytes:,} bytes of them, {images_per_s:,.0f} images/s")
    sys.exit(1 if found.num_faults else 0)


if __name__ == "__main__":
    main()
