"""The report of a run: one self-contained HTML file with accuracy, training curves, speed, configuration and provenance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbyol.config.arguments import through_links
from fastbyol.config.errors import UserError
from fastbyol.config.plain import to_plain
from fastbyol.config.schema import DataConfig, TrainConfig
from fastbyol.data.build import build_loader
from fastbyol.evaluation import page
from fastbyol.evaluation.figures import COLLAPSE_PANELS, TRAINING_PANELS, curves, picture
from fastbyol.evaluation.gallery import Neighbours, display_pixels, draw_views, nearest_neighbours
from fastbyol.evaluation.protocols import PROTOCOLS, ProtocolResult, read_current, write_or_say
from fastbyol.evaluation.splits import split_paths
from fastbyol.evaluation.subjects import FeatureBank
from fastbyol.evaluation.summary import headline, score_header, score_rows
from fastbyol.evaluation.training_log import Record, alarms, logged_steps, read_provenance, throughput
from fastbyol.host.durable_files import write_durably
from fastbyol.run.checkpoint import RunState
from fastbyol.run.folder import flatten

REPORT_FILE = "report.html"
VIEW_EPOCHS = 3
VIEW_ROWS = 6
QUERIES = 10
NEIGHBOURS = 7
SHOWN_ALARMS = 3


@dataclass(frozen=True)
class Report:
    """Everything that the page shows.

    results: one per protocol. view_rows: (N, 1 + 2 epochs, S, S, 3) uint8: centre crop, then the views. commands: as typed, in order.
    out: the folder to write the page to; None: the run's own.
    """

    run: RunState
    bank: FeatureBank
    results: list[ProtocolResult]
    view_rows: np.ndarray
    commands: list[str]
    out: Path | None = None

    def headline(self) -> list[tuple[str, str]]:
        """Returns (figure, what it is) for the accuracies and the speed. Raises UserError if the run has logged no step."""
        folder = self.run.folder
        return headline(self.results, throughput(logged_steps(folder), read_provenance(folder)))

    def write(self) -> Path:
        """Writes report.html atomically and returns its path. Raises UserError if the folder cannot be written."""
        path = through_links((self.out or self.run.folder) / REPORT_FILE)
        text = report_page(self)
        try:
            write_durably(path, text)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); give a folder with --out") from error
        return path


def build_report(run: RunState, bank: FeatureBank, *, data: str, command: str, out: Path | None = None) -> Report:
    """Builds the report of a run on a data folder; protocols not yet evaluated at this step and on this data are evaluated now.

    command: the command as typed, to be shown. out: folder for page and results; None means the run folder. Raises UserError if the
    run has logged no step.
    """
    logged_steps(run.folder)
    folder, results, commands = out or run.results, [], [_training_command(read_provenance(run.folder))]
    for protocol, evaluate in PROTOCOLS.items():
        current = read_current(folder, protocol, step=run.step, data=data)
        if current is None:
            result, facts = evaluate(bank), {"step": run.step, "command": command}
            write_or_say(result, folder, data=data, **facts)
        else:
            result, facts = current
        results.append(result)
        commands.append(str(facts.get("command", "")))
    known = [text for text in dict.fromkeys([*commands, command]) if text]
    return Report(run=run, bank=bank, results=results, view_rows=_view_rows(bank, data), commands=known, out=out)


def _training_command(provenance: Record) -> str:
    """Returns the training command to type; provenance stores only the script and its options."""
    processes = int(provenance.get("world_size") or 1)
    launcher = f"torchrun --nproc-per-node {processes}" if processes > 1 else "python"
    return f"{launcher} {provenance['command']}" if provenance.get("command") else ""


def _view_rows(bank: FeatureBank, data: str) -> np.ndarray:
    """Returns (N, 1 + 2 epochs, S, S, 3) uint8: the centre crop of some training images, then their views."""
    config, train = bank.config, bank.splits.train
    index = torch.randperm(train.num_samples, generator=torch.Generator().manual_seed(config.seed))[:VIEW_ROWS]
    source = DataConfig(train=str(split_paths(data)[0]), workers=1, prefetch=1)
    with build_loader(source, views=config.views, seed=config.seed, global_batch=1) as loader:
        views = draw_views(loader, index=index.tolist(), epochs=VIEW_EPOCHS)
    rows = torch.cat([train.pick(index)[:, None], views], dim=1)
    return display_pixels(rows.flatten(0, 1), views=config.views).reshape(*rows.shape[:2], *rows.shape[3:], 3)


def report_page(report: Report) -> str:
    """Renders the report as HTML."""
    run, records = report.run, logged_steps(report.run.folder)
    lead = f"{run.config.model.encoder}, {run.step:,} optimizer steps of {run.config.global_batch:,} images, seed {run.config.seed}"
    sections = [
        _headline_section(report),
        _views_section(report.view_rows),
        _training_section(records),
        _collapse_section(records),
        _neighbours_section(report.bank),
        _configuration_section(run.config),
        _provenance_section(read_provenance(run.folder)),
        _commands_section(report.commands),
    ]
    return page.page(f"BYOL run {run.folder.resolve().name}", lead=lead, sections=sections)


def _headline_section(report: Report) -> str:
    results = report.results
    header, rows = score_header(results), score_rows(results)
    note = (
        f"{results[0].num_train:,} train and {results[0].num_val:,} val images of {results[0].num_classes} classes; every row is "
        "evaluated by the same code on the same images. Linear: logistic regression on frozen, standardised features, penalty "
        "chosen on a held-out part of train. kNN: weighted votes in cosine similarity. The encoder never saw a label."
    )
    parts = [
        page.cards(report.headline()),
        page.table(header, rows=rows, numbers=frozenset(range(1, len(header)))),
        page.paragraph(note, kind="note"),
    ]
    return page.section("headline", title="What was learnt, how fast", parts=parts)


def _views_section(view_rows: np.ndarray) -> str:
    num_epochs = view_rows.shape[1] // 2
    header = ["centre crop", *(f"epoch {e}, view {v}" for e in range(num_epochs) for v in (1, 2))]
    rows = [[page.image(picture(pixels), alt=name) for name, pixels in zip(header, row, strict=True)] for row in view_rows]
    text = "Each row is a training image. The network only sees the views, two per epoch, drawn here by the run's own sampler."
    parts = [page.paragraph(text), page.image_grid(header, rows=rows, gaps=frozenset(range(1, len(header), 2)))]
    return page.section("views", title="Views as the loader draws them", parts=parts)


def _training_section(records: list[Record]) -> str:
    parts = [page.image(curves(records, TRAINING_PANELS), alt="loss, learning rate, tau, probe, throughput", kind="figure")]
    return page.section("training", title="Training", parts=parts)


def _collapse_section(records: list[Record]) -> str:
    said = alarms(records)
    verdict = [page.paragraph(line, kind="alarm") for line in said[:SHOWN_ALARMS]]
    if len(said) > SHOWN_ALARMS:
        verdict.append(page.paragraph(f"and {len(said) - SHOWN_ALARMS} more like these", kind="alarm"))
    figure = page.image(curves(records, COLLAPSE_PANELS), alt="signs of collapse", kind="figure")
    return page.section("collapse", title="Signs of collapse", parts=[*(verdict or [page.paragraph("No alarm was raised.")]), figure])


def _neighbours_section(bank: FeatureBank) -> str:
    features, views = bank.of("byol"), bank.config.views
    count = min(QUERIES, bank.splits.val.num_samples)
    found = nearest_neighbours(features.train, features.val, queries=count, k=NEIGHBOURS, seed=bank.config.seed)
    queries = display_pixels(bank.splits.val.pick(found.query), views=views)
    neighbours = display_pixels(bank.splits.train.pick(found.neighbour.flatten()), views=views)
    neighbours = neighbours.reshape(*found.neighbour.shape, *neighbours.shape[1:])
    rows = [_neighbour_cells(bank, found, row, queries[row], neighbours[row]) for row in range(count)]
    text = "A val image and the training images with the nearest features, with their cosine. Green frame: same class; red frame: another class."
    header = ["class", "val image", *(f"neighbour {i + 1}" for i in range(neighbours.shape[1]))]
    parts = [page.paragraph(text), page.image_grid(header, rows=rows, gaps=frozenset({2}))]
    return page.section("neighbours", title="Nearest neighbours", parts=parts)


def _neighbour_cells(bank: FeatureBank, found: Neighbours, row: int, query: np.ndarray, neighbours: np.ndarray) -> list[str]:
    features, names = bank.of("byol"), bank.splits.class_names
    label = int(features.val.label[found.query[row]])
    cells = [page.escape(names[label] if label >= 0 else "no label"), page.image(picture(query), alt=f"val image {int(found.query[row])}")]
    for pixels, position, similarity in zip(neighbours, found.neighbour[row], found.similarity[row].tolist(), strict=True):
        other = int(features.train.label[position])
        alt = f"train image {int(position)}: {names[other] if other >= 0 else 'no label'}, cosine {similarity:.3f}"
        cells.append(page.image(picture(pixels), alt=alt, kind="hit" if other == label >= 0 else "miss") + f"{similarity:.2f}")
    return cells


def _configuration_section(config: TrainConfig) -> str:
    plain, default = to_plain(config), to_plain(TrainConfig())
    views = plain.pop("views")
    view1, view2 = views.pop("view1"), views.pop("view2")
    rows = _option_rows({**plain, "views": views}, default)
    half = math.ceil(len(rows) / 2)
    columns = "".join(page.table(["option", "value", "default"], rows=part) for part in (rows[:half], rows[half:]))
    parts = [
        page.paragraph("The default column is filled in where the run differs from the paper's 300-epoch ResNet-50 run.", kind="note"),
        f'<div class="columns">{columns}</div>',
        "<h3>What each view draws</h3>",
        page.table(["operation", "view 1", "view 2"], rows=[[name, _text(view1[name]), _text(view2[name])] for name in view1]),
    ]
    return page.section("configuration", title="Configuration", parts=parts)


def _option_rows(values: dict[str, Any], default: dict[str, Any]) -> list[list[str]]:
    defaults = flatten(default)
    return [[name, _text(v), "" if v == defaults[name] else _text(defaults[name])] for name, v in flatten(values).items()]


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_text(v) for v in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value) if value != "" else "-"


def _provenance_section(provenance: Record) -> str:
    known = {name: value for name, value in flatten(provenance).items() if name != "command"}
    parts = [page.table([], rows=[[name, _text(value)] for name, value in known.items()])]
    if not known:
        parts = [page.paragraph("This run folder has no provenance.json.")]
    return page.section("provenance", title="Provenance", parts=parts)


def _commands_section(commands: list[str]) -> str:
    return page.section("commands", title="Commands", parts=[page.command("\n".join(commands))])
