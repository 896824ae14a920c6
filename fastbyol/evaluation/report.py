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
from fastbyol.config.plain import flatten, to_plain
from fastbyol.config.schema import DataConfig, TrainConfig
from fastbyol.data.build import build_loader
from fastbyol.evaluation import page
from fastbyol.evaluation.evaluate import facts_of, inputs_of, keep, possible
from fastbyol.evaluation.figures import COLLAPSE_PANELS, TRAINING_PANELS, curves, picture
from fastbyol.evaluation.gallery import draw_views, thumbnails
from fastbyol.evaluation.protocols import DEFAULT_SETTINGS, PROTOCOLS
from fastbyol.evaluation.report_images import clusters_section, map_section, neighbours_section, odd_images_section
from fastbyol.evaluation.report_tasks import task_sections
from fastbyol.evaluation.result_file import LabelFreeResult, ProtocolResult, Result, read_current
from fastbyol.evaluation.subjects import FeatureBank
from fastbyol.evaluation.summary import headline, label_free_header, label_free_rows, score_header, score_rows
from fastbyol.evaluation.training_log import Record, alarms, logged_steps, read_provenance, throughput
from fastbyol.evaluation.verdict import Verdict, verdict_on
from fastbyol.host.durable_files import write_durably
from fastbyol.run.checkpoint import RunState

REPORT_FILE = "report.html"
VIEW_EPOCHS = 3
VIEW_ROWS = 6
SHOWN_ALARMS = 3


@dataclass(frozen=True)
class Report:
    """Everything that the page shows.

    results: one per protocol that the data allow. view_rows: (N, 1 + 2 epochs, S, S, 3) uint8: centre crop, then the views. commands: as typed, in order.
    out: the folder to write the page to; None: the run's own.
    """

    run: RunState
    bank: FeatureBank
    results: list[Result]
    verdict: Verdict
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
    folder, facts, inputs = out or run.results, facts_of(run, bank), inputs_of(bank, data)
    results: list[Result] = []
    commands = [_training_command(read_provenance(run.folder))]
    for protocol in possible(tuple(PROTOCOLS), bank.splits):
        known = read_current(folder, protocol, step=run.step, data=data, inputs=inputs, settings=DEFAULT_SETTINGS[protocol])
        if known is None:
            known = PROTOCOLS[protocol](bank), {"command": command}
            keep(known[0], folder, data=data, inputs=inputs, run=run, command=command, facts=facts)
        results.append(known[0])
        commands.append(str(known[1].get("command", "")))
    return Report(
        run=run,
        bank=bank,
        results=results,
        verdict=verdict_on(results, facts),
        view_rows=_view_rows(bank),
        commands=[text for text in dict.fromkeys([*commands, command]) if text],
        out=out,
    )


def _training_command(provenance: Record) -> str:
    """Returns the training command to type; provenance stores only the script and its options."""
    processes = int(provenance.get("world_size") or 1)
    launcher = f"torchrun --nproc-per-node {processes}" if processes > 1 else "python"
    return f"{launcher} {provenance['command']}" if provenance.get("command") else ""


def _view_rows(bank: FeatureBank) -> np.ndarray:
    """Returns (N, 1 + 2 epochs, S, S, 3) uint8: the centre crop of some training images, then their views."""
    config, train = bank.config, bank.splits.train
    index = torch.randperm(train.num_samples, generator=torch.Generator().manual_seed(config.seed))[:VIEW_ROWS]
    source = DataConfig(train=train.source, workers=1, prefetch=1)
    with build_loader(source, views=config.views, seed=config.seed, global_batch=1, option="--data") as loader:
        views = draw_views(loader, index=train.positions[index.numpy()].tolist(), epochs=VIEW_EPOCHS)
    rows = torch.cat([train.pick(index)[:, None], views], dim=1)
    pixels = thumbnails(rows.flatten(0, 1), views=config.views)
    return pixels.reshape(*rows.shape[:2], *pixels.shape[1:])


def report_page(report: Report) -> str:
    """Renders the report as HTML."""
    run, records = report.run, logged_steps(report.run.folder)
    lead = f"{run.config.model.encoder}, {run.step:,} optimizer steps of {run.config.global_batch:,} images, seed {run.config.seed}"
    sections = [
        _headline_section(report),
        *(_label_free_section(result) for result in report.results if isinstance(result, LabelFreeResult)),
        *task_sections(report.out or run.results, step=run.step),
        _views_section(report.view_rows),
        _training_section(records),
        _collapse_section(records),
        neighbours_section(report.bank),
        clusters_section(report.bank),
        map_section(report.bank),
        odd_images_section(report.bank),
        _configuration_section(run.config),
        _provenance_section(read_provenance(run.folder)),
        _commands_section(report.commands),
    ]
    return page.page(f"BYOL run {run.folder.resolve().name}", lead=lead, sections=sections)


def _headline_section(report: Report) -> str:
    parts = [page.cards(report.headline()), *_verdict_parts(report.verdict)]
    if results := [result for result in report.results if isinstance(result, ProtocolResult)]:
        header, rows = score_header(results), score_rows(results)
        settings = "; ".join(f"{result.protocol}: {_settings_text(result)}" for result in results)
        note = (
            f"{results[0].num_train:,} train and {results[0].num_val:,} val images of {results[0].num_classes} classes; every row is "
            "evaluated by the same code on the same images. Linear: logistic regression on frozen, standardised features, penalty "
            f"chosen on a held-out part of train. kNN: weighted votes in cosine similarity ({settings}). The encoder never saw a label."
        )
        parts += [page.table(header, rows=rows, numbers=frozenset(range(1, len(header)))), page.paragraph(note, kind="note")]
    else:
        parts.append(page.paragraph(f"No linear or kNN accuracy: {report.bank.splits.unscored}.", kind="note"))
    return page.section("headline", title="What was learnt, and how fast", parts=parts)


def _settings_text(result: Result) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in result.settings.items())


def _verdict_parts(verdict: Verdict) -> list[str]:
    parts = [page.paragraph(f"Verdict: {verdict.headline}.", kind="verdict"), *(page.paragraph(text) for text in verdict.details)]
    return [*parts, *([page.paragraph("Try first:"), page.numbered(verdict.ideas)] if verdict.ideas else [])]


def _label_free_section(result: LabelFreeResult) -> str:
    text = (
        f"The ranks are those of the features of {result.num_images:,} images; the other rows compare two views of each of {result.num_pairs:,} "
        "images, drawn as in training. They tell an encoder that collapsed or learnt nothing from one that learnt what its views ask for; only "
        "labels can say whether that helps a task."
    )
    header, rows = label_free_header(), label_free_rows(result)
    parts = [page.table(header, rows=rows, numbers=frozenset({1, 2, 3})), page.paragraph(text, kind="note")]
    return page.section("labelfree", title="Quality without labels", parts=parts)


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
        "<h3>Augmentation of each view</h3>",
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
