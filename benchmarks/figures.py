"""Fills the tables of figures in README.md, docs/performance.md and docs/stores.md from the newest kept records and the theoretical roofline.

python -m benchmarks.figures            lists the files with tables that are out of date (exit code 1)
python -m benchmarks.figures --write    updates them

A table stands between two comments, `<!-- figures: NAME ... -->` and `<!-- figures end -->`; do not edit what is between them.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import derived, roofline
from benchmarks.cases.store import FIRST
from benchmarks.record import CaseResult, Row
from benchmarks.record_file import KEPT, newest_kept, read_record, results_of
from benchmarks.report_text import markdown_table, number
from benchmarks.rival_steps import LIGHTLY, SOLO_LEARN
from fastbyol.config.arguments import OneLineParser
from fastbyol.config.errors import UserError, one_line_errors

ROOT = Path(__file__).parent.parent
FILES = ("README.md", "docs/performance.md", "docs/stores.md")
BLOCK = re.compile(r"(?P<head><!-- figures: (?P<name>\w+)[^>]*-->\n)(?P<body>.*?)(?P<foot><!-- figures end -->)", re.DOTALL)
LOADER_ROW = "ffcv: views"


@dataclass(frozen=True)
class Quote:
    """One line of the table of measured figures.

    ours: label -> row. value: 'ms' per unit, or 'x' for multiples of the ceiling; on the case's first clock. what: text with {clock} filled in.
    """

    case: str
    what: str
    ours: dict[str, str]
    value: str = "ms"


QUOTES = (
    Quote("convert", "converting an ImageNet-like image, {clock}-ms an image", {".beton": "to_ffcv", "tar": "to_dali"}),
    Quote(
        "loader",
        "two 224 px views of an ImageNet-like JPEG, {clock}-ms an image",
        {"FFCV": "ffcv: views", "DALI": "dali: views", "folder": "folder: views"},
    ),
    Quote("ema", "target's update, ResNet-50, times a copy", {"": "fastbyol ema_update"}, value="x"),
    Quote("lars", "LARS, ResNet-50, times a copy (2.33 without cache)", {"": "fastbyol LARS.step"}, value="x"),
    Quote("fused_update", "LARS and the target's update in one pass, times a copy", {"": "fastbyol lars_ema"}, value="x"),
    Quote("batchnorm", "batch norm and ReLU of ResNet-50's shapes, times five copies", {"": "fastbyol, both views"}, value="x"),
    Quote("step", "BYOL step, ResNet-50 at 224 px, {clock}-ms an image", {"bf16, channels-last": "bf16, channels-last"}),
    Quote(
        "end_to_end",
        "training from files, times the steps alone",
        {"FFCV": "ffcv: end to end", "DALI": "dali: end to end", "folder": "folder: end to end"},
        value="x",
    ),
    Quote(
        "checkpoint",
        "training stands still for a checkpoint of ResNet-50, {clock}-ms",
        {"": "CheckpointWriter.save: training stands still"},
    ),
    Quote("monitors", "watching and logging ResNet-50, {clock}-ms a step", {"": "one step in ten logged"}),
    Quote("evaluate", "features for evaluation, times the forward alone", {"": "extract_features, .beton"}, value="x"),
)


RIVALS = (SOLO_LEARN, LIGHTLY)
"""Rows of the cases of a step: what others reach with autocast, channels-last and foreach, which is the fair ratio and stands first."""
STEPS = ("step", "step_resnet18")
"""Cases that measure a whole step beside rivals."""


HEADLINES = ("convert", "loader", "fused_update", "step", "end_to_end")
"""Cases that README quotes; docs/performance.md has all."""


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = OneLineParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--write", action="store_true", help="update the tables")
    options = parser.parse_args(arguments)
    stale = []
    for name in FILES:
        path = ROOT / name
        text = path.read_text()
        new = with_figures(text, BLOCKS)
        if new != text:
            stale.append(name)
            if options.write:
                path.write_text(new)
    print(f"{'wrote' if options.write else 'out of date:'} {', '.join(stale)}" if stale else "all figures are those of the kept records")
    if stale and not options.write:
        sys.exit(1)


def with_figures(text: str, blocks: dict[str, Callable[[], str]]) -> str:
    """Returns the text with every table up to date. Raises UserError for an unknown table."""

    def filled(match: re.Match[str]) -> str:
        if match["name"] not in blocks:
            raise UserError(f"figures: {match['name']}: no such table; one of {', '.join(blocks)}")
        return f"{match['head']}{blocks[match['name']]().strip()}\n{match['foot']}"

    return BLOCK.sub(filled, text)


def headlines_table(kept: Path = KEPT) -> str:
    """Returns README's few lines of `measured_table`, whose page has the rest."""
    return measured_table(kept, cases=HEADLINES, up="")


