"""Measures on a GPU machine, in under eight minutes, what only a GPU can show; writes DIR/records.json, report.md and report.html.

python -m benchmarks.gpu_plan --out benchmarks/results/2026-12-01_h100
python -m benchmarks.gpu_plan step augment --out DIR      some parts only
python -m benchmarks.gpu_plan --out DIR --device cpu --tiny       a dry run that finds mistakes in the plan; its figures mean nothing

Each part runs in a process of its own. A part that lacks a package is skipped; one that fails, dies or takes too long is recorded as
failed, and the others go on. Works without DALI and FFCV. Files are generated; nothing is downloaded. DIR/PART.log holds a part's
output.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.gpu import PARTS, Findings, Place, load_part
from benchmarks.imagenet_like import write_imagenet_like
from benchmarks.own_process import PartFailed, run_isolated
from benchmarks.record import CaseResult
from benchmarks.record_file import FILE, new_record, read_record, write_record
from benchmarks.report import write_reports
from benchmarks.report_text import case_table
from benchmarks.run import log_console, make_folder, print_skipped
from fastbyol.config.arguments import OneLineParser
from fastbyol.config.errors import UserError, one_line_errors, require_positive
from fastbyol.config.plain import nearest_name
from fastbyol.host.cores import default_workers

BUDGET_S = 460.0
"""Seconds for all parts together, so that the command ends within eight minutes."""
SHORTEST_S = 20.0
"""A part with fewer seconds left is not started: loading torch and CUDA alone takes half of that."""
LIMITS_S = {"step": 120.0, "augment": 120.0, "step_compiled": 180.0, "launches": 120.0, "end_to_end": 90.0}
LIMIT_S = 60.0
"""Time limit of any other part."""
NEEDS_IMAGES = ("decode", "end_to_end")
NUM_CLASSES = 10


@dataclass(frozen=True)
class Scale:
    """Size of a plan. images: number of generated images, a multiple of every part's batch. image_scale: scale of ImageNet's sides."""

    images: int
    image_scale: float
    tiny: bool


FULL, TINY = Scale(images=1024, image_scale=1.0, tiny=False), Scale(images=8, image_scale=0.1, tiny=True)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    device = torch.device(options.device)
    make_folder(options.out)
    typed = sys.argv[1:] if arguments is None else arguments
    record = new_record(quick=options.tiny, command=shlex.join(["python", "-m", "benchmarks.gpu_plan", *typed]))
    record["findings"] = {}
    deadline = time.monotonic() + options.seconds
    os.environ.setdefault(
        "PYTORCH_ALLOC_CONF", "expandable_segments:True"
    )  # for the parts: at the largest batch, fragmentation would run out of memory
    with tempfile.TemporaryDirectory(prefix="fastbyol-gpu-plan-") as scratch:
        scale = TINY if options.tiny else FULL
        parts = options.parts or list(PARTS)
        place = _place(Path(scratch), device, scale, wanted=any(part in NEEDS_IMAGES for part in parts))
        for part in parts:
            _run_part(part, place, record, options, left_s=deadline - time.monotonic())
            write_record(options.out, record)  # after every part, so that a later crash loses nothing
    write_reports(options.out, read_record(options.out))
    log_console().print(f"wrote {options.out / FILE}, report.md and report.html", markup=False)


def _parse(arguments: Sequence[str] | None) -> Namespace:
    parser = OneLineParser(prog="python -m benchmarks.gpu_plan", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all, in this order)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the record")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="time limit for all parts together (%(default)g)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: for a dry run, with --tiny")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for a dry run")
    options = parser.parse_args(arguments)
    require_positive("--seconds", options.seconds)
    for part in options.parts:
        if part not in PARTS:
            raise UserError(f"PART = {part!r}: no such part{nearest_name(part, PARTS)}; one of {', '.join(PARTS)}")
    if options.device == "cpu" and not options.tiny:
        raise UserError("--device cpu: the plan's sizes are made for a GPU; add --tiny for a dry run, or use python -m benchmarks.run")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"no CUDA device here (torch {torch.__version__}); run it on a machine with one, or try --device cpu --tiny")
    return options


def _place(scratch: Path, device: torch.device, scale: Scale, *, wanted: bool) -> Place:
    workers = default_workers()
    images = scratch / "images"
    if wanted:
        write_imagenet_like(images, images=scale.images, classes=min(NUM_CLASSES, scale.images), scale=scale.image_scale, workers=workers)
    return Place(device=device, images=images, scratch=scratch, workers=workers)


def _run_part(part: str, place: Place, record: dict[str, Any], options: Namespace, *, left_s: float) -> None:
    console = log_console()
    if left_s < SHORTEST_S:
        record["skipped"][f"gpu.{part}"] = f"only {max(0.0, left_s):.0f} s were left of --seconds {options.seconds:g}"
        console.print(f"{part} skipped: no time left", markup=False)
        return
    console.print(f"{part} ...", markup=False)
    start = time.monotonic()
    try:
        log = options.out.resolve() / f"{part}.log"
        result = run_isolated(measure_part, part, place, options.tiny, limit_s=min(left_s, LIMITS_S.get(part, LIMIT_S)), log=log)
    except UserError as error:
        record["skipped"][f"gpu.{part}"] = str(error)
        console.print(f"{part} skipped: {error}", markup=False)
    except PartFailed as error:
        record["skipped"][f"gpu.{part}"] = f"failed: {error}"
        console.print(f"{part} failed: {error}", markup=False)
    else:
        _keep(result, record, console)
    record["case_seconds"][f"gpu.{part}"] = round(time.monotonic() - start, 1)


def measure_part(part: str, place: Place, tiny: bool) -> CaseResult | Findings:
    """Runs one part in this process, with a scratch folder of its own."""
    module = load_part(part)
    with tempfile.TemporaryDirectory(dir=place.scratch, prefix=part) as scratch:
        own = Place(device=place.device, images=place.images, scratch=Path(scratch), workers=place.workers)
        return module.run(module.TINY if tiny else module.FULL, place=own)


def _keep(result: CaseResult | Findings, record: dict[str, Any], console: Console) -> None:
    if isinstance(result, Findings):
        record["findings"][f"gpu.{result.part}"] = {"title": result.title, "found": result.found}
        for what, found in result.found.items():
            console.print(f"  {what}: {found}", markup=False)
    else:
        record["cases"][result.case] = result.as_dict()
        console.print(case_table(result))
        print_skipped(console, result)


if __name__ == "__main__":
    main()
