"""python -m fastbyol embed: the features of every image of a data set, one row an image."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbyol.commands.shared_options import CHECKPOINT_HELP, add_device_option, changes_from, device_named
from fastbyol.config.arguments import local_or_url, path_text
from fastbyol.config.console import say
from fastbyol.config.errors import UserError, require, require_at_least
from fastbyol.config.urls import is_url
from fastbyol.host.signals import INTERRUPTED_EXIT, end_with_torchrun
from fastbyol.host.store_path import Place, place_of
from fastbyol.ranks.ray_cluster import ENGINE_HELP, ENGINES

if TYPE_CHECKING:
    from fastbyol.ranks.process_group import Process

PATIENCE_S = 6 * 3600.0
"""Longest time a rank waits for another one, for example for rank 0 to join the parts. If a rank dies, torchrun ends the others at once."""


def add_embed(commands: Any) -> None:
    """Adds the command to the parser's sub-commands."""
    parser = commands.add_parser("embed", help="write the features of every image to Parquet, npz or npy", description=embed_images.__doc__)
    parser.add_argument("--checkpoint", required=True, type=path_text, help=CHECKPOINT_HELP)
    parser.add_argument(
        "--data", required=True, type=local_or_url, help="the images, with or without labels, in any form that a run can train from"
    )
    out = "file to write, .parquet, .npz or .npy; if it is a URL (s3://, gs://, hf://), the file is uploaded there at the end"
    parser.add_argument("--out", required=True, type=local_or_url, help=out)
    parser.add_argument(
        "--labels",
        default="auto",
        metavar="HOW",
        help="source of the labels of images that were not converted: auto, folders, none or a file (%(default)s)",
    )
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32", help="type of the features (%(default)s)")
    parser.add_argument(
        "--projection", action="store_true", help="also write the projector's output, as a second block (only for checkpoints of fastbyol)"
    )
    parser.add_argument("--batch", type=int, default=256, help="images per forward pass (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="decoding threads of each process; 0: one per core of its share")
    add_device_option(parser)
    parser.add_argument("--engine", choices=ENGINES, default="local", help=ENGINE_HELP)
    parser.set_defaults(command=embed_images)


def embed_images(options: argparse.Namespace) -> None:
    """Writes the encoder's features of every image, centre-cropped: one row per image, with its name in the data and its label if it has one.

    .parquet   columns name, label (-1: none), feature, projection; class names and all settings in the schema's metadata
    .npz       arrays name, label, feature, projection, facts (JSON)
    .npy       the features alone; names, labels and settings lie beside it in a .json of the same name

    Under torchrun each process embeds its share; with --engine ray, the processes of a cluster embed and this one writes. To continue
    after a kill, repeat the command.
    """
    require_at_least("--batch", options.batch, 1)
    require_at_least("--workers", options.workers, 0)
    changes = changes_from(options.run_options)
    import torch

    from fastbyol.evaluation.embedding import embed
    from fastbyol.evaluation.feature_file import FeatureFile
    from fastbyol.ranks.process_group import Process, join_process_group, leave_process_group, lost_ranks_named

    if options.engine == "local":
        device_named(options.device)  # refused before the ranks join
    end_with_torchrun()
    process = join_process_group(timeout_s=PATIENCE_S)
    if options.device == "cpu" or (options.engine == "ray" and options.device == "cuda"):
        process = Process(process.rank, process.world_size, torch.device(options.device))
    if options.engine == "ray":
        require(process.world_size == 1, "--engine ray with WORLD_SIZE", process.world_size, "started as one process, without torchrun")
    try:
        with lost_ranks_named(process), _made_here(place_of(options.out), options, process) as (out, is_made):
            file = (
                FeatureFile(out)
                if is_made
                else embed(
                    options.checkpoint,
                    options.data,
                    out=out,
                    dtype=options.dtype,
                    projection=options.projection,
                    labels=options.labels,
                    changes=changes,
                    batch=options.batch,
                    workers=options.workers,
                    process=None if options.engine == "ray" and options.device == "auto" else process,
                    engine=options.engine,
                    announce=lambda text: say(f"... {text}", file=sys.stderr),
                )
            )
    except KeyboardInterrupt:
        say("fastbyol: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT)
    finally:
        leave_process_group()
    if process.is_main:
        facts = file.facts
        say(f"embedded: {facts.num_images:,} images, {facts.feature_dim} numbers of {facts.dtype} each: {options.out}")
        if file.path.suffix == ".npy":
            say(f"names, labels and settings: {place_of(options.out).with_suffix('.json')}")
        if is_url(options.out):
            return  # `neighbours` reads files of this machine
        query = shlex.quote(file.names[0])
        say(f"next: python -m fastbyol neighbours --features {shlex.quote(str(options.out))} --query {query} --out neighbours.png")


@contextmanager
def _made_here(out: Place, options: argparse.Namespace, process: Process) -> Iterator[tuple[Path, bool]]:
    """Yields the path to write on this machine, and whether an earlier command has written it already; uploads it at the end if `out` is a URL."""
    if isinstance(out, Path):
        yield out, False
        return
    from fastbyol.host.staged_output import StagedOutput, staging_path
    from fastbyol.ranks.process_group import broadcast_from_main

    if not process.is_main:
        is_made = broadcast_from_main(False)
        yield staging_path(out), is_made
        return
    names = ("checkpoint", "data", "labels", "dtype", "projection", "run_options")
    with StagedOutput(out, settings={name: str(getattr(options, name)) for name in names}) as staged:
        if not staged.is_made and out.exists():
            raise UserError(f"--out {out}: exists already; remove it or choose another file")
        yield staged.path, broadcast_from_main(staged.is_made)
        if not staged.is_made:
            staged.made()
        # Upload an .npy last: the files beside it are then complete.
        staged.upload(last=lambda path: int(path == staged.path))
