"""The page and the terminal's table of runs side by side, from `run_comparison`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbyol.config.arguments import through_links
from fastbyol.config.console import printable
from fastbyol.config.errors import UserError
from fastbyol.config.plain import flatten, to_plain
from fastbyol.config.schema import TrainConfig
from fastbyol.evaluation import page
from fastbyol.evaluation.figures import COLLAPSE_PANELS, TRAINING_PANELS, Curve, overlaid
from fastbyol.evaluation.run_comparison import COLLAPSED, DIVERGED, RUNNING, STOPPED, ComparedRun, RunComparison, Score, ScoreGroup
from fastbyol.host.durable_files import write_durably
from fastbyol.host.quantities import duration_text

if TYPE_CHECKING:
    from rich.console import RenderableType

COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#c44e9d", "#e0a100", "#56b4e9", "#7b3294", "#8c510a", "#4d4d4d", "#a6d854"),
    *("#e31a1c", "#1b2a6b"),
)
"""Colours of the runs in order; the first six can be told apart by colour-blind people too (Okabe and Ito, 2008), the later ones are dashed."""
STYLES = ("solid", "dashed", "dotted")
DASHES = {"solid": "", "dashed": "5 3", "dotted": "2 2"}
SOLID_RUNS = 6
DOTTED_FROM = len(COLOURS)
MOST_OPTIONS = 8
"""Options of one run that the terminal lists."""
CONFIDENCE_Z = 1.96


def colour_of(position: int) -> str:
    return COLOURS[position % len(COLOURS)]


def style_of(position: int) -> str:
    return STYLES[0] if position < SOLID_RUNS else STYLES[1] if position < DOTTED_FROM else STYLES[2]


def write_comparison(found: RunComparison, path: Path, *, command: str) -> None:
    """Writes the page atomically. Raises UserError for a file that is no .html, or cannot be written."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {path}: must end in .html, so that no other file is replaced by mistake")
    if path.is_dir():
        raise UserError(f"--out {path}: is a folder; give a file in it, for example {path / 'compare.html'}")
    path = through_links(path)
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: cannot be written (there is no folder {path.parent}); choose another file")
    try:
        write_durably(path, comparison_page(found, command=command))
    except OSError as error:
        raise UserError(f"--out {path}: cannot be written ({error.strerror}); choose another file") from error


def comparison_page(found: RunComparison, *, command: str) -> str:
    """Renders the comparison as HTML."""
    num = len(found.runs)
    lead = f"{num} runs, " + (
        "all on the same images" if found.num_data == 1 else f"on {found.num_data} sets of images (told apart by their paths)"
    )
    groups = found.score_groups()
    sections = [
        _overview_section(found, groups),
        _differences_section(found),
        _curves_section(found),
        *([_scores_section(found, groups)] if groups else []),
        _speed_section(found),
        _commands_section(found, command),
    ]
    return page.page("Runs side by side", lead=lead, sections=sections)


def _label(run: ComparedRun, position: int) -> str:
    """Returns the run's name as HTML, behind a piece of its line in the curves."""
    dash = DASHES[style_of(position)]
    line = f'<line x1="0" y1="5" x2="22" y2="5" stroke="{colour_of(position)}" stroke-width="3"' + (
        f' stroke-dasharray="{dash}"' if dash else ""
    )
    return f'<svg width="22" height="10" aria-hidden="true">{line}/></svg>{page.breakable(run.name)}'


def _labels(found: RunComparison) -> list[str]:
    return [_label(run, position) for position, run in enumerate(found.runs)]


def _overview_section(found: RunComparison, groups: Sequence[ScoreGroup]) -> str:
    header, rows = overview(found, groups)
    body = [[label, *_state(run, row)] for label, run, row in zip(_labels(found), found.runs, rows, strict=True)]
    parts = [page.paragraph(text, kind="verdict" if not position else "") for position, text in enumerate(best_lines(found, groups))]
    parts.append(page.wide(page.html_table([*map(page.escape, header), "reached"], rows=body, numbers=frozenset(range(2, len(header))))))
    notes = [*overview_notes(found, groups), *found.remarks]
    return page.section(
        "overview", title="How far each run came and what it learnt", parts=[*parts, *(page.paragraph(n, kind="note") for n in notes)]
    )


