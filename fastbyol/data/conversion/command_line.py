"""Command-line options of a conversion, whatever it writes, and the summary that it prints at the end."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

from fastbyol.config.console import say
from fastbyol.data.conversion.encode import EXIF_MODES, MAX_CPU_S, MAX_PIXELS, EncodeSettings
from fastbyol.data.conversion.report import report_summary, report_table
from fastbyol.data.conversion.task import ConversionOptions
from fastbyol.data.formats.manifest import Manifest
from fastbyol.data.inputs.images import add_input_arguments
from fastbyol.host.quantities import bytes_text, count_text
from fastbyol.host.store_path import Place

WHAT_HAPPENS = """\
Baseline and progressive JPEGs, gray or colour, are stored byte for byte, whatever their names; CMYK, PNG, WebP and the like become RGB JPEG.
Truncated, empty, unreadable and non-image files are dropped, and the report names each. Every image is read completely to check it.
After a kill, Ctrl-C or a full disk, the same command (without --restart) continues, and writes the same bytes as without the interruption.
"""


def add_conversion_arguments(parser: ArgumentParser) -> None:
    """Adds the options that every format has. That images are given is checked later, because merging parts needs none."""
    add_input_arguments(parser, required=False)
    work = parser.add_argument_group("the work")
    work.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read and check images (default: one per core)")
    replace = "replace an existing output, once the new one is complete"
    work.add_argument("--overwrite", action="store_const", const="replace", default="refuse", help=replace)
    unfinished = work.add_mutually_exclusive_group()
    resume = "continue an unfinished conversion to this output, or fail (default: continue if there is one)"
    unfinished.add_argument("--resume", action="store_true", help=resume)
    unfinished.add_argument("--restart", action="store_true", help="delete an unfinished conversion to this output and start again")
    work.add_argument("--strict", action="store_true", help="stop at the first image that cannot be kept, with exit code 1")
    work.add_argument(
        "--max-dropped",
        type=float,
        metavar="SHARE",
        help="largest share of images that may be dropped (default: 0.01, or 20 images if that is more)",
    )
    work.add_argument(
        "--flush-every",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds between the points from which an interrupted conversion can continue (default: 10)",
    )
    images = parser.add_argument_group("the images")
    shrink = "shrink images whose longer side exceeds this, by antialiased bicubic interpolation (default: keep the size)"
    images.add_argument("--max-side", type=int, metavar="PX", help=shrink)
    images.add_argument("--quality", type=int, default=95, metavar="Q", help="JPEG quality of transcoded or resized images (default: 95)")
    orientation = f"orientation: {' or '.join(EXIF_MODES)} (default: ignore, as the paper's code does)"
    images.add_argument("--exif", default="ignore", metavar="MODE", help=orientation)
    larger = f"drop images of more pixels without decoding them (default: {MAX_PIXELS:,})"
    images.add_argument("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=larger)
    slower = f"drop an image that takes more seconds of processor time to check (default: {MAX_CPU_S:g})"
    images.add_argument("--max-seconds", type=float, default=MAX_CPU_S, metavar="S", help=slower)


def conversion_options(arguments: Namespace, *, raw_fraction: float = 0.0) -> ConversionOptions:
    """Returns the conversion options that the parsed arguments describe."""
    encode = EncodeSettings(
        max_side_px=arguments.max_side,
        quality=arguments.quality,
        exif=arguments.exif,
        max_pixels=arguments.max_pixels,
        max_cpu_s=arguments.max_seconds,
        raw_fraction=raw_fraction,
    )
    return ConversionOptions(
        encode=encode,
        strict=arguments.strict,
        max_dropped=arguments.max_dropped,
        unfinished="restart" if arguments.restart else "require" if arguments.resume else "continue",
        flush_every_s=arguments.flush_every,
    )


def print_outcome(out: Path, manifest: Manifest, report: Path, *, place: Callable[[Path], Place] = lambda path: path) -> None:
    """Prints the table of the report and a summary line. place: returns the URL to which a local file is uploaded, or the path itself."""
    say(*report_table(report_summary(report)).split("\n"))
    size = sum(shard.bytes for shard in manifest.shards)
    classes = f"of {len(manifest.class_names):,} classes" if manifest.class_names else "without labels"
    counts = f"{manifest.num_samples:,} images {classes}"
    shards = f", {count_text(len(manifest.shards), 'shard')}" if manifest.kind == "tar" else ""
    say(
        f"{place(out)}: {counts}{shards}, {size:,} bytes ({bytes_text(size)}); report: {place(report)}; --labels converts with other labels, or none"
    )
