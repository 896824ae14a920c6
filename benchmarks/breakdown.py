"""Derives from a record's rows where the time of an image goes, what each change saved, how fast the whole is, and what to change next.

Rows are looked up by name; anything a record lacks is left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from benchmarks.record import CaseResult, Row

WATERFALLS: dict[str, tuple[tuple[str, str], ...]] = {
    "loader": (("folder: views", "one decode, fused kernel"), ("ffcv: views", "TurboJPEG from a .beton")),
    "step": (("float32, channels-last", "channels-last"), ("bf16, channels-last", "bf16"), ("bf16, channels-last, compiled", "compiled")),
    "gpu.step": (("bf16, NCHW", "bf16"), ("bf16, channels-last", "channels-last")),
    "gpu.step_compiled": (("bf16, channels-last, compiled", "compiled"),),
    "fused_update": (("fastbyol LARS.step, then ema_update", "all tensors at once"), ("fastbyol lars_ema", "one pass")),
}
"""Steps from the reference to our fastest variant, by case: the row, and the change that it adds."""
STAGES = {"decode": "decode only", "crop": "crops", "augment": "views"}
"""Rows of a backend in the loader case; each includes the work of the ones before it."""
BACKENDS = ("ffcv", "dali", "folder")
HEADLINES = {
    "gpu.end_to_end": ("trained end to end", ": end to end"),
    "gpu.step": ("training step", "^bf16, "),
    "gpu.step_compiled": ("training step, compiled", "compiled"),
    "end_to_end": ("trained end to end", ": end to end"),
    "step": ("training step", "^(bf16|float32), channels-last"),
    "loader": ("two views loaded", f"^({'|'.join(BACKENDS)}): views$"),
}
"""Headline rates by case: a description, and a pattern that matches our rows."""
DATA_BOUND = 1.05
"""End-to-end time over the time of the steps alone; above this the step waits for data."""
STEPS_ALONE = "steps alone"
RATES = {"GFLOP/CPU-s": ("cpu", 1.0), "TFLOP/s": ("wall", 1e3)}
"""Extra figures that are rates of operations: the clock they use, and their unit in GFLOP/s."""
OF_PEAK = "% of peak"
MEGABYTES, COPIED = "MB an image", "GB/s copied"
LEAST_SHARE = 1e-3
"""Parts with a smaller share are not drawn."""


class Headline(NamedTuple):
    value: str
    meaning: str


class ScalingPoint(NamedTuple):
    ranks: int
    images_per_s: float
    """Sum over all ranks."""
    efficiency: float


class RooflinePoint(NamedTuple):
    name: str
    role: str
    intensity: float
    """Operations per byte."""
    rate: float


class Roofline(NamedTuple):
    """Rates in `unit`, and the bandwidth in `unit` per operation per byte; the names say what was measured."""

    points: tuple[RooflinePoint, ...]
    peak: float
    peak_name: str
    bandwidth: float
    bandwidth_name: str
    unit: str


def roofline(result: CaseResult) -> Roofline | None:
    """Returns the rows with known operations and bytes under both limits measured in the same rounds; None if the case lacks them."""
    ceiling = result.with_role("ceiling")
    copy = next((row for row in result.rows if COPIED in row.extra), None)
    unit = next((name for name in RATES if ceiling is not None and name in ceiling.extra), None)
    if ceiling is None or copy is None or unit is None:
        return None
    clock, giga = RATES[unit]
    points = tuple(
        RooflinePoint(row.name, row.role, row.extra[unit] * giga * row.ms[clock].median / row.extra[MEGABYTES], row.extra[unit])
        for row in result.rows
        if MEGABYTES in row.extra and unit in row.extra
    )
    return Roofline(points, ceiling.extra[unit], ceiling.name, copy.extra[COPIED] / giga, copy.name, unit) if points else None


def waterfall(result: CaseResult) -> list[tuple[str, float]]:
    """Returns (change, ms per unit) from the reference to our fastest row on the case's first clock; empty without one of our rows."""
    reference = result.with_role("reference")
    changes = WATERFALLS.get(result.case, ())
    steps = [(new, row.ms[result.primary].median) for name, new in changes if (row := result.find(name)) is not None]
    # A last change that made it slower, such as compiling on a CPU, is not our default.
    while len(steps) > 1 and steps[-1][1] >= steps[-2][1]:
        steps.pop()
    return [(reference.name, reference.ms[result.primary].median), *steps] if reference and steps else []