def _state(run: ComparedRun, row: Sequence[str]) -> list[str]:
    """Returns the cells of a run's row behind its name, as HTML: the row of `overview`, and how far it came in words."""
    kind = "alarm" if run.outcome.word in (COLLAPSED, DIVERGED) else ""
    word, text = page.escape(run.outcome.word), page.escape(run.outcome.text)
    return [f'<span class="{kind}">{word}</span>', *map(page.escape, row[2:]), f'<span class="small">{text}</span>']


def overview(found: RunComparison, groups: Sequence[ScoreGroup]) -> tuple[list[str], list[list[str]]]:
    """Returns the header and a row for each run, as plain text: state, steps, accuracies, last figures of the log, speed and time."""
    main = {protocol: next((g for g in groups if g.protocol == protocol), None) for protocol in ("linear", "knn")}
    header = ["run", "state", "steps", "linear", "kNN", "probe", "loss", "images/s", "time"]
    rows = []
    for position, run in enumerate(found.runs):
        scores = [_headline_score(groups, group, position) for group in main.values()]
        loss, seconds, speed = run.last("loss"), run.seconds, run.speed.images_per_s_per_device * run.speed.devices
        rows.append(
            [
                *(run.name, run.outcome.word, f"{run.outcome.steps:,}", *scores, _percent(run.last("probe_top1"))),
                *("-" if math.isnan(loss) else f"{loss:.3f}", "-" if math.isnan(speed) else f"{speed:,.0f}"),
                "-" if math.isnan(seconds) else duration_text(seconds),
            ]
        )
    return header, rows


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f}"


def _headline_score(groups: Sequence[ScoreGroup], main: ScoreGroup | None, position: int) -> str:
    """Returns the run's accuracy in the group with the most runs, or, with a star, another one of the same protocol."""
    if main is None:
        return "-"
    if position in main.scores:
        return _top1(main.scores[position])
    other = next((g.scores[position] for g in groups if g.protocol == main.protocol and position in g.scores), None)
    return f"{_top1(other)}*" if other else "-"


def _top1(score: Score) -> str:
    return f"{100 * next(iter(score.figures.values())).value:.1f}"


def overview_notes(found: RunComparison, groups: Sequence[ScoreGroup]) -> list[str]:
    """Returns what a reader must know to compare the rows of `overview`."""
    notes = ["linear, kNN: top-1 on val in %, from RUN/evaluation; probe: top-1 in % on the training images, at the last logged step"]
    main = {group.protocol: group for group in reversed(groups)}
    rows = [g for g in main.values() if g.protocol in ("linear", "knn")]
    if any(g.protocol == m.protocol and set(g.scores) - set(m.scores) for m in rows for g in groups):
        where = "; ".join(dict.fromkeys(g.title for g in rows))
        notes.append(f"*: on other images or with other settings than the rest of the column ({where}), so not comparable with it")
    stale = [
        f"{run.name}'s {score.protocol} at step {score.step:,}"
        for run in found.runs
        for score in run.scores
        if score.protocol in ("linear", "knn") and score.step not in (None, run.outcome.steps)
    ]
    if stale:
        notes.append(f"evaluated at an earlier step than the last one of the run: {', '.join(stale)}")
    unscored = [run.name for run in found.runs if not run.scores]
    if unscored:
        notes.append(f"not evaluated yet: {', '.join(unscored)} (python -m fastbyol evaluate all)")
    if found.num_data > 1:
        notes.append("the runs saw different images: their losses, probes and signs of collapse cannot be compared with each other")
    if len({run.speed.per for run in found.runs if run.records}) > 1:
        notes.append("the runs were on different devices, so their images/s cannot be compared; the page lists the devices")
    return notes


