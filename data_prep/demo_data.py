"""Makes the demo's ImageFolder: train/ and val/ of small JPEG images, byte-identical for the same seed."""

from __future__ import annotations

from fastbyol.host.signals import end_at_once_when_stopped, stoppable

if __name__ == "__main__":
    end_at_once_when_stopped()  # the imports take a moment

from pathlib import Path

from fastbyol.config.arguments import OneLineParser
from fastbyol.config.console import say
from fastbyol.config.errors import one_line_errors, require_choice
from fastbyol.data.demo.fashion import write_fashion
from fastbyol.data.demo.folder import DemoSettings
from fastbyol.data.demo.scenes import write_scenes

EXAMPLES = """\
examples:
  python data_prep/demo_data.py --out demo                  Fashion-MNIST's photographs at random places, sizes and angles: 10 classes
  python data_prep/demo_data.py --out demo --kind scenes    drawn from code alone: 16 classes; voc/ and nyu/ have masks, boxes, depth
"""
WRITERS = {"fashion": write_fashion, "scenes": write_scenes}


@stoppable
@one_line_errors
def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__, epilog=EXAMPLES)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--kind", default="fashion", help="fashion or scenes (default: %(default)s)")
    parser.add_argument("--train-per-class", type=int, default=DemoSettings.train_per_class, help="default: %(default)s")
    parser.add_argument("--val-per-class", type=int, default=DemoSettings.val_per_class, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=DemoSettings.seed, help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing demo folder at --out")
    options = parser.parse_args(arguments)
    require_choice("kind", options.kind, tuple(WRITERS))
    settings = DemoSettings(train_per_class=options.train_per_class, val_per_class=options.val_per_class, seed=options.seed)
    WRITERS[options.kind](options.out, settings=settings, overwrite=options.overwrite)
    say(f"{options.out}: {options.kind}, {settings.train_per_class} + {settings.val_per_class} images a class")


if __name__ == "__main__":
    main()
