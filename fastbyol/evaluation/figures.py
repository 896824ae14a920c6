"""Training curves and images as PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fastbyol.evaluation.training_log import Record, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POINTS = 2000
FEW_POINTS = 12
COLUMNS = 3
WIDE = 100.0
"""A norm whose largest value is above this many times its smallest is drawn on a logarithmic axis."""
LINE_COLOUR, REFERENCE_COLOUR = "#1f5fa8", "#b03a2e"


@dataclass(frozen=True)
class Panel:
    """One curve. references: labelled horizontal lines, (value, meaning)."""

    key: str
    title: str
    references: tuple[tuple[float, str], ...] = ()


TRAINING_PANELS = (
    Panel("loss", "loss (0 = views agree, 8 = opposite)"),
    Panel("lr", "learning rate"),
    Panel("tau", "tau, target decay rate"),
    Panel("probe_top1", "linear probe on the fly, top-1"),
    Panel("knn_top1", "kNN on the fly, top-1"),
    Panel("gradient_norm", "norm of the gradient"),
    Panel("update_norm", "norm of the update"),
    Panel("images_per_s", "images/s, all processes"),
    Panel("data_wait_share", "share of time waiting for data"),
)
COLLAPSE_PANELS = (
    Panel("projection_std", "projection std x sqrt(D)", ((1.0, "spread evenly"), (0.0, "collapsed"))),
    Panel("effective_rank", "effective rank of the projections", ((1.0, "collapsed"),)),
    Panel("mean_cosine", "cosine between different images", ((1.0, "collapsed"), (0.0, "unrelated"))),
    Panel("alignment", "alignment of the two views"),
    Panel("feature_std", "feature std"),
    Panel("rankme", "RankMe of the features"),
)


@dataclass(frozen=True)
class Curve:
    """The records of one run as a line: its colour, and matplotlib's dash style."""

    records: list[Record]
    colour: str = LINE_COLOUR
    style: str = "solid"


def curves(records: list[Record], panels: tuple[Panel, ...]) -> bytes:
    """Returns a PNG of small plots over the step, one for each panel that has data in the log."""
    from matplotlib.figure import Figure

    thinned = Curve(_thinned(records))
    known = [panel for panel in panels if _points(thinned, panel.key)]
    rows = max(1, math.ceil(len(known) / COLUMNS))
    figure = Figure(figsize=(3.6 * COLUMNS, 2.5 * rows), dpi=130, layout="constrained")
    for position, panel in enumerate(known, start=1):
        _draw(figure.add_subplot(rows, COLUMNS, position), [thinned], panel)
    return png(figure)


def overlaid(lines: Sequence[Curve], panel: Panel, *, x: str, x_title: str) -> bytes | None:
    """Returns a PNG of one panel with a line for each run that has data for it; None if no run has. x: the key that the lines are drawn over."""
    from matplotlib.figure import Figure

    thinned = [replace(line, records=_thinned(line.records)) for line in lines]
    if not any(_points(line, panel.key, x=x) for line in thinned):
        return None
    figure = Figure(figsize=(4.6, 3.0), dpi=130, layout="constrained")
    _draw(figure.add_subplot(), thinned, panel, x=x, x_title=x_title)
    return png(figure)


def _thinned(records: list[Record]) -> list[Record]:
    """Returns at most about MOST_POINTS records, those with a kNN accuracy among them, because it is measured rarely."""
    every = math.ceil(len(records) / MOST_POINTS)
    return [record for position, record in enumerate(records) if position % max(1, every) == 0 or record.get("knn_top1") is not None]


def _points(line: Curve, key: str, *, x: str = "step") -> list[tuple[float, float]]:
    pairs = zip(series(line.records, x), series(line.records, key), strict=True)
    return [(at, value) for at, value in pairs if math.isfinite(at) and math.isfinite(value)]


def _draw(axes: Axes, lines: Sequence[Curve], panel: Panel, *, x: str = "step", x_title: str = "step") -> None:
    values: list[float] = []
    for line in lines:
        points = _points(line, panel.key, x=x)
        # kNN is measured rarely, so a curve of few points gets markers.
        marker = "o" if len(points) <= FEW_POINTS else None
        if points:
            axes.plot(*zip(*points, strict=True), color=line.colour, linestyle=line.style, linewidth=1.4, marker=marker, markersize=3)
            values += [value for _, value in points]
    if panel.key.endswith("_norm") and min(values) > 0 and max(values) > WIDE * min(values):
        axes.set_yscale("log")
    for value, meaning in panel.references:
        axes.axhline(value, color=REFERENCE_COLOUR, linewidth=0.8, linestyle="--")
        axes.annotate(meaning, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7, color=REFERENCE_COLOUR)
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.set_xlabel(x_title, fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Figure) -> bytes:
    """Returns the figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def picture(pixels: np.ndarray) -> bytes:
    """Returns one image (H, W, 3) uint8 as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png", optimize=True)
    return buffer.getvalue()