def best_lines(found: RunComparison, groups: Sequence[ScoreGroup]) -> list[str]:
    """Returns a sentence for each group of accuracies of two runs or more: the best run, and how far apart runs must be to differ."""
    lines = []
    for group in groups:
        if group.protocol not in ("linear", "knn") or not (best := group.best("top-1")):
            continue
        names = " and ".join(found.runs[position].name for position in sorted(best))
        figure = group.scores[min(best)].figures["top-1"].text
        text = f"Best {group.title}: {names}, {figure}"
        if group.noise:
            text += f"; runs closer than {100 * CONFIDENCE_Z * math.sqrt(2) * group.noise:.1f} points may differ only because of the choice of val images"
        lines.append(f"{text}.")
    ends = {word: [run.name for run in found.runs if run.outcome.word == word] for word in (DIVERGED, COLLAPSED, STOPPED, RUNNING)}
    lines += [f"{word.capitalize()}: {', '.join(names)}." for word, names in ends.items() if names]
    return lines


def _differences_section(found: RunComparison) -> str:
    parts = []
    defaults = flatten(to_plain(TrainConfig()))
    for with_effect, title in ((True, ""), (False, "Without effect on what is learnt: options of speed, logging and storage")):
        different = found.differences(with_effect=with_effect)
        if title and different:
            parts.append(f"<h3>{page.escape(title)}</h3>")
        if different:
            rows = [
                [page.breakable(name), *(_option(value, first=values[0], default=defaults[name]) for value in values)]
                for name, values in different.items()
            ]
            parts.append(page.wide(page.html_table(["option", *_labels(found)], rows=rows)))
        elif with_effect:
            parts.append(page.paragraph("No option that changes what is learnt differs: the runs are repetitions of one config."))
    parts.append(
        page.paragraph(
            "Only options in which the runs differ are listed. Bold: differs from the first run; grey: the default, that of the paper's 300-epoch run.",
            kind="note",
        )
    )
    return page.section("differences", title="Where the configs differ", parts=parts)


def _option(value: Any, *, first: Any, default: Any) -> str:
    text = page.breakable(option_text(value))
    text = f"<b>{text}</b>" if value != first else text
    return f'<span class="same">{text}</span>' if value == default else text


def option_text(value: object) -> str:
    """Returns an option's value as it would be typed; '-' for an empty text."""
    if isinstance(value, list | tuple):
        return ", ".join(option_text(v) for v in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value) if value != "" else "-"


def _scores_section(found: RunComparison, groups: Sequence[ScoreGroup]) -> str:
    parts = []
    for group in groups:
        columns = sorted(group.scores)
        rows = []
        for measure in group.measures():
            best = group.best(measure)
            rows.append([page.breakable(measure), *(_cell(group.scores[i], measure, best=i in best) for i in columns)])
        header = ["", *(_label(found.runs[i], i) for i in columns)]
        parts += [
            f"<h3>{page.escape(group.title)}</h3>",
            page.wide(page.html_table(header, rows=rows, numbers=frozenset(range(1, len(header))))),
        ]
        noise = f" With so many images, one standard deviation of an accuracy is {100 * group.noise:.1f} points." if group.noise else ""
        steps = {found.runs[i].name: group.scores[i].step for i in columns}
        at = (
            ""
            if len(set(steps.values())) == 1
            else f" Steps: {', '.join(f'{name} {step:,}' for name, step in steps.items() if step is not None)}."
        )
        parts.append(page.paragraph(f"{group.note}.{noise}{at}", kind="note"))
    return page.section("scores", title="Scores", parts=parts)


def _cell(score: Score, measure: str, *, best: bool) -> str:
    if measure not in score.figures:
        return "-"
    figure = score.figures[measure]
    text = page.escape(figure.text)
    return f"<b>{text}</b>" if best else text