def loader_shares(result: CaseResult) -> dict[str, dict[str, float]]:
    """Returns each backend's CPU-ms per image by stage: the time of a stage's row minus that of the row before it."""
    shares: dict[str, dict[str, float]] = {}
    for backend in BACKENDS:
        rows = list(filter(None, (result.find(f"{backend}: {name}") for name in STAGES.values())))
        if len(rows) == len(STAGES):
            totals = [0.0, *(row.ms["cpu"].median for row in rows)]
            # Noise may put a stage below the one before it.
            shares[backend] = {stage: max(0.0, after - before) for stage, (before, after) in zip(STAGES, pairwise(totals), strict=True)}
    return shares


def time_shares(result: CaseResult) -> dict[str, dict[str, float]]:
    """Returns ms per unit by part for each row with figures named '*_share'; the rest of the row's wall time is 'the step'."""
    shares: dict[str, dict[str, float]] = {}
    for row in result.rows:
        given = {name.removesuffix("_share").replace("_", " "): value for name, value in row.extra.items() if name.endswith("_share")}
        if given:
            parts = given | {"the step": 1 - sum(given.values())}
            shares[row.name] = {part: share * row.ms["wall"].median for part, share in parts.items() if share > LEAST_SHARE}
    return shares


def scaling_points(result: CaseResult) -> list[ScalingPoint]:
    """Returns the rows named 'n ranks', ordered by n."""
    named = [(re.fullmatch(r"(\d+) ranks?", row.name), row) for row in result.rows]
    points = [ScalingPoint(int(match[1]), 1000 / row.ms["wall"].median, row.extra.get("efficiency", 1.0)) for match, row in named if match]
    return sorted(points, key=lambda point: point.ranks)


def headlines(results: Sequence[CaseResult], *, owner_of: dict[str, str]) -> list[Headline]:
    """Returns the fastest of our rows in each case of `HEADLINES`, as images/s per its `owner_of`, with its share of the peak if known."""
    by_case = {result.case: result for result in results}
    found: list[Headline] = []
    for case, (what, ours) in HEADLINES.items():
        rows = [row for row in by_case[case].rows if re.search(ours, row.name)] if case in by_case else []
        if rows:
            best = min(rows, key=lambda row: row.ms[by_case[case].primary].median)
            named = f"{what}: {best.name}"
            found.append(Headline(_rate(best), f"images/s per {owner_of[case]}, {named}; {by_case[case].title}"))
            if "mfu" in best.extra:
                found.append(Headline(f"{best.extra['mfu']:.1%}", f"MFU, {named}"))
            if OF_PEAK in best.extra:
                found.append(
                    Headline(
                        f"{best.extra[OF_PEAK]:.1f}%",
                        f"of the rate that one convolution of that format reached in the same rounds, {named}",
                    )
                )
    return found


def _rate(row: Row) -> str:
    rate = 1000 / row.ms["wall"].median
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:#.3g}".rstrip(".")


def verdict(results: Sequence[CaseResult]) -> list[str]:
    """Returns a sentence for each row that trains from files: data-bound or not, and the next thing to change; or that no row does."""
    by_case = {result.case: result for result in results if result.find(STEPS_ALONE) is not None}
    sentences = [
        f"{case}, {row.name}: {_judge(by_case[case], row)}"
        for case in ("gpu.end_to_end", "end_to_end", "demo_step")
        if case in by_case
        for row in by_case[case].rows
        if row.name.endswith("end to end") or row.name == "end to end, .beton"
    ]
    nothing = "Nothing in this record trains from files, so it does not say whether data or the step is the limit: run end_to_end."
    return sentences or [nothing]


def _judge(result: CaseResult, row: Row) -> str:
    over = row.over_ceiling["wall"]
    # The step's own waits and the ratio of rows may differ: the loader's thread also slows the step that it works beside.
    waits = f", {row.extra['data_wait_share']:.0%} of it waiting for data" if "data_wait_share" in row.extra else ""
    figure = f"{over.median:.2f} x the steps alone ({over.low:.2f} to {over.high:.2f}){waits}"
    if over.low <= DATA_BOUND:
        sure = "compute-bound" if over.high <= DATA_BOUND else "compute-bound within the noise"
        return f"{sure}: {figure}. Next: the step (precision, compile, batch)."
    return f"data-bound: {figure}. Next: {_next_change(result, row)}."


def _next_change(result: CaseResult, row: Row) -> str:
    backend = row.name.split(":")[0]
    alone, steps = result.find(f"{backend}: loader alone"), result.find(STEPS_ALONE)
    if alone is None or steps is None:
        return "more data.workers, or data.prefetch"
    need = alone.ms["wall"].median / steps.ms["wall"].median
    if need <= 1:
        return "a core for each loader thread (alone it is fast enough), then data.prefetch"
    loaders = {one.name: one.ms["wall"].median for one in result.rows if one.name.endswith(": loader alone")}
    faster, more = min(loaders, key=loaders.__getitem__).split(":")[0], f"{need:.1f} times the data.workers"
    return more if faster == backend else f"backend {faster}, or {more}"
