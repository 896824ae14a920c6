"""python -m fastbyol convert: images to one .beton file, or to tar shards."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbyol.config.arguments import OneLineParser, local_or_url, through_links
from fastbyol.config.console import say
from fastbyol.config.errors import RunError, UserError, require
from fastbyol.host.signals import Stopped, stoppable
from fastbyol.host.store_path import Place, StorePath, place_of

if TYPE_CHECKING:
    from fastbyol.data.formats.manifest import Manifest
    from fastbyol.data.inputs.listing import ImageListing

EXAMPLES = """\
examples (sizes: ImageNet's 1,281,167 training images, 147 GB of JPEG files):
  python -m fastbyol convert --data imagenet/train --out train.beton                           148 GB: the images' own bytes
  python -m fastbyol convert --data imagenet/train --out train.beton --max-side 512 --quality 90    about 65 GB
  python -m fastbyol convert --data imagenet/train --out train.beton --max-side 256 --raw      about 170 GB: no decoding at all
  python -m fastbyol convert --data ILSVRC2012_img_train.tar --out train.beton                 as downloaded, read in place
  python -m fastbyol convert --data ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz --out val.beton    6.7 GB
  python -m fastbyol convert --data imagenet/train --to dali --out train_tar                   150 GB in about 570 shards
  python -m fastbyol convert --data demo/train --to dali --out demo/train_tar --shard-mb 16 --seed 1

tar shards on a cluster of Ray whose nodes share a file system (RAY_ADDRESS names the cluster; without it, Ray runs on this machine):
  python -m fastbyol convert --data /shared/imagenet/train --to dali --out /shared/train_tar --engine ray --parts 256

tar shards on four machines with one file system, then on one of them (--shard auto takes the numbers of torchrun, srun or a SLURM array):
  python -m fastbyol convert --data imagenet/train --to dali --out train_tar --shard 0/4       and 1/4, 2/4, 3/4
  python -m fastbyol convert --to dali --out train_tar --merge                                 with --data DIR, also checks against it

from a bucket, to a bucket (docs/data.md: Data in object stores):
  python -m fastbyol convert --data s3://photos/2024 --out s3://photos/2024.beton

Beside train.beton: train.beton.json, the manifest (class names, settings, checksum), and train.beton.report.json. Beside the shards: one DALI
index each, samples.npy (location of each image), manifest.json (class names, settings, checksums), report.json.

"""
WRITTEN = {"ffcv": "a .beton", "dali": "tar shards"}
OPTIONS_OF = {"ffcv": ("shuffle_seed", "raw", "raw_fraction"), "dali": ("shard_mb", "seed", "shard", "merge", "engine", "parts")}
"""Options that only one format has, by format."""


def add_convert(commands: Any) -> None:
    """Adds the command to the parser's sub-commands."""
    what = "convert images to one .beton file or to tar shards, for fast reading"
    commands.add_parser("convert", help=what, description=convert_images.__doc__, later=_add_options)


def _add_options(parser: OneLineParser) -> None:
    from fastbyol.data.conversion.command_line import WHAT_HAPPENS, add_conversion_arguments
    from fastbyol.data.inputs.images import INPUTS
    from fastbyol.ranks.ray_cluster import ENGINE_HELP, ENGINES

    parser.epilog = "\n".join([EXAMPLES + INPUTS, WHAT_HAPPENS])
    kind = "ffcv: one .beton file for the FFCV backend; dali: WebDataset tar shards with indices for DALI (default: ffcv if --out ends in .beton)"
    parser.add_argument("--to", choices=tuple(WRITTEN), help=kind)
    out = "the .beton file or the folder of tar shards to write; if it is a URL (s3://, gs://, hf://), the result is uploaded there at the end"
    parser.add_argument("--out", type=local_or_url, required=True, metavar="PATH", help=out)
    add_conversion_arguments(parser)
    beton = parser.add_argument_group("a .beton")
    shuffle = (
        "store the images in a random order with this seed, for readers that read the file sequentially (default: the listing's order; "
    )
    beton.add_argument("--shuffle-seed", type=int, metavar="N", help=f"{shuffle}our loader shuffles by itself)")
    beton.add_argument("--raw", action="store_true", help="store pixels instead of JPEGs: at least 5 times the size, but no decoding")
    beton.add_argument("--raw-fraction", type=float, metavar="SHARE", help="store this share of the images as pixels")
    shards = parser.add_argument_group("tar shards")
    shards.add_argument("--shard-mb", type=int, default=256, metavar="N", help="size of a shard in MiB (default: 256)")
    shards.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the images' random order in the shards (default: 0)")
    shards.add_argument(
        "--shard",
        metavar="I/N",
        help="convert only part I of N, counted from 0: a different one on each machine; auto: as torchrun, srun or a SLURM array numbers it",
    )
    shards.add_argument("--engine", choices=ENGINES, default="local", help=ENGINE_HELP)
    shards.add_argument(
        "--parts", type=int, metavar="N", help="with --engine ray: number of tasks among which the images are divided (default: 64)"
    )
    shards.add_argument("--merge", action="store_true", help="merge the parts in --out into one data set")
    parser.set_defaults(command=convert_images, default_of=parser.get_default)


@stoppable
def convert_images(options: argparse.Namespace) -> None:
    """Converts images to one .beton file for the FFCV backend, or to WebDataset tar shards with indices for the DALI backend."""
    out = place_of(options.out)
    kind = options.to or ("ffcv" if out.suffix == ".beton" else "dali")
    for other in OPTIONS_OF.keys() - {kind}:
        _refuse_changed(options, OPTIONS_OF[other], f"has no effect on {WRITTEN[kind]}; leave it out, or --to {other}")
    if not (options.merge or options.data):
        but = " (only --merge needs none)" if kind == "dali" else ""
        raise UserError(f"--data: missing; give the images to convert{but}")
    convert = _to_beton if kind == "ffcv" else _merge if options.merge else _to_tar_shards
    try:
        if isinstance(out, StorePath):
            _to_store(out, options, convert)
        else:
            options.out, options.place = out, _unchanged
            convert(options)
    except (UserError, RunError, Stopped) as error:
        if options.restart:  # repeating the command with --restart would delete the finished part
            error.args = (
                re.sub("(?<=[Tt]he same command)(?= (continues|goes|tries|uploads))", " without --restart", str(error)),
                *error.args[1:],
            )
        raise


def _unchanged(path: Path) -> Path:
    return path


def _to_store(out: StorePath, options: argparse.Namespace, convert: Callable[[argparse.Namespace], None]) -> None:
    """Converts into a local folder, then uploads the result to `out`."""
    from fastbyol.data.conversion.remote_output import convert_to_store
    from fastbyol.data.conversion.tar_parts import part_name
    from fastbyol.ranks.parts import parse_part

    if options.engine == "ray":
        raise UserError(f"--out {out}: --engine ray needs a folder that every node shares; convert there and copy it, or use --shard I/N")
    without_effect = {"command", "default_of", "run_options", "typed", "out", "workers", "overwrite", "resume", "restart", "strict"}
    settings = {name: str(value) for name, value in vars(options).items() if name not in without_effect | {"max_dropped", "flush_every"}}

    def make(path: Path, place: Callable[[Path], Place]) -> None:
        options.out, options.place = path, place
        convert(options)

    convert_to_store(
        out,
        make,
        settings=settings,
        part="merge" if options.merge else part_name(parse_part(options.shard, option="--shard")) if options.shard else "",
        overwrite=options.overwrite,
        unfinished="restart" if options.restart else "continue",
    )


def _refuse_changed(options: argparse.Namespace, names: Collection[str], why: str) -> None:
    """Raises UserError for the first of these options whose value is not its default."""
    for name in names:
        if getattr(options, name) != options.default_of(name):
            raise UserError(f"--{name.replace('_', '-')}: {why}")


def _to_beton(options: argparse.Namespace) -> None:
    from fastbyol.data.conversion.beton_writer import write_beton
    from fastbyol.data.conversion.command_line import conversion_options, print_outcome
    from fastbyol.data.conversion.report import report_path
    from fastbyol.data.inputs.images import listing_from

    require(not (options.raw and options.raw_fraction is not None), "raw-fraction", options.raw_fraction, "left out beside --raw")
    out = through_links(options.out)
    manifest = write_beton(
        partial(listing_from, options),
        out=out,
        workers=options.workers,
        overwrite=options.overwrite,
        shuffle_seed=options.shuffle_seed,
        options=conversion_options(options, raw_fraction=1.0 if options.raw else options.raw_fraction or 0.0),
    )
    print_outcome(out, manifest, report_path(out), place=options.place)


def _merge(options: argparse.Namespace) -> None:
    from fastbyol.data.conversion.command_line import conversion_options, print_outcome
    from fastbyol.data.conversion.tar_parts import merge_tar_parts
    from fastbyol.data.formats.tar_shards import TAR_REPORT
    from fastbyol.data.inputs.images import LABEL_OPTIONS, optional_listing_from

    if options.shard:
        raise UserError("--merge does not go with --shard; run it by itself, after every part is converted")
    kept = {"to", "merge", "out", "place", "max_dropped", "data", *LABEL_OPTIONS, "command", "default_of", "run_options", "typed"}
    _refuse_changed(
        options,
        [name for name in vars(options) if name not in kept],
        "has no effect with --merge, which leaves the parts as they were converted; leave it out",
    )
    originals = optional_listing_from(options, option="--data")
    manifest = merge_tar_parts(options.out, data=originals, options=conversion_options(options), place=options.place)
    print_outcome(options.out, manifest, options.out / TAR_REPORT, place=options.place)


def _to_tar_shards(options: argparse.Namespace) -> None:
    from fastbyol.data.conversion.command_line import conversion_options, print_outcome
    from fastbyol.data.conversion.tar_parts import write_tar_part
    from fastbyol.data.conversion.tar_writer import write_tar_shards
    from fastbyol.data.formats.tar_shards import TAR_REPORT
    from fastbyol.data.inputs.images import listing_from
    from fastbyol.host.quantities import bytes_text, count_text
    from fastbyol.ranks.parts import parse_part

    data, out = partial(listing_from, options), options.out
    settings: dict[str, Any] = {
        "workers": options.workers,
        "shard_mib": options.shard_mb,
        "seed": options.seed,
        "options": conversion_options(options),
    }
    on_ray = options.engine == "ray"
    if options.parts is not None and not on_ray:
        raise UserError("--parts: has an effect with --engine ray only; --shard I/N converts one part")
    if on_ray or not options.shard:
        manifest = _on_ray(data, options, settings) if on_ray else write_tar_shards(data, out=out, overwrite=options.overwrite, **settings)
        print_outcome(out, manifest, out / TAR_REPORT, place=options.place)
        return
    if options.overwrite == "replace":
        raise UserError("--overwrite does not go with --shard, whose folder belongs to several machines; remove the folder yourself")
    part = parse_part(options.shard, option="--shard")
    shards = write_tar_part(data, out=out, part=part, **settings)
    size, images = sum(shard.bytes for shard in shards), sum(shard.samples for shard in shards)
    told = f"{images:,} images, {count_text(len(shards), 'shard')}, {size:,} bytes ({bytes_text(size)})"
    say(f"{options.place(out)}: part {part.number}/{part.count}: {told}")


def _on_ray(data: partial[ImageListing], options: argparse.Namespace, settings: dict[str, Any]) -> Manifest:
    from fastbyol.data.conversion.ray_parts import DEFAULT_PARTS, write_tar_shards_on_ray

    if options.shard:
        raise UserError("--shard: does not go with --engine ray, whose tasks are the parts; --parts N says how many")
    if options.overwrite == "replace":
        raise UserError("--overwrite does not go with --engine ray, whose folder belongs to several machines; remove the folder yourself")
    if options.resume:
        raise UserError("--resume does not go with --engine ray, which continues the parts that were begun and begins the others")
    parts = DEFAULT_PARTS if options.parts is None else options.parts
    return write_tar_shards_on_ray(data, out=options.out, parts=parts, **settings)
