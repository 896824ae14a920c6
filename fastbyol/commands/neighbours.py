"""python -m fastbyol neighbours: the images nearest to one image, as a picture and as JSON."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastbyol.config.arguments import local_or_url, path_text
from fastbyol.config.console import say


def add_neighbours(commands: Any) -> None:
    """Adds the command to the parser's sub-commands."""
    parser = commands.add_parser("neighbours", help="find the images nearest to one image", description=draw_neighbours.__doc__)
    parser.add_argument("--features", required=True, type=path_text, help="file of features written by python -m fastbyol embed")
    parser.add_argument("--query", required=True, type=path_text, help="name of one of its rows, or an image file")
    parser.add_argument("--k", type=int, default=20, help="number of neighbours (%(default)s)")
    parser.add_argument("--checkpoint", type=path_text, help="encoder for an image file (default: the one that the features name)")
    parser.add_argument(
        "--data", type=local_or_url, help="the images that the features belong to (default: where they were when they were embedded)"
    )
    parser.add_argument("--out", required=True, type=Path, help="PNG file to write; a .json of the same name is written beside it")
    parser.set_defaults(command=draw_neighbours)


def draw_neighbours(options: argparse.Namespace) -> None:
    """Draws an image and its nearest ones by cosine similarity of their features, and writes names, labels and similarities as JSON.

    A query that is a row of the features is never its own neighbour; an image file is embedded with the checkpoint that the features name.
    """
    from fastbyol.evaluation.neighbours import write_neighbours

    found = write_neighbours(
        options.features, options.query, out=options.out, k=options.k, checkpoint=options.checkpoint, data=options.data
    )
    for neighbour in found[:5]:
        say(f"{neighbour.cosine:.4f}  {neighbour.name}" + (f"  {neighbour.label}" if neighbour.label else ""))
    say(f"neighbours: {options.out} and {options.out.with_suffix('.json')} ({len(found)})")
