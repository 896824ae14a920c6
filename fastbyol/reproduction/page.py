"""FOLDER/tables.html and FOLDER/tables.md, rebuilt from the folder's records: each table with our figures beside the paper's."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastbyol.config.console import printable
from fastbyol.config.errors import UserError
from fastbyol.config.plain import nearest_name
from fastbyol.evaluation import page
from fastbyol.evaluation.subjects import BASELINE_TITLES
from fastbyol.evaluation.summary import MEASURES
from fastbyol.host.durable_files import write_durably
from fastbyol.reproduction.plots import table_plot
from fastbyol.reproduction.records import RECORDS, SETUP_FILE, Record, Setup, read_records, read_setup, record_path
from fastbyol.reproduction.results import NOT_RUN, RowResult, Spread, TableResult, carried_over, hours_of, table_results
from fastbyol.reproduction.tables import TABLES
from fastbyol.run.plain_yaml import read_yaml

log = logging.getLogger("fastbyol")
HTML_FILE, MARKDOWN_FILE, DISCUSSION_FILE = "tables.html", "tables.md", "discussion.yaml"
SIGNS = {"rankme": "RankMe", "alignment": "alignment", "uniformity": "uniformity", "other_view_top1": "other view found"}
"""Measures without labels that the tables show, with their column titles."""
MOST_MINUTES = 600
"""A table that took more than this shows hours instead of minutes."""
OURS, PAPERS = "ours - base", "paper - base"


@dataclass(frozen=True)
class Contents:
    """What both files show. discussion: what was found, by table. remarks: what could not be read, a line each."""

    setup: Setup
    records: Sequence[Record]
    results: Sequence[TableResult]
    discussion: Mapping[str, str]
    remarks: Sequence[str]


def write_tables(folder: Path) -> None:
    """Writes tables.html and tables.md. Raises UserError if the folder holds no tables or cannot be written."""
    contents = read_contents(folder)
    for name, text in ((HTML_FILE, html_text(contents)), (MARKDOWN_FILE, markdown_text(contents))):
        try:
            write_durably(folder / name, text)
        except OSError as error:
            raise UserError(
                f"{folder / name}: cannot be written ({error.strerror}); make room or move it away, and the same command writes it"
            ) from error


def read_contents(folder: Path) -> Contents:
    """Reads the set-up, the records and the discussion of a folder; damaged records and an invalid discussion are named in `remarks`.

    Raises UserError if the folder has no set-up.
    """
    setup = read_setup(folder)
    if setup is None:
        raise UserError(f"{folder / SETUP_FILE}: is not there, so the folder holds no tables; python -m fastbyol reproduce makes them")
    records = read_records(folder)
    read = {record_path(folder, record.run, record.seed) for record in records}
    remarks = [
        f"{path.name}: is not the record of a run, so it is left out of its row"
        for path in sorted((folder / RECORDS).glob("*.json"))
        if path not in read
    ]
    discussion = _discussion(folder, remarks)
    return Contents(setup, records, table_results(setup, records), discussion, remarks)


def _discussion(folder: Path, remarks: list[str]) -> dict[str, str]:
    """Returns the paragraphs of discussion.yaml by table, {} without one."""
    path = folder / DISCUSSION_FILE
    if not path.is_file():
        return {}
    try:
        found = read_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not all(isinstance(text, str) for pair in found.items() for text in pair):
            raise ValueError("it must hold a text under the name of each table")
        if unknown := [name for name in found if name not in TABLES]:
            raise ValueError(f"there is no table {unknown[0]!r}{nearest_name(unknown[0], TABLES)}")
    except (OSError, ValueError) as error:
        remarks.append(f"{path.name}: is left out ({error})")
        log.warning("%s: is left out of the tables (%s)", path, error)
        return {}
    return {name: " ".join(text.split()) for name, text in found.items()}


# Texts of both files.


def lead_text(contents: Contents) -> str:
    """Returns what all rows have in common, in a sentence."""
    base = contents.setup.base
    # A run that was stopped by its collapse took fewer steps.
    longest = max(
        (record for record in contents.records if record.config.epochs == base.epochs), key=lambda record: record.steps, default=None
    )
    images = f" of {longest.num_train:,} images" if longest else ""
    steps = f", {longest.steps:,} steps" if longest else ""
    length = f"{base.steps:,} steps" if base.steps else f"{base.epochs:g} epoch{'s' * (base.epochs != 1)}{images}{steps}"
    scale = (
        "at the paper's scale" if contents.setup.scale == "paper" else "at demo scale, where the paper's changes are made to a small recipe"
    )
    recipe = f"{base.model.encoder} at {base.views.size_px} px, batch {base.global_batch:,}, {length}"
    return f"The recipe that the rows change: {recipe}; {scale}. Data: {contents.setup.data}"


def counts_text(contents: Contents) -> str:
    """Returns how many runs there are, how they ended, and what they cost."""
    ended = {status: sum(record.status == status for record in contents.records) for status in ("collapsed", "diverged", "failed")}
    said = ", ".join(f"{count} {status}" for status, count in ended.items() if count)
    seeds = len({record.seed for record in contents.records})
    num = len(contents.records)
    cost = hours_text(hours_of(contents.records))
    text = f"{num} run{'s' * (num != 1)} with {seeds} seed{'s' * (seeds != 1)}" if num else "No run is finished yet"
    text += (f"; {said}" if said else "") + (f"; {cost} of training in all" if cost else "") + "."
    return text if contents.results or not num else f"{text} There is no table yet: it needs at least one row besides the base."


def baselines_text(contents: Contents) -> str:
    """Returns the accuracies of the base rows' baselines, of the first seed, or ''."""
    base = next((record for record in contents.records if record.baselines), None)
    if base is None:
        return ""
    titles = {**BASELINE_TITLES, "chance": "chance"}
    parts = [
        f"{titles.get(name, name)} "
        + ", ".join(f"{'kNN' if protocol == 'knn' else protocol} {100 * share:.1f} %" for protocol, share in shares.items())
        for name, shares in base.baselines.items()
    ]
    return f"For comparison, on the same images: {'; '.join(parts)}."


