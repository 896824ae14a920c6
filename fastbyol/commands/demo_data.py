"""python -m fastbyol demo-data: the demo's images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastbyol.config.arguments import OneLineParser
from fastbyol.config.console import say
from fastbyol.config.errors import require_choice
from fastbyol.host.signals import stoppable

EXAMPLES = """\
examples:
  python -m fastbyol demo-data --out demo                  Fashion-MNIST's photographs at random places, sizes and angles: 10 classes
  python -m fastbyol demo-data --out demo --kind scenes    drawn from code alone: 16 classes; voc/ and nyu/ have masks, boxes, depth
"""


def add_demo_data(commands: Any) -> None:
    """Adds the command to the parser's sub-commands."""
    commands.add_parser("demo-data", help="make the demo's images", description=make_demo_data.__doc__, epilog=EXAMPLES, later=_add_options)


def _add_options(parser: OneLineParser) -> None:
    from fastbyol.data.demo.folder import DemoSettings

    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--kind", default="fashion", help="fashion or scenes (default: %(default)s)")
    parser.add_argument(
        "--train-per-class", type=int, default=DemoSettings.train_per_class, help="training images of each class (default: %(default)s)"
    )
    parser.add_argument(
        "--val-per-class", type=int, default=DemoSettings.val_per_class, help="test images of each class (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=DemoSettings.seed, help="seed of the choice of photographs, or of the drawings (default: %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing demo folder at --out")
    parser.set_defaults(command=make_demo_data)


@stoppable
def make_demo_data(options: argparse.Namespace) -> None:
    """Makes the demo's ImageFolder: train/ and val/ of small JPEG images, byte-identical for the same seed."""
    from fastbyol.data.demo.fashion import write_fashion
    from fastbyol.data.demo.folder import DemoSettings
    from fastbyol.data.demo.scenes import write_scenes

    writers = {"fashion": write_fashion, "scenes": write_scenes}
    require_choice("kind", options.kind, tuple(writers))
    settings = DemoSettings(train_per_class=options.train_per_class, val_per_class=options.val_per_class, seed=options.seed)
    writers[options.kind](options.out, settings=settings, overwrite=options.overwrite)
    say(f"{options.out}: {options.kind}, {settings.train_per_class} + {settings.val_per_class} images a class")
