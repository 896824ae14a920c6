"""Text of the evaluation figures, shared by the terminal and the report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from fastbyol.evaluation.result_file import LabelFreeResult, ProtocolResult, Result
from fastbyol.evaluation.subjects import BASELINE_TITLES
from fastbyol.evaluation.training_log import Throughput
from fastbyol.evaluation.verdict import PROTOCOL_TITLES

if TYPE_CHECKING:
    from rich.console import RenderableType

MEASURES: dict[str, tuple[str, str, str]] = {
    "other_view_top1": (
        "other view found",
        "{:.1f} %",
        "share of images whose two views find each other; higher: the encoder recognises the image",
    ),
    "alignment": ("alignment", "{:.3f}", "distance between two views of an image; lower: the encoder ignores what the views change"),
    "uniformity": ("uniformity", "{:.3f}", "lower: features spread over the whole sphere; 0: all images at one point"),
    "rankme": ("RankMe", "{:.1f}", "directions in use; 1: collapsed; compare it between runs, not with an untrained encoder"),
    "effective_rank": ("effective rank", "{:.1f}", "the same after the mean is subtracted"),
    "participation_ratio": ("participation ratio", "{:.1f}", "directions that hold most of the variance"),
}
"""Title, format and meaning of each measure without labels."""


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def score_header(results: Iterable[ProtocolResult]) -> list[str]:
    """Returns the column titles of `score_rows`."""
    columns = [f"{PROTOCOL_TITLES[result.protocol]} {top}" for result in results for top in ("top-1", "top-5")]
    return ["", *columns, "dim"]


def score_rows(results: list[ProtocolResult], *, title: str = "BYOL") -> list[list[str]]:
    """Returns a row for each subject, the first of them called `title`, then chance. Top-5 is meaningless with five classes or fewer and shown as '-'."""
    rows = []
    for subject in results[0].scores:
        scores = [result.scores[subject] for result in results]
        cells = [cell for result, s in zip(results, scores, strict=True) for cell in (percent(s.top1), _top5(s.top5, result.num_classes))]
        rows.append([title if subject == "byol" else BASELINE_TITLES.get(subject, subject), *cells, f"{scores[0].feature_dim:,}"])
    chance = [cell for r in results for cell in (percent(r.chance_top1), _top5(5 / r.num_classes, r.num_classes))]
    return [*rows, ["chance", *chance, ""]]


def _top5(share: float, num_classes: int) -> str:
    return percent(share) if num_classes > 5 else "-"


def label_free_header(*, title: str = "BYOL") -> list[str]:
    """Returns the column titles of `label_free_rows`. title: what the trained encoder is called."""
    return ["without labels", title, "untrained", "pixels", ""]


def label_free_rows(result: LabelFreeResult) -> list[list[str]]:
    """Returns a row for each measure: its value for the trained and the untrained encoder and raw pixels, and what it says."""
    rows = []
    for key, (title, form, meaning) in MEASURES.items():
        scale = 100 if form.endswith("%") else 1
        values = [result.measures[subject].get(key) for subject in ("byol", "untrained", "pixels")]
        rows.append([title, *("" if value is None else form.format(scale * value) for value in values), meaning])
    return rows


def headline(results: Iterable[Result], speed: Throughput) -> list[tuple[str, str]]:
    """Returns (figure, what it is): each protocol compared with its baselines, then speed."""
    lines = []
    for result in results:
        if isinstance(result, LabelFreeResult):
            lines += _label_free_headline(result)
            continue
        scores = {name: score.top1 for name, score in result.scores.items()}
        others = ", ".join(f"{BASELINE_TITLES.get(name, name)} {percent(top1)}" for name, top1 in scores.items() if name != "byol")
        title = PROTOCOL_TITLES[result.protocol]
        lines.append((percent(scores["byol"]), f"{title} top-1 on val; {others}; chance {percent(result.chance_top1)}"))
    per_device = f"{speed.images_per_s_per_device:,.0f} images/s"
    lines.append((per_device, f"training speed per {speed.per}, {speed.devices} in the run; one image = two views"))
    lines.append((percent(speed.data_wait_share), "of the training time spent waiting for data"))
    return lines


def _label_free_headline(result: LabelFreeResult) -> list[tuple[str, str]]:
    found = {name: measures["other_view_top1"] for name, measures in result.measures.items()}
    others = f"untrained {percent(found['untrained'])}; raw pixels {percent(found['pixels'])}; chance {percent(1 / result.num_pairs)}"
    return [(percent(found["byol"]), f"of {result.num_pairs:,} images are found again by their other view; {others}")]


def label_free_table(result: LabelFreeResult, *, title: str) -> RenderableType:
    """Returns the measures without labels as a table for the terminal."""
    from rich import box
    from rich.table import Table

    heading = f"{result.num_images:,} images, two views of each of {result.num_pairs:,}"
    table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD)
    for position, name in enumerate(label_free_header(title=title)):
        table.add_column(name, justify="right" if 0 < position < 4 else "left", no_wrap=position < 4)
    for row in label_free_rows(result):
        table.add_row(*row)
    return table


def score_table(results: list[ProtocolResult], *, title: str) -> RenderableType:
    """Returns the scores as a table for the terminal."""
    from rich import box
    from rich.table import Table

    first = results[0]
    heading = f"{first.num_train:,} train and {first.num_val:,} val images, {first.num_classes} classes"
    table = Table(title=heading, title_justify="left", box=box.SIMPLE_HEAD)
    for position, name in enumerate(score_header(results)):
        table.add_column(name, justify="right" if position else "left", no_wrap=position == 0)
    for row in score_rows(results, title=title):
        table.add_row(*row, style="bold" if row[0] == title else None)
    return table


def headline_table(lines: list[tuple[str, str]]) -> RenderableType:
    """Returns the headline figures as a table for the terminal."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="bold", no_wrap=True)
    table.add_column()
    for figure, meaning in lines:
        table.add_row(figure, meaning)
    return table