def hours_text(hours: Mapping[str, float]) -> str:
    """Returns '1.3 CPU-hours', or '12 CPU-minutes' for less than an hour."""
    parts = []
    for unit, value in hours.items():
        if value < 1:
            value, unit = 60 * value, unit.replace("hours", "minutes")
        parts.append(f"{value:,.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}")
    return " and ".join(parts)


def header_of(result: TableResult) -> list[str]:
    """Returns the column titles of `cells_of`."""
    here = ["here"] if _has_here(result) else []
    figures = [OURS, PAPERS, "linear", "kNN", "seeds", "state", "paper's top-1"]
    return [", ".join(result.table.columns), *here, *figures, *SIGNS.values(), _cost(result)[0]]


def cells_of(result: TableResult, row: RowResult) -> list[str]:
    """Returns a row as plain text."""
    here = [row.here] if _has_here(result) else []
    ours = ("base" if row.linear else "-") if row.is_base else points_text(row.relative.mean if row.relative else None)
    paper = "base" if row.is_base else points_text(row.paper_relative)
    seeds = str(len(row.linear.by_seed)) if row.linear else "-"
    signs = [_sign(name, row.signs.get(name)) for name in SIGNS]
    figures = [ours, paper, _share(row.linear), _share(row.knn), seeds, row.state, row.paper]
    unit, factor = _cost(result)
    cost = f"{factor * sum(row.hours.values()):.1f}" if row.hours else "-"
    return [row.name, *here, *figures, *signs, hours_text(row.hours) if unit == "cost" else cost]


def _cost(result: TableResult) -> tuple[str, float]:
    """Returns the unit of the table's cost and how many units an hour has; ('cost', 1.0) if some rows ran on CPUs and some on GPUs."""
    if len(result.hours) > 1:
        return "cost", 1.0
    unit, hours = next(iter(result.hours.items()), ("CPU-hours", 0.0))
    return (unit, 1.0) if hours >= MOST_MINUTES / 60 else (unit.replace("hours", "minutes"), 60.0)


def _has_here(result: TableResult) -> bool:
    return any(row.here for row in result.rows)


def points_text(points: float | None) -> str:
    """Returns '+1.2' or '-1.2', '0.0' for what is rounded to it, '-' for None."""
    if points is None:
        return "-"
    return "0.0" if abs(points) < 0.05 else f"{points:+.1f}"


