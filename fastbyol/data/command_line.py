"""The options that both converters have."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from fastbyol.config.arguments import OneLineParser


def conversion_parser(description: str, examples: str) -> OneLineParser:
    """A parser with --data, --workers and --overwrite; the examples stand below the options in --help."""
    parser = OneLineParser(description=description, epilog=examples)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder with one sub-folder of images per class")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read and check images (default: one per core)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser


def overwrite_mode(arguments: Namespace) -> str:
    """What the writers call it: 'replace' or 'refuse'."""
    return "replace" if arguments.overwrite else "refuse"
