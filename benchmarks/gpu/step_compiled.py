"""Measures the step of the part `step` compiled (precision.compile) and eager, bf16 channels-last, at the same batch.

How: as in `step`; the batch is the largest that fits eagerly. Reference: eager. Ceiling: the matrix product's rate.

    python -m benchmarks.gpu_plan step_compiled

Why: Inductor fuses batch norm's second pass with the ReLU and the residual sum around it: 1.3 to 1.5 x fewer bytes according to
docs/performance.md. Compiling takes a minute or more, which is not timed.
"""

from __future__ import annotations

import math
from dataclasses import replace

from benchmarks.gpu import Place
from benchmarks.gpu.step import CEILING, FULL, OURS, TINY, VARIANTS, NoiseStep, Size, compute_rates, matrix_product, one_step
from benchmarks.gpu.subjects import device_subject, largest_batch, part_result
from benchmarks.record import CaseResult
from benchmarks.timing import measure
from fastbyol.config.errors import UserError
from fastbyol.monitors.compute import flop_per_image
from fastbyol.tuning.candidates import reason_not_to_compile

__all__ = ["FULL", "TINY", "Size", "run"]
COMPILED = f"{OURS}, compiled"


def run(size: Size, *, place: Place) -> CaseResult:
    eager, device = VARIANTS[OURS], place.device
    if reason := reason_not_to_compile(device, seconds=math.inf):
        raise UserError(reason)  # the product itself would fall back to eager mode
    batch = size.batch or largest_batch(lambda n: one_step(size, eager, n, device), device)
    variants = {OURS: eager, COMPILED: replace(eager, compile=True)}
    flop = flop_per_image(size.model, size_px=size.size_px)
    subjects = [
        device_subject(name, NoiseStep(size, precision, batch, device), device=device, units=batch, enough_s=size.enough_s)
        for name, precision in variants.items()
    ]
    subjects.append(matrix_product(size.matrix, flop, device))
    timings = measure(subjects, rounds=size.rounds)
    return part_result(
        "step_compiled",
        f"one BYOL step, {size.model.encoder}, {size.size_px} px, batch {batch}",
        subjects,
        timings,
        reference=OURS,
        ceiling=CEILING,
        settings=size,
        extra=compute_rates(timings, flop, device),
        place=place,
    )
