"""Measures on a GPU machine, in under ten minutes, what only a GPU can show; writes DIR/records.json, report.md and report.html.

python -m benchmarks.gpu_plan --out benchmarks/results/2026-12-01_h100
python -m benchmarks.gpu_plan step augment --out DIR      some parts only
python -m benchmarks.gpu_plan --out DIR --device cpu --tiny       a dry run that finds mistakes in the plan; its figures mean nothing

All parts run in one process beside this one; a part that fails, dies or takes too long is recorded as failed, and the next one gets a new
process. What a part has measured is written after each of its variants, so that nothing is lost where the time ends. A part that lacks a
package is skipped. Works without DALI and FFCV. Files are generated; nothing is downloaded. DIR has four files: the three, and plan.log
with the output of all parts.
"""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import check_names, load_case
from benchmarks.gpu import PARTS, Findings, Place
from benchmarks.imagenet_like import write_imagenet_like
from benchmarks.own_process import Isolated
from benchmarks.record import CaseResult
from benchmarks.record_file import FILE, new_record, read_record, write_record
from benchmarks.report import write_reports
from benchmarks.report_text import log_console
from benchmarks.run import keep_result, make_folder, put_result, typed_command
from fastbyol.config.arguments import OneLineParser
from fastbyol.config.errors import UserError, one_line_errors, require_positive
from fastbyol.host.cores import default_workers
from fastbyol.ranks.process_group import ask_for_expandable_segments
from fastbyol.tuning.stepper import release_memory

BUDGET_S = 570.0
"""Seconds for all parts together, so that the command ends within ten minutes."""
SHORTEST_S = 20.0
"""A part with fewer seconds left is not started: loading torch and CUDA alone takes half of that."""
LIMITS_S = {
    "crops": 330.0,
    "correctness": 120.0,
    "step": 120.0,
    "augment": 120.0,
    "step_compiled": 180.0,
    "launches": 120.0,
    "end_to_end": 180.0,
    "syncs": 150.0,
}
LIMIT_S = 60.0
"""Time limit of any other part."""
LOG = "plan.log"
"""Output of all parts."""
NEEDS_IMAGES = ("decode", "end_to_end")
NUM_CLASSES = 10


IMAGES, TINY_IMAGES = {"images": 1024, "scale": 1.0}, {"images": 8, "scale": 0.1}
"""Generated images, a multiple of every part's batch, and the scale of ImageNet's sides."""


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    make_folder(options.out)
    record = new_record(quick=options.tiny, command=typed_command("benchmarks.gpu_plan", arguments))
    record["findings"] = {}
    console, deadline = log_console(), time.monotonic() + options.seconds
    ask_for_expandable_segments()  # for the parts, which inherit it
    with tempfile.TemporaryDirectory(prefix="fastbyol-gpu-plan-") as scratch:
        parts = options.parts or list(PARTS)
        place = Place(torch.device(options.device), Path(scratch) / "images", Path(scratch), workers=default_workers())
        if any(part in NEEDS_IMAGES for part in parts):
            _write_images(place, **(TINY_IMAGES if options.tiny else IMAGES))
        with closing(Isolated(options.out.resolve() / LOG)) as process:
            for part in parts:
                so_far = partial(_keep_part_of, f"gpu.{part}", options.out, record)
                keep_result(f"gpu.{part}", partial(_run_part, part, place, options, deadline, process, so_far), record, console)
                write_record(options.out, record)  # after every part, so that a later crash loses nothing
    write_reports(options.out, read_record(options.out))
    console.print(f"wrote {options.out / FILE}, report.md and report.html", markup=False)


def _write_images(place: Place, *, images: int, scale: float) -> None:
    write_imagenet_like(place.images, images=images, classes=min(NUM_CLASSES, images), scale=scale, workers=place.workers)


def _parse(arguments: Sequence[str] | None) -> Namespace:
    parser = OneLineParser(prog="python -m benchmarks.gpu_plan", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all, in this order)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the record")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="time limit for all parts together (%(default)g)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: for a dry run, with --tiny")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, for a dry run")
    options = parser.parse_args(arguments)
    require_positive("--seconds", options.seconds)
    check_names("PART", options.parts, PARTS)
    if options.device == "cpu" and not options.tiny:
        raise UserError("--device cpu: the plan's sizes are made for a GPU; add --tiny for a dry run, or use python -m benchmarks.run")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"no CUDA device here (torch {torch.__version__}); run it on a machine with one, or try --device cpu --tiny")
    return options


def _keep_part_of(name: str, out: Path, record: dict[str, Any], result: CaseResult | Findings) -> None:
    """Writes what a part has measured so far: its time may end before its last variant does."""
    put_result(name, result, record)
    write_record(out, record)


def _run_part(
    part: str, place: Place, options: Namespace, deadline: float, process: Isolated, so_far: Callable[[CaseResult | Findings], None]
) -> CaseResult | Findings:
    left_s = deadline - time.monotonic()
    if left_s < SHORTEST_S:
        raise UserError(f"only {max(0.0, left_s):.0f} s were left of --seconds {options.seconds:g}")
    # Another process: a CUDA error ends every later use of the device in its process, and the next part then gets a new one.
    return process.call(measure_part, part, place, options.tiny, limit_s=min(left_s, LIMITS_S.get(part, LIMIT_S)), kept=so_far)


def measure_part(part: str, place: Place, tiny: bool) -> Iterator[CaseResult | Findings]:
    """Runs one part in this process, with a scratch folder of its own; yields its result, and before it any part of it."""
    release_memory()  # what the part before has held
    torch.compiler.reset()
    module = load_case(f"gpu.{part}")
    with tempfile.TemporaryDirectory(dir=place.scratch, prefix=part) as scratch:
        result = module.run(module.TINY if tiny else module.FULL, place=replace(place, scratch=Path(scratch)))
        if isinstance(result, CaseResult | Findings):
            yield result
        else:
            yield from result


if __name__ == "__main__":
    main()