def measured_table(kept: Path = KEPT, *, cases: Sequence[str] = (), up: str = "../") -> str:
    """Returns a line for each quote whose case has a kept record, from the newest one, followed by the sources.

    cases: only the quotes of these; none: of all. up: from the page's folder to the repository's root.
    """
    lines, sources = rivals_lines(kept)
    # Of a row that only some machines have, the newest record of one that has it: bf16 is not on every CPU.
    found = [
        (quote, newest_kept(quote.case, folder=kept, rows=quote.ours.values()) or newest_kept(quote.case, folder=kept))
        for quote in QUOTES
        if not cases or quote.case in cases
    ]
    rows = []
    for quote, folder in found:
        if folder is not None:
            sources[folder] = list(dict.fromkeys([*sources[folder], quote.case]))
            rows.append(_cells(quote, _result(folder, quote.case)))
    table = markdown_table(("", "ours", "reference", "ceiling"), [*lines, *rows], text_columns=4)
    return "\n".join([table, "", *(_source(*source, up=up) for source in sources.items())])


def rivals_lines(kept: Path = KEPT) -> tuple[list[list[str]], dict[Path, list[str]]]:
    """Returns the table's first lines, how many times as fast as rivals at their best a whole step is, and the cases of each record they are from."""
    lines, sources = [], defaultdict[Path, list[str]](list)
    for case in STEPS:
        if (folder := newest_kept(case, folder=kept, rows=RIVALS)) is None:
            continue
        result = _result(folder, case)
        # A CPU without bf16 has no row of it: there the default computes in float32, ours and theirs.
        ours = result.find("bf16, channels-last") or result.row("float32, channels-last")
        rivals = [row for name in RIVALS if (row := result.find(name)) is not None]
        ratios = [number(ours.speedup[result.primary].median / row.speedup[result.primary].median) for row in rivals]
        encoder, size = result.title.split(", ")[1:3]
        what = f"BYOL step, {encoder} at {size}, beside rivals at their best ({ours.name}, foreach), times as fast"
        lines.append([what, " and ".join(ratios), ", ".join(row.name for row in rivals), ""])
        sources[folder].append(case)
    missing = ["BYOL step beside rivals at their best, times as fast", "not in a kept record yet", ", ".join(RIVALS), ""]
    return lines or [missing], sources


def _cells(quote: Quote, result: CaseResult) -> list[str]:
    ours = [(label, result.row(name)) for label, name in quote.ours.items() if _measured(result, name)]
    texts = [f"{label} {_figure(quote, result, row)}".strip() for label, row in ours]
    others = [row for role in ("reference", "ceiling") if (row := result.with_role(role)) is not None]
    what = quote.what.format(clock="CPU" if result.primary == "cpu" else "wall")
    return [what, ", ".join(texts), *(f"{row.name} {_figure(quote, result, row)}" for row in others)]


def _measured(result: CaseResult, name: str) -> bool:
    """Returns False if the row was skipped, for which the record gives a reason. Raises UserError for a row that does not exist."""
    if result.find(name) is not None:
        return True
    # A backend is skipped by its name, which its rows begin with.
    if not any(name.startswith(skipped) for skipped in result.skipped):
        raise UserError(f"figures: case {result.case} has no row {name!r} (it has {', '.join(row.name for row in result.rows)})")
    return False


def _figure(quote: Quote, result: CaseResult, row: Row) -> str:
    values = row.ms if quote.value == "ms" else row.over_ceiling
    return number(values[result.primary].median)


def _source(folder: Path, cases: list[str], *, up: str) -> str:
    provenance = read_record(folder)["provenance"]
    link = f"[{folder.name}]({up}benchmarks/results/{folder.name}/report.md)"
    return f"Medians of {', '.join(cases)}: {link}, {provenance['cpu']}, cores used: {provenance['cores']}, GPU: {provenance['gpu'] or 'none'}."


