"""The card of an exported encoder: what it was trained on and how, what it scored, how its images are made, how it is loaded.

It is made of facts, plain values that formats also store inside their files. No path of the machine it was trained on is among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from fastbyol import __version__
from fastbyol.config.console import printable
from fastbyol.config.plain import to_plain
from fastbyol.config.schema import WEIGHTS_OPTIONS, TrainConfig
from fastbyol.evaluation.embedding import weights_digest
from fastbyol.evaluation.result_file import LabelFreeResult, ProtocolResult, TaskResult, results_in, seed_text
from fastbyol.export import CROP
from fastbyol.exports.format import Subject
from fastbyol.host.saved_structure import is_count
from fastbyol.run.checkpoint import RunState

UNKNOWN_LICENCE = "unknown"
_SPLITS = re.compile(r"(train|val|valid|validation|test)(\.beton)?$")
_PAPER = "Bootstrap your own latent (Grill et al., 2020), https://arxiv.org/abs/2006.07733"


def source_name(data: str) -> str:
    """Returns the last part of a path, with its parent's name before it where it only says which split it is; several are joined by ' + '."""
    names = []
    for each in data.split("::"):
        path = PurePath(each.rstrip("/"))
        parent = path.parent.name
        names.append(f"{parent}/{path.name}" if parent and _SPLITS.match(path.name) else path.name)
    return printable(" + ".join(filter(None, names)))


def collect_facts(run: RunState, subject: Subject, *, licence: str) -> dict[str, Any]:
    """Returns what is known of the encoder, as plain values for JSON; `export.py` adds the check and the lines that load it."""
    config, encoder = run.config, subject.encoder
    views, digest = config.views, weights_digest(encoder)
    return {
        "fastbyol": __version__,
        "options": {name: to_plain(_option(config, name)) for name in WEIGHTS_OPTIONS},
        "encoder": {
            "name": config.model.encoder,
            "feature_dim": subject.feature_dim,
            "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
            "digest": digest,
        },
        "input": {
            "size_px": views.size_px,
            "crop": CROP,
            "interpolation": views.interpolation,
            "antialias": views.antialias,
            "mean": list(views.mean),
            "std": list(views.std),
            "channels": "RGB in [0, 1], then (x - mean) / std",
        },
        "training": _training(run),
        "scores": list(_scores(run, digest)),
        "licence": licence,
    }


def _option(config: TrainConfig, name: str) -> Any:
    group, _, field = name.partition(".")
    return getattr(getattr(config, group), field)


def _training(run: RunState) -> dict[str, Any]:
    if "encoder" in run.state:
        return {"method": f"not known: the {run.title} of another program"}
    config, images = run.config, run.state.get("num_samples")
    images = images if is_count(images) else 0
    groups = {name: to_plain(getattr(config, name)) for name in ("model", "views", "optim", "objective")}
    return {
        "method": f"BYOL: {_PAPER}",
        "network": "the online network's encoder, as the paper evaluates it",
        "source": source_name(config.data.train),
        "images": images,
        "steps": run.step,
        "epochs": round(run.step * config.global_batch / images, 2) if images else None,
        "global_batch": config.global_batch,
        "seed": config.seed,
        "started_from": source_name(config.init_from),
        "config": groups,
    }


def _scores(run: RunState, digest: str) -> Iterator[dict[str, Any]]:
    """Yields the results in the run's folder that are of this checkpoint's weights, percentages and other figures by title."""
    for _, result, facts in results_in(run.results):
        # A weights file has no steps and may have been replaced, so its results must name the weights. Older results of a run do not.
        measured = str(facts.get("inputs", "")).partition(" ")[0]
        if facts.get("step") != run.step or (measured != digest and (measured or "encoder" in run.state)):
            continue
        row = {"task": result.protocol, "data": source_name(str(facts.get("data", "")))}
        if isinstance(result, ProtocolResult):
            figures = {name: {"top-1 %": 100 * each.top1, "top-5 %": 100 * each.top5} for name, each in result.scores.items()}
        elif isinstance(result, TaskResult):
            row["task"] = f"{result.protocol} ({result.version} settings{seed_text(facts)})"
            figures = {name: dict(_titled(each.scores, result.columns)) for name, each in result.subjects.items()}
        else:
            assert isinstance(result, LabelFreeResult)
            figures = result.measures
        yield row | {"figures": {name: {key: round(value, 4) for key, value in each.items()} for name, each in figures.items()}}


def _titled(scores: Mapping[str, float], columns: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    for key, value in scores.items():
        title = columns.get(key, key).removeprefix("-")
        yield title, 100 * value if title.endswith("%") else value


# ---- as text


def front_matter(facts: Mapping[str, Any], *, library: str) -> str:
    """Returns the YAML that the Hugging Face Hub reads at the top of a card."""
    head = {
        "library_name": library,
        "license": facts["licence"],
        "pipeline_tag": "image-feature-extraction",
        "tags": ["byol", "self-supervised", "fastbyol"],
    }
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n"


def card_text(facts: Mapping[str, Any]) -> str:
    """Returns the card as Markdown."""
    encoder, images, training = facts["encoder"], facts["input"], facts["training"]
    lines = [
        f"# {encoder['name']}, {facts['format']}",
        f"An image encoder: {encoder['parameters']:,} parameters, {encoder['feature_dim']} numbers an image. Written by fastbyol {facts['fastbyol']}.",
        "",
        "## Load it",
        *_block(facts["load"], "yaml" if facts["format"] == "detectron2" else "python"),
        "",
        "## Images",
        f"{images['channels']}; {images['size_px']} x {images['size_px']} px.",
        f"- crop: {images['crop']}",
        f"- resize: {images['interpolation']}, {'antialiased' if images['antialias'] else 'not antialiased'}",
        f"- mean {images['mean']}, std {images['std']}",
        "",
        "## Training",
        f"- method: {training['method']}",
    ]
    if "steps" in training:
        lines += [
            f"- data: {training['images']:,} images of `{training['source']}`, without labels",
            f"- length: {training['steps']:,} steps of {training['global_batch']} images, {training['epochs']} epochs, seed {training['seed']}",
            f"- weights: {training['network']}",
        ]
        if training["started_from"]:
            lines.append(f"- started from: `{training['started_from']}`")
        lines += ["", "Settings:", *_block(yaml.safe_dump(training["config"], sort_keys=False).splitlines(), "yaml")]
    lines += ["", "## Scores", *_score_lines(facts["scores"])]
    check = facts.get("check")
    if check:
        lines += ["", "## Check at export", check["words"]]
    licence = facts["licence"]
    said = "not stated: ask the author" if licence == UNKNOWN_LICENCE else licence
    return "\n".join([*lines, "", "## Licence", f"Of these weights: {said}. Of fastbyol: Apache-2.0.", ""])


def _block(lines: list[str], language: str) -> list[str]:
    return [f"```{language}", *lines, "```"]


def _score_lines(scores: list[dict[str, Any]]) -> Iterator[str]:
    if not scores:
        yield "None: this checkpoint has not been evaluated."
        return
    for row in scores:
        yield f"- {row['task']} on `{row['data']}`"
        for name, figures in row["figures"].items():
            shown = ", ".join(
                f"{title[:-2]} {value:.1f} %" if title.endswith(" %") else f"{title} {value:.4g}" for title, value in figures.items()
            )
            yield f"  - {'this encoder' if name == 'byol' else name}: {shown}"


def card_path(path: Path) -> Path:
    """Returns where the card of an exported file lies."""
    return path.with_name(f"{path.name}.md")
