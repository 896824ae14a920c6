"""The report's plots, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks.breakdown import Roofline, ScalingPoint
from benchmarks.record import CaseResult
from benchmarks.report_text import number
from fastbyol.tuning.comparison import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import XAxis, YAxis
    from matplotlib.figure import Figure

OURS, REFERENCE, CEILING = "#1f5fa8", "#b03a2e", "#8a94a3"
ROLE_COLOURS = {"": OURS, "reference": REFERENCE, "ceiling": CEILING, "memory ceiling": CEILING, "rival": "#d98b6a"}
PART_COLOURS = ("#1f5fa8", "#e0a030", "#3a9d78", "#b03a2e", "#8a94a3")
WIDTH = 8.6
LONGEST_LABEL = 46


def waterfall(steps: Sequence[tuple[str, float]], *, unit: str, clock: str, ceiling: Estimate | None) -> bytes:
    """Plots the time from the naive variant to ours with the saving of each change; the ceiling is a line."""
    figure, axes = _canvas(rows=len(steps) + 1)
    labels, previous = [], steps[0][1]
    for place, (new, ms) in enumerate(steps):
        if place:
            axes.barh(place, previous - ms, left=ms, color="#3a9d78" if ms <= previous else REFERENCE, height=0.6)
            axes.text(max(ms, previous), place, f" {'-' if ms <= previous else '+'}{number(abs(ms - previous))}", va="center", fontsize=8)
        else:
            axes.barh(place, ms, color=REFERENCE, height=0.6)
            axes.text(ms, place, f" {number(ms)}", va="center", fontsize=8)
        labels.append(new if place == 0 else f"+ {new}")
        previous = ms
    axes.barh(len(steps), previous, color=OURS, height=0.6)
    axes.text(previous, len(steps), f" {number(previous)}  ({steps[0][1] / previous:.1f} x less)", va="center", fontsize=8)
    if ceiling is not None:
        axes.axvline(ceiling.median, color=CEILING, linestyle="--", linewidth=1)
        axes.text(ceiling.median, -0.75, " ceiling", fontsize=7, color=CEILING, va="center")
    _label(axes, [*labels, "ours"], f"{clock}-ms / {unit}")
    axes.set_xlim(0, 1.18 * max(ms for _, ms in steps))
    return _png(figure)


def stacked(bars: dict[str, dict[str, float]], *, axis: str) -> bytes:
    """Plots one bar per name, divided into its parts, with each part's share."""
    figure, axes = _canvas(rows=len(bars))
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    colours = dict(zip(parts, PART_COLOURS, strict=False))
    for place, bar in enumerate(bars.values()):
        left, total = 0.0, sum(bar.values())
        for part, value in bar.items():
            axes.barh(place, value, left=left, color=colours.get(part, CEILING), height=0.6, label=part)
            if value > 0.08 * max(sum(one.values()) for one in bars.values()):
                axes.text(left + value / 2, place, f"{value / total:.0%}", ha="center", va="center", fontsize=8, color="white")
            left += value
        axes.text(left, place, f" {number(total)}", va="center", fontsize=8)
    handles, names = axes.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))  # each bar has drawn its parts anew
    axes.legend(unique.values(), unique.keys(), fontsize=7, ncols=len(unique), loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    _label(axes, list(bars), axis)
    axes.margins(x=0.12)
    return _png(figure)


def over_ceiling(result: CaseResult) -> bytes:
    """Plots every row's time over the ceiling's on a logarithmic axis, with its interval."""
    figure, axes = _canvas(rows=len(result.rows))
    values = [row.over_ceiling[result.primary] for row in result.rows]
    medians, highest = [value.median for value in values], max(value.high for value in values)
    errors = [[value.median - value.low for value in values], [value.high - value.median for value in values]]
    colours = [ROLE_COLOURS[row.role] for row in result.rows]
    bars = axes.barh(range(len(values)), medians, xerr=errors, color=colours, ecolor="#1d2430", height=0.6)
    axes.bar_label(bars, [f"{median:.2f}" for median in medians], padding=3, fontsize=8)
    axes.axvline(1, color=CEILING, linestyle="--", linewidth=1)
    if max(medians) > 8 * min(medians):
        axes.set_xscale("log")
        _label_decades(axes.xaxis)
        axes.set_xlim(min(0.7, 0.8 * min(medians)), 2.2 * highest)
    else:
        axes.set_xlim(0, 1.15 * highest)
    labels = [f"{row.name} ({row.role})" if row.role else row.name for row in result.rows]
    _label(axes, labels, f"time over the ceiling's ({result.primary} clock)")
    return _png(figure)


def roofline(found: Roofline) -> bytes:
    """Plots each row's rate over its operations per byte, below the machine's two limits: arithmetic and memory bandwidth."""
    figure, axes = _canvas(rows=9)
    ridge = found.peak / found.bandwidth  # with fewer operations per byte, memory is the limit
    xs = [ridge, *(point.intensity for point in found.points)]
    left, right = 0.4 * min(xs), 2.5 * max(xs)
    axes.plot([left, ridge, right], [left * found.bandwidth, found.peak, found.peak], color=CEILING, linewidth=1.5)
    axes.text(right, found.peak, f"{found.peak_name} ", ha="right", va="bottom", fontsize=8, color=CEILING)
    axes.text(left, left * found.bandwidth, f"  {found.bandwidth_name}", va="top", fontsize=8, color=CEILING)
    for place, point in enumerate(found.points):
        axes.plot(point.intensity, point.rate, "o", color=ROLE_COLOURS[point.role], markersize=7)
        axes.annotate(str(place + 1), (point.intensity, point.rate), ha="center", va="center", fontsize=6, color="white")
    names = [f"{place + 1}  {point.name}" for place, point in enumerate(found.points)]
    axes.text(1.02, 0.5, "\n".join(names), transform=axes.transAxes, va="center", fontsize=7, linespacing=1.8)
    axes.set(xscale="log", yscale="log")
    axes.set_ylim(0.7 * min(found.bandwidth * left, *(point.rate for point in found.points)), 1.6 * found.peak)
    for axis in (axes.xaxis, axes.yaxis):
        _label_decades(axis)
    axes.set_xlabel("operations per byte moved (no cache)", fontsize=8)
    axes.set_ylabel(found.unit, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def scaling(points: Sequence[ScalingPoint], *, owner: str) -> bytes:
    """Plots images/s of all ranks together, compared with perfect scaling."""
    figure, axes = _canvas(rows=6)
    ranks, first = [point.ranks for point in points], points[0]
    axes.plot(ranks, [first.images_per_s * n / first.ranks for n in ranks], color=CEILING, linestyle="--", label="no loss")
    axes.plot(ranks, [point.images_per_s for point in points], color=OURS, marker="o", label="measured")
    for point in points:
        axes.annotate(f"{point.efficiency:.0%}", (point.ranks, point.images_per_s), xytext=(6, -12), textcoords="offset points", fontsize=8)
    axes.set_xticks(ranks)
    axes.set_ylim(0)
    axes.set_xlabel(f"ranks ({owner}s)", fontsize=8)
    axes.set_ylabel("images/s, all ranks", fontsize=8)
    axes.legend(fontsize=8, frameon=False)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _canvas(*, rows: int) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    # Not by pyplot, which would look for a screen and keep every figure alive.
    figure = Figure(figsize=(WIDTH, 0.75 + 0.27 * rows), dpi=130, layout="constrained")
    return figure, figure.add_subplot()


def _label(axes: Axes, labels: Sequence[str], axis: str) -> None:
    """Labels one bar per line, the first at the top."""
    short = [text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…" for text in labels]
    axes.set_yticks(range(len(labels)), short, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(axis, fontsize=8)
    axes.tick_params(axis="x", which="both", labelsize=7)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label_decades(axis: XAxis | YAxis) -> None:
    """Labels only 1, 2, 5, 10, ...: all other labels of a logarithmic axis would overlap."""
    from matplotlib.ticker import LogLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
