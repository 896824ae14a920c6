"""Plots of a table as PNG: how far each row is from its base row, ours and the paper's, as the paper's figure 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastbyol.evaluation.figures import png
from fastbyol.reproduction.results import RowResult, TableResult
from fastbyol.reproduction.tables import BYOL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"BYOL": "#1f5fa8", "SimCLR": "#d1602b"}
GRID = "#8a94a3"
LINES = ("batch", "tau", "width", "learning_rate", "weight_decay")
"""Tables whose rows are values in order, drawn as lines; the others have a line of dots for each row."""
AXIS = "linear top-1 minus that of the base row, points"


def table_plot(result: TableResult) -> bytes | None:
    """Returns a PNG of the differences to the base rows; None if no row has one of ours."""
    from matplotlib.figure import Figure

    if not any(row.relative for row in result.rows):
        return None
    if result.table.name in LINES:
        figure = Figure(figsize=(5.4, 3.6), dpi=140, layout="constrained")
        _draw_lines(figure.add_subplot(), result)
    else:
        places = _places(result.rows)
        figure = Figure(figsize=(5.4, 1.2 + 0.3 * len(places)), dpi=140, layout="constrained")
        _draw_dots(figure.add_subplot(), result, places)
    figure.legend(fontsize=7.5, frameon=False, loc="outside upper center", ncols=4, columnspacing=1.0, handletextpad=0.4)
    return png(figure)


def _methods(rows: Sequence[RowResult]) -> list[str]:
    return list(dict.fromkeys(row.row.method for row in rows))


def _own_name(row: RowResult) -> str:
    """Returns the row's name without its method, which has a colour instead."""
    cells = row.row.cells
    return ", ".join(cells[1:] if cells[0] == row.row.method else cells)


def _places(rows: Sequence[RowResult]) -> list[str]:
    return list(dict.fromkeys(_own_name(row) for row in rows))


def _ours(row: RowResult) -> float | None:
    """Returns our difference to the base row; 0 for the base row itself, if it has been run."""
    if row.is_base:
        return 0.0 if row.linear else None
    return row.relative.mean if row.relative else None


def _papers(row: RowResult) -> float | None:
    return 0.0 if row.is_base else row.paper_relative


def _draw_lines(axes: Axes, result: TableResult) -> None:
    """Draws a line of ours and a dashed one of the paper's for each method, over the rows in order."""
    labels = _tau_values(result) if result.table.name == "tau" else None
    for method in _methods(result.rows):
        rows = [row for row in result.rows if row.row.method == method]
        ours = [(_own_place(row, rows, labels), row, value) for row in rows if (value := _ours(row)) is not None]
        papers = [(_paper_place(row, rows, labels), value) for row in rows if (value := _papers(row)) is not None]
        colour = COLOURS[method]
        axes.plot(
            *zip(*sorted(papers), strict=True), color=colour, linestyle="--", marker="o", markerfacecolor="white", label=f"{method}, paper"
        )
        if ours:
            line = sorted((place, value) for place, _, value in ours)
            axes.plot(*zip(*line, strict=True), color=colour, marker="o", linewidth=2, label=f"{method}, ours")
        for place, row, _ in ours:
            _draw_seeds(axes, row, place, colour, upright=True)
    if labels is None:
        first = [row for row in result.rows if row.row.method == BYOL]
        texts = [_own_name(row).partition(",")[0] + (f"\n({row.here})" if row.here else "") for row in first]
    else:
        texts = [f"{value:g}" for value in labels]
    axes.set_xticks(range(len(texts)), texts)
    has_here = labels is None and any(row.here for row in result.rows)
    axes.set_xlabel(result.table.columns[-1] + (" (here)" if has_here else ""), fontsize=8)
    axes.set_ylabel(AXIS, fontsize=7.5)
    _finish(axes)


def _tau_values(result: TableResult) -> list[float]:
    """Returns all values of tau, the paper's and ours, in descending order: our base has another one."""
    values = {_number(row.row.cells[0]) for row in result.rows} | {_number(row.here) for row in result.rows if row.here}
    return sorted(values, reverse=True)


def _number(text: str) -> float:
    return float(text.partition(",")[0])


def _own_place(row: RowResult, rows: Sequence[RowResult], labels: list[float] | None) -> int:
    return rows.index(row) if labels is None else labels.index(_number(row.here or row.row.cells[0]))


def _paper_place(row: RowResult, rows: Sequence[RowResult], labels: list[float] | None) -> int:
    return rows.index(row) if labels is None else labels.index(_number(row.row.cells[0]))


def _draw_dots(axes: Axes, result: TableResult, places: list[str]) -> None:
    """Draws a line of dots for each row: ours filled, with every seed, the paper's hollow; the second method a little lower."""
    methods = _methods(result.rows)
    for row in result.rows:
        colour = COLOURS[row.row.method]
        shift = 0.0 if len(methods) == 1 else 0.18 * (2 * methods.index(row.row.method) - 1)
        place = places.index(_own_name(row)) + shift
        if (paper := _papers(row)) is not None:
            axes.plot(paper, place, "o", color=colour, markerfacecolor="white", markersize=7)
        if (ours := _ours(row)) is not None:
            axes.plot(ours, place, "o", color=colour, markersize=5)
            _draw_seeds(axes, row, place, colour, upright=False)
    for method in methods:
        axes.plot([], [], "o", color=COLOURS[method], markersize=5, label=f"{method}, ours")
        axes.plot([], [], "o", color=COLOURS[method], markerfacecolor="white", markersize=7, label=f"{method}, paper")
    axes.set_yticks(range(len(places)), places)
    axes.set_ylabel(", ".join(result.table.columns[len(methods) > 1 :]), fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color=GRID, linewidth=0.8)
    axes.set_xlabel(AXIS, fontsize=8)
    _finish(axes)


def _draw_seeds(axes: Axes, row: RowResult, place: float, colour: str, *, upright: bool) -> None:
    if row.relative is None or len(row.relative.by_seed) < 2:
        return
    values = list(row.relative.by_seed.values())
    at = [place] * len(values)
    axes.plot(
        *((at, values) if upright else (values, at)), marker="_" if upright else "|", linestyle="", color=colour, markersize=8, alpha=0.8
    )


def _finish(axes: Axes) -> None:
    axes.tick_params(labelsize=7.5)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
