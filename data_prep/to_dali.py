"""Converts a folder of images to WebDataset tar shards with indices for the DALI backend."""

from __future__ import annotations

from pathlib import Path

from fastbyol.config.errors import one_line_errors
from fastbyol.data.command_line import conversion_parser, overwrite_mode
from fastbyol.data.writers_tar import write_tar_shards

EXAMPLES = """\
examples:
  python data_prep/to_dali.py --data imagenet/train --out train_tar       1,281,167 images: 150 GB in about 570 shards
  python data_prep/to_dali.py --data demo/train --out demo/train_tar --shard-mb 16 --seed 1

JPEG files of 1 or 3 components go in byte for byte; all else becomes RGB JPEG of quality 95. Every image is decoded once to check it.
Beside the shards: a DALI index each, samples.npy (where each image lies) and manifest.json (class names, settings, checksums).
"""


@one_line_errors
def main() -> None:
    parser = conversion_parser(__doc__ or "", EXAMPLES)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument("--shard-mb", type=int, default=256, metavar="N", help="size of a shard in MiB (default: 256)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the order in which images go into the shards (default: 0)")
    arguments = parser.parse_args()
    manifest = write_tar_shards(
        arguments.data,
        out=arguments.out,
        workers=arguments.workers,
        shard_mib=arguments.shard_mb,
        seed=arguments.seed,
        overwrite=overwrite_mode(arguments),
    )
    size = sum(shard.bytes for shard in manifest.shards)
    counts = f"{manifest.num_samples:,} images of {len(manifest.class_names):,} classes"
    print(f"{arguments.out}: {counts}, {len(manifest.shards)} shards, {size:,} bytes")


if __name__ == "__main__":
    main()