def gpu_rates_table(kept: Path = KEPT) -> str:
    """Returns images/s per GPU from the newest kept record of each part, or 'not measured yet'."""
    rows = []
    for case in ("gpu.crops", "gpu.step", "gpu.step_compiled", "gpu.end_to_end", "gpu.decode"):
        if (result := _newest(case, kept)) is None:
            rows.append([f"`{case.removeprefix('gpu.')}`", "", "not measured yet"])
        else:
            # The memory ceiling is a copy: its images are only as many bytes as theirs.
            rows += [_rate(result, row, "wall") for row in result.rows if row.role != "memory ceiling"]
    return markdown_table(("part of the GPU plan", "subject", "images/s per GPU"), rows, text_columns=2)


def cpu_rates_table(kept: Path = KEPT) -> str:
    """Returns images per second of CPU time from the newest kept record of each case that has one."""
    results = [result for case in ("loader", "step", "end_to_end") if (result := _newest(case, kept)) is not None]
    rows = [_rate(result, row, "cpu") for result in results for row in result.rows if row.role in ("", "rival")]
    return markdown_table(("case", "subject", "images per CPU-second"), rows, text_columns=2)


def store_table(kept: Path = KEPT) -> str:
    """Returns images/s of the loader from local disk and from a store at each distance, with the load of the machine, from the newest record."""
    folder = newest_kept("store", folder=kept)
    if folder is None:
        raise UserError(f"figures: no kept record of store in {kept}; python -m benchmarks.run store --out {kept}/DATE_MACHINE")
    result, record, rows = _result(folder, "store"), read_record(folder), []
    for row in result.rows:
        ratio, waits = row.speedup["wall"], row.extra.get(FIRST)
        cells = [
            number(1000 / row.ms["wall"].median),
            f"{ratio.median:.2f} ({ratio.low:.2f} .. {ratio.high:.2f})",
            number(row.ms["cpu"].median),
        ]
        rows.append([row.name, *cells, "" if waits is None else number(waits / 1000)])
    headers = (
        "read from",
        "images/s (wall clock)",
        f"times local disk ({result.coverage:.0%} interval)",
        "CPU-ms an image",
        "s to the first batch",
    )
    start, end = (record["load_average"][when][0] for when in ("start", "end"))
    link = next((note for row in result.rows if (note := row.note).startswith("delay")), "")
    loads = f"{result.rounds} rounds in turn; load average {start:.1f} at the start, {end:.1f} at the end, on {record['provenance']['cores']} cores"
    source = f"{result.title[0].upper()}{result.title[1:]}, one thread; {link}; {loads}: [the record](../benchmarks/results/{folder.name}/report.md)."
    return "\n".join([markdown_table(headers, rows, text_columns=1), "", source])


def _rate(result: CaseResult, row: Row, clock: str) -> list[str]:
    return [result.title, row.name, number(1000 / row.ms[clock].median)]


def _newest(case: str, kept: Path = KEPT) -> CaseResult | None:
    folder = newest_kept(case, folder=kept)
    return None if folder is None else _result(folder, case)


def _result(folder: Path, case: str) -> CaseResult:
    return next(result for result in results_of(read_record(folder)) if result.case == case)


def input_table() -> str:
    """Returns the roofline's table of input rates, with the measured images/s of one CPU core."""
    loader = _newest("loader")
    if loader is None:
        raise UserError(f"figures: no kept record of the loader in {KEPT}; python -m benchmarks.run loader --out {KEPT}/DATE_MACHINE")
    return roofline.input_table(core_images_per_s=1000 / loader.row(LOADER_ROW).ms["cpu"].median)


BLOCKS: dict[str, Callable[[], str]] = {
    "headlines": headlines_table,
    "measured": measured_table,
    "gpu_rates": gpu_rates_table,
    "cpu_rates": cpu_rates_table,
    "derived": derived.derived_table,
    "work": roofline.work_table,
    "limits": derived.limits_table,
    "input": input_table,
    "store": store_table,
    "messages": roofline.messages_table,
}


if __name__ == "__main__":
    main()
