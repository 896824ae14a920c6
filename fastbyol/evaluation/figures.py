"""Training curves and images as PNG bytes."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastbyol.evaluation.training_log import Record, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 2000
FEW_POINTS = 12
COLUMNS = 3
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


def curves(records: list[Record], panels: tuple[Panel, ...]) -> bytes:
    """Returns a PNG of small plots over the step, one for each panel that has data in the log."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    thinned = records[:: max(1, math.ceil(len(records) / MOST_POINTS))]
    known = [panel for panel in panels if not np.isnan(series(thinned, panel.key)).all()]
    rows = max(1, math.ceil(len(known) / COLUMNS))
    figure = Figure(figsize=(3.6 * COLUMNS, 2.5 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for position, panel in enumerate(known, start=1):
        _draw(figure.add_subplot(rows, COLUMNS, position), thinned, panel)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw(axes: Axes, records: list[Record], panel: Panel) -> None:
    points = [(r["step"], value) for r, value in zip(records, series(records, panel.key), strict=True) if not math.isnan(value)]
    # kNN is measured rarely, so a curve of few points gets markers.
    marker = "o" if len(points) <= FEW_POINTS else None
    axes.plot(*zip(*points, strict=True), color=LINE_COLOUR, linewidth=1.4, marker=marker, markersize=3)
    for value, meaning in panel.references:
        axes.axhline(value, color=REFERENCE_COLOUR, linewidth=0.8, linestyle="--")
        axes.annotate(meaning, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7, color=REFERENCE_COLOUR)
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)


def picture(pixels: np.ndarray) -> bytes:
    """Returns one image (H, W, 3) uint8 as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png", optimize=True)
    return buffer.getvalue()