def _share(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    mean = f"{100 * spread.mean:.1f}"
    return mean if len(spread.by_seed) < 2 else f"{mean} ({100 * spread.low:.1f} to {100 * spread.high:.1f})"


def _sign(name: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    form = MEASURES[name][1]
    return form.format(100 * value if form.endswith("%") else value)


COLUMNS_TEXT = (
    f"Columns: {OURS} and {PAPERS} are a row's linear top-1 minus that of the table's base row, in points, so that shapes can be compared "
    "whatever the images; ours is the mean over the seeds that both rows have. linear and kNN are our top-1 in % on val: the mean over the "
    "seeds, and in brackets the lowest and the highest value. paper's top-1 is linear, on ImageNet. The last column is the cost of training "
    "all seeds. The columns from RankMe to other view found need no labels; they are measured with each row's own views (docs/monitors.md)."
)


def note_texts(result: TableResult, setup: Setup) -> list[str]:
    """Returns what a reader must know of the table: rows without figures and why, noise, what carries over, cost."""
    states: dict[str, list[str]] = {}
    for row in result.rows:
        if row.remark:
            states.setdefault(row.remark, []).append(row.name)
    notes = [f"{remark[0].upper()}{remark[1:]}: {'; '.join(names)}." for remark, names in states.items()]
    if result.noise is not None:
        notes.append(
            f"Noise: with {result.num_val:,} val images, one standard deviation of the base row's accuracy is {result.noise:.1f} points, and that of a "
            f"difference between two rows at most {math.sqrt(2) * result.noise:.1f}; the range from lowest to highest shows how far seeds differ."
        )
    if text := carried_over(result.table, setup):
        notes.append(text)
    if result.hours:
        notes.append(f"Cost of the table: {hours_text(result.hours)} of training, including the base rows.")
    if killed := [row.name for row in result.rows if not row.cost_is_whole]:
        notes.append(
            f"The cost of these rows is higher than shown, because one of their starts was killed before its time was counted: {'; '.join(killed)}."
        )
    return notes


def found_text(contents: Contents, result: TableResult) -> str:
    return contents.discussion.get(result.table.name, "")


# HTML


def html_text(contents: Contents) -> str:
    """Renders the page: an overview and a section for each table, with its plot."""
    parts = [page.paragraph(text) for text in (counts_text(contents), baselines_text(contents)) if text]
    links = [f'<a href="#{result.table.name}">{page.escape(result.table.title)}</a>' for result in contents.results]
    if links:
        parts.append(f"<p>Tables: {', '.join(links)}.</p>")
    parts += [page.paragraph(remark, kind="alarm") for remark in contents.remarks]
    if contents.results:
        parts.append(page.paragraph(COLUMNS_TEXT, kind="note"))
    overview = page.section("overview", title="What was run", parts=parts)
    sections = [overview, *(_section(contents, result) for result in contents.results)]
    return page.page("The paper's tables, with our figures beside the paper's", lead=lead_text(contents), sections=sections)


def _section(contents: Contents, result: TableResult) -> str:
    table = result.table
    header = header_of(result)
    parts = [page.paragraph(f"Paper: {table.source}.", kind="note")]
    if contents.setup.scale == "demo":  # the hypotheses are of that
        parts.append(f"<p><b>Expected before it was run.</b> {page.escape(table.hypothesis)}</p>")
    if found := found_text(contents, result):
        parts.append(f"<p><b>Found.</b> {page.escape(found)}</p>")
    plot = table_plot(result)
    if plot is not None:
        alt = f"{table.title}: difference of each row to the base row in points, ours solid and the paper's hollow or dashed"
        parts.append(f'<div class="plot">{page.image(plot, alt=alt, kind="figure")}</div>')
        parts.append(
            page.paragraph(
                "Filled or solid: ours, the mean over seeds; short strokes: single seeds. Hollow or dashed: the paper's.", kind="note"
            )
        )
    numbers = frozenset(range(1, len(header)))
    rows = [_html_cells(header, cells_of(result, row), row) for row in result.rows]
    parts.append(page.wide(page.html_table([_html_title(title) for title in header], rows=rows, numbers=numbers)))
    parts += [page.paragraph(text, kind="note") for text in note_texts(result, contents.setup)]
    return page.section(table.name, title=table.title, parts=parts)


def _html_title(title: str) -> str:
    return page.escape(title).replace(" ", "&nbsp;") if title in (OURS, PAPERS) else page.escape(title)


def _html_cells(header: Sequence[str], cells: Sequence[str], row: RowResult) -> list[str]:
    shown = dict(zip(header, map(page.escape, cells), strict=True))
    shown[OURS] = f"<b>{shown[OURS]}</b>"
    for title in ("linear", "kNN"):
        mean, _, spread = shown[title].partition(" ")
        shown[title] = f'{mean} <span class="same">{spread}</span>' if spread else mean
    if row.state and row.state != NOT_RUN:
        shown["state"] = f'<span class="alarm">{shown["state"]}</span>'
    if row.is_base:
        shown[header[0]] = f"<b>{shown[header[0]]}</b>"
    return list(shown.values())


# Markdown


def markdown_text(contents: Contents) -> str:
    """Renders the same without plots."""
    lines = ["# The paper's tables, with our figures beside the paper's", "", _markdown(lead_text(contents)) + ".", ""]
    lines += [
        line for text in (counts_text(contents), baselines_text(contents), *contents.remarks) if text for line in (_markdown(text), "")
    ]
    if contents.results:
        lines += [_markdown(COLUMNS_TEXT), "", f"With plots: [{HTML_FILE}]({HTML_FILE}).", ""]
    for result in contents.results:
        lines += _markdown_section(contents, result)
    return "\n".join(lines).rstrip("\n") + "\n"


def _markdown_section(contents: Contents, result: TableResult) -> Iterable[str]:
    header = header_of(result)
    yield from (f"## {result.table.title}", f"Paper: {result.table.source}.", "")
    if contents.setup.scale == "demo":
        yield from (f"**Expected before it was run.** {_markdown(result.table.hypothesis)}", "")
    if found := found_text(contents, result):
        yield from (f"**Found.** {_markdown(found)}", "")
    yield _markdown_row(header)
    yield "|" + "|".join("---:" if position else "---" for position in range(len(header))) + "|"
    for row in result.rows:
        yield _markdown_row(cells_of(result, row))
    yield ""
    for text in note_texts(result, contents.setup):
        yield from (_markdown(text), "")


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_markdown, cells))} |"


def _markdown(text: str) -> str:
    """Returns plain text as Markdown shows it: without line breaks, and with its marks as they are."""
    text = printable(text)
    for mark in ("\\", "|", "<", "*", "`"):
        text = text.replace(mark, f"\\{mark}")
    return text
