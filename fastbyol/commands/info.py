"""python -m fastbyol info: what a data set holds."""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbyol.config.arguments import OneLineParser, local_or_url
from fastbyol.config.console import printable, say
from fastbyol.config.errors import UserError
from fastbyol.host.signals import stoppable

if TYPE_CHECKING:
    from fastbyol.data.inspection.inventory import Inventory

EXAMPLES = """\
examples:
  python -m fastbyol info train.beton
  python -m fastbyol info train_tar --json | jq .class_counts
  python -m fastbyol info imagenet/train --grid train.png                                  12 classes, 8 images of each
  python -m fastbyol info ILSVRC2012_img_val.tar --devkit ILSVRC2012_devkit_t12.tar.gz

"""


def add_info(commands: Any) -> None:
    """Adds the command to the parser's sub-commands."""
    commands.add_parser("info", help="show the images, classes and sizes of a data set", description=print_info.__doc__, later=_add_options)


def _add_options(parser: OneLineParser) -> None:
    from fastbyol.data.inputs.images import INPUTS, add_label_arguments

    parser.epilog = EXAMPLES + INPUTS
    what = "FILE.beton, folder of tar shards, or images that were not converted; each may be a URL"
    parser.add_argument("data", type=local_or_url, metavar="PATH", help=what)
    add_label_arguments(parser)
    parser.add_argument("--grid", type=Path, metavar="FILE.png", help="write a picture of some images of some classes")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, with the count of each class")
    parser.set_defaults(command=print_info)


@stoppable
def print_info(options: argparse.Namespace) -> None:
    """Prints statistics of a data set: a .beton, a folder of tar shards, a folder of images, or a tar of images."""
    from fastbyol.data.inputs.images import label_options, listing_from
    from fastbyol.data.inspection.converted import converted_at
    from fastbyol.data.inspection.inventory import take_inventory
    from fastbyol.data.inspection.picture_grid import write_picture_grid

    warnings.filterwarnings("ignore", module="PIL")  # the converters report odd images
    given = label_options(options)
    notes: list[str] = []
    converted = converted_at(options.data)
    if converted and given:
        raise UserError(
            f"--{given[0]}: {options.data} is converted and has its labels; leave the option out, it is for images that were not converted"
        )
    images = converted or listing_from(options, option="data", tell=notes.append)
    inventory = take_inventory(images, shown=options.data)
    if options.grid:
        write_picture_grid(images, out=options.grid)
    if options.json:
        say(*json.dumps(asdict(inventory) | {"notes": notes}, indent=1).split("\n"))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(inventory, notes):
        table.add_row(name, Text(printable(value)))
    Console().print(table)


def _rows(inventory: Inventory, notes: list[str]) -> list[tuple[str, str]]:
    names = inventory.class_names
    shown = ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])} … {names[-1]}"
    empty = f"; {inventory.empty_classes:,} classes have none" if inventory.empty_classes else ""
    per_class = f"{inventory.class_min:,} to {inventory.class_max:,}, median {inventory.class_median:,g}{empty}"
    rows = [
        ("data", f"{inventory.path} ({inventory.kind})"),
        ("images", f"{inventory.images:,}"),
        ("classes", f"{inventory.classes:,}: {shown}" if names else "no labels"),
        *([("per class", per_class)] if names else []),
        *([("unlabelled", f"{inventory.unlabelled:,} of the images")] if names and inventory.unlabelled else []),
        ("bytes", f"{inventory.image_bytes:,} of images, {inventory.image_bytes / inventory.images:,.0f} each"),
    ]
    if sides := inventory.sides:
        sample = "" if sides.looked_at == inventory.images else f" (of {sides.looked_at:,} images)"
        rows += [
            ("width", f"{sides.width_min:,} to {sides.width_max:,} px, median {sides.width_median:,}{sample}"),
            ("height", f"{sides.height_min:,} to {sides.height_max:,} px, median {sides.height_median:,}{sample}"),
            ("density", f"{sides.bytes_per_pixel:.3f} bytes per pixel, {sides.mean_pixels:,.0f} pixels each{sample}"),
        ]
    rows += [("note", note) for note in notes]
    if manifest := inventory.manifest:
        sizes = [shard["bytes"] for shard in manifest["shards"]]
        shards = f"{len(sizes):,} of {min(sizes):,} to {max(sizes):,} bytes" if len(sizes) > 1 else f"1 of {sizes[0]:,} bytes"
        rows += [("shards", shards), ("source", _pairs(manifest["source"])), ("settings", _pairs(manifest["settings"]))]
        if manifest["dropped"]:
            rows.append(("dropped", f"{len(manifest['dropped']):,} images of the source"))
        rows.append(("software", _pairs(manifest["software"])))
    return rows


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