def _curves_section(found: RunComparison) -> str:
    x_key, why = found.x_axis()
    lines = [Curve(run.records, colour_of(i), style_of(i)) for i, run in enumerate(found.runs)]
    pictures = []
    for panel in (*TRAINING_PANELS, *COLLAPSE_PANELS):
        png = overlaid(lines, panel, x=x_key, x_title=x_key)
        if png is not None:
            pictures.append(page.image(png, alt=panel.title, kind="figure"))
    key = "".join(f"<span>{label}</span>" for label in _labels(found))
    parts = [f'<div class="key">{key}</div>', f'<div class="panels">{"".join(pictures)}</div>']
    if not pictures:
        parts = [page.paragraph("No run has logged a step yet.")]
    texts = [f"Over {why}."]
    if found.num_data > 1:
        texts.append("The runs saw different images: the shapes of the curves can be compared, their heights cannot.")
    return page.section("curves", title="Curves", parts=[*parts, page.paragraph(" ".join(texts), kind="note")])


def _speed_section(found: RunComparison) -> str:
    header = ["run", "device", "devices", "images/s each", "images/s", "waits for data", "memory", "images seen", "time"]
    rows = []
    for label, run in zip(_labels(found), found.runs, strict=True):
        if not run.records:
            rows.append([label, *["-"] * (len(header) - 1)])
            continue
        speed, memory = run.speed, run.last("memory_gib")
        figures = [
            *(
                speed.per,
                str(speed.devices),
                f"{speed.images_per_s_per_device:,.0f}",
                f"{speed.images_per_s_per_device * speed.devices:,.0f}",
            ),
            *(f"{100 * speed.data_wait_share:.0f} %", "-" if math.isnan(memory) else f"{memory:.1f} GiB"),
            *(f"{run.outcome.steps * run.config.global_batch:,}", "-" if math.isnan(run.seconds) else duration_text(run.seconds)),
        ]
        rows.append([label, *map(page.escape, figures)])
    parts = [page.wide(page.html_table([page.escape(h) for h in header], rows=rows, numbers=frozenset(range(2, len(header)))))]
    text = "images/s: median over the logged steps; one image is two views. Never compare a figure of a GPU with one of a CPU."
    return page.section("speed", title="Speed", parts=[*parts, page.paragraph(text, kind="note")])


def _commands_section(found: RunComparison, command: str) -> str:
    commands = [f"{run.name}: {run.provenance.get('command') or 'no provenance.json'}" for run in found.runs]
    flat = [{name: value for name, value in flatten(run.provenance).items() if name != "command"} for run in found.runs]
    names = dict.fromkeys(name for one in flat for name in one)
    different = {name: [one.get(name) for one in flat] for name in names if len({str(one.get(name)) for one in flat}) > 1}
    parts = [page.command("\n".join([*commands, "", command]))]
    if different:
        rows = [
            [page.breakable(name), *(page.breakable(option_text(v) if v is not None else "-") for v in values)]
            for name, values in different.items()
        ]
        parts += ["<h3>Where provenance differs</h3>", page.wide(page.html_table(["", *_labels(found)], rows=rows))]
    return page.section("commands", title="Commands", parts=parts)


def overview_table(found: RunComparison) -> RenderableType:
    """Returns `overview` as a table for the terminal."""
    from rich import box
    from rich.table import Table

    header, rows = overview(found, found.score_groups())
    table = Table(box=box.SIMPLE_HEAD)
    for position, title in enumerate(header):
        table.add_column(title, justify="right" if position > 1 else "left", no_wrap=position > 0, overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    return table


def difference_lines(found: RunComparison) -> Iterable[str]:
    """Yields a line for each run with the options in which it differs from the first one, for the terminal."""
    different = found.differences(with_effect=True)
    first = found.runs[0].name
    yield (
        f"options in which the configs differ from that of {first}:"
        if different
        else "no option that changes what is learnt differs: the runs are repetitions of one config"
    )
    for position, run in enumerate(found.runs[1:], start=1):
        changed = [
            f"{name} {option_text(values[position])} ({option_text(values[0])})"
            for name, values in different.items()
            if values[position] != values[0]
        ]
        more = f", and {len(changed) - MOST_OPTIONS} more (--out writes a page with all)" if len(changed) > MOST_OPTIONS else ""
        if different:
            yield f"  {run.name}: {', '.join(changed[:MOST_OPTIONS]) or 'nothing'}{more}"
