"""Converts images to WebDataset tar shards with indices for the DALI backend."""

from __future__ import annotations

from fastbyol.host.signals import end_at_once_when_stopped, stoppable

if __name__ == "__main__":
    end_at_once_when_stopped()  # the imports take a moment

from functools import partial
from pathlib import Path
from typing import Any

from fastbyol.config.console import say
from fastbyol.config.errors import UserError, one_line_errors
from fastbyol.data.conversion.command_line import conversion_options, conversion_parser, print_outcome
from fastbyol.data.conversion.tar_parts import merge_tar_parts, parse_part, write_tar_part
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.data.formats.tar_shards import TAR_REPORT
from fastbyol.data.inputs.images import LABEL_OPTIONS, listing_from, optional_listing_from
from fastbyol.host.quantities import bytes_text, count_text

EXAMPLES = """\
examples (sizes: ImageNet's 1,281,167 training images, 147 GB of JPEG files):
  python data_prep/to_dali.py --data imagenet/train --out train_tar                             150 GB in about 570 shards
  python data_prep/to_dali.py --data imagenet/train --out train_tar --max-side 512 --quality 90    about 68 GB
  python data_prep/to_dali.py --data demo/train --out demo/train_tar --shard-mb 16 --seed 1

on four machines with one file system, then on one of them (--shard auto takes the numbers of torchrun or SLURM):
  python data_prep/to_dali.py --data imagenet/train --out train_tar --shard 0/4                 and 1/4, 2/4, 3/4
  python data_prep/to_dali.py --out train_tar --merge                                           --data DIR as well: checked against it

Beside the shards: one DALI index each, samples.npy (location of each image), manifest.json (class names, settings, checksums), report.json.
"""

OPTIONS_OF_MERGE = {"merge", "out", "max_dropped", "data", *LABEL_OPTIONS}


@stoppable
@one_line_errors
def main() -> None:
    parser = conversion_parser(__doc__ or "", EXAMPLES, data="optional")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--shard-mb", type=int, default=256, metavar="N", help="size of a shard in MiB (default: 256)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the images' random order in the shards (default: 0)")
    parser.add_argument("--shard", metavar="I/N", help="convert only part I of N, counted from 0, or 'auto'; each machine a different one")
    parser.add_argument("--merge", action="store_true", help="merge the parts in --out into one data set")
    arguments = parser.parse_args()
    if arguments.merge and arguments.shard:
        raise UserError("--merge comes after all --shard runs, in a command of its own")
    if not (arguments.merge or arguments.data):
        raise UserError("--data: missing; give the images to convert (only --merge can do without)")
    if arguments.merge:
        for name, value in vars(arguments).items():
            if name not in OPTIONS_OF_MERGE and value != parser.get_default(name):
                raise UserError(f"--{name.replace('_', '-')}: has no effect with --merge; the parts are as they were converted")
        originals = optional_listing_from(arguments, option="--data")
        manifest = merge_tar_parts(arguments.out, data=originals, options=conversion_options(arguments))
        print_outcome(arguments.out, manifest, arguments.out / TAR_REPORT)
        return
    data, out, options = partial(listing_from, arguments), arguments.out, conversion_options(arguments)
    settings: dict[str, Any] = {"workers": arguments.workers, "shard_mib": arguments.shard_mb, "seed": arguments.seed, "options": options}
    if not arguments.shard:
        manifest = write_tar_shards(data, out=out, overwrite=arguments.overwrite, **settings)
        print_outcome(out, manifest, out / TAR_REPORT)
        return
    if arguments.overwrite == "replace":
        raise UserError("--overwrite does not go with --shard, whose folder belongs to several machines; remove the folder yourself")
    part = parse_part(arguments.shard)
    shards = write_tar_part(data, out=out, part=part, **settings)
    size, images = sum(shard.bytes for shard in shards), sum(shard.samples for shard in shards)
    told = f"{images:,} images, {count_text(len(shards), 'shard')}, {size:,} bytes ({bytes_text(size)})"
    say(f"{out}: part {part.number}/{part.count}: {told}")


if __name__ == "__main__":
    main()
