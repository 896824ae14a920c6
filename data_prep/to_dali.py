"""Converts images to WebDataset tar shards with indices for the DALI backend."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path

from fastbyol.config.errors import UserError
from fastbyol.data.conversion.command_line import conversion_command, conversion_options, conversion_parser, overwrite_mode, print_outcome
from fastbyol.data.conversion.tar_parts import merge_tar_parts, parse_part, write_tar_part
from fastbyol.data.conversion.tar_writer import write_tar_shards
from fastbyol.data.inputs.images import listing_from
from fastbyol.data.quantities import bytes_text
from fastbyol.data.tar_shards import TAR_REPORT

EXAMPLES = """\
examples (sizes: ImageNet's 1,281,167 training images, 147 GB of JPEG files):
  python data_prep/to_dali.py --data imagenet/train --out train_tar                             150 GB in about 570 shards
  python data_prep/to_dali.py --data imagenet/train --out train_tar --max-side 512 --quality 90    about 68 GB
  python data_prep/to_dali.py --data demo/train --out demo/train_tar --shard-mb 16 --seed 1

on four machines with one file system, then on one of them (--shard auto: by torchrun's or SLURM's numbers):
  python data_prep/to_dali.py --data imagenet/train --out train_tar --shard 0/4                 and 1/4, 2/4, 3/4
  python data_prep/to_dali.py --data imagenet/train --out train_tar --merge

Beside the shards: a DALI index each, samples.npy (where each image lies), manifest.json (class names, settings, checksums), report.json.
"""


@conversion_command
def main() -> None:
    parser = conversion_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--shard-mb", type=int, default=256, metavar="N", help="size of a shard in MiB (default: 256)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order in which images go into the shards (default: 0)")
    parser.add_argument("--shard", metavar="I/N", help="convert only part I of N, counted from 0, or 'auto'; every machine another one")
    parser.add_argument("--merge", action="store_true", help="make one data set of the parts in --out")
    arguments = parser.parse_args()
    if arguments.merge and arguments.shard:
        raise UserError("--merge comes after all --shard runs, in a command of its own")
    if arguments.shard:
        _convert_part(arguments)
        return
    if arguments.merge:
        manifest = merge_tar_parts(partial(listing_from, arguments), out=arguments.out, options=conversion_options(arguments))
    else:
        manifest = write_tar_shards(
            partial(listing_from, arguments),
            out=arguments.out,
            workers=arguments.workers,
            shard_mib=arguments.shard_mb,
            seed=arguments.seed,
            overwrite=overwrite_mode(arguments),
            options=conversion_options(arguments),
        )
    print_outcome(arguments.out, manifest, arguments.out / TAR_REPORT)


def _convert_part(arguments: Namespace) -> None:
    if arguments.overwrite:
        raise UserError("--overwrite does not go with --shard, whose folder belongs to several machines; remove the folder yourself")
    part = parse_part(arguments.shard)
    shards = write_tar_part(
        partial(listing_from, arguments),
        out=arguments.out,
        part=part,
        workers=arguments.workers,
        shard_mib=arguments.shard_mb,
        seed=arguments.seed,
        options=conversion_options(arguments),
    )
    size, images = sum(shard.bytes for shard in shards), sum(shard.samples for shard in shards)
    print(f"{arguments.out}: part {part.number}/{part.count}: {images:,} images, {len(shards)} shards, {size:,} bytes ({bytes_text(size)})")


if __name__ == "__main__":
    main()
