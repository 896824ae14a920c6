"""Tries a recipe on the sets of `small_sets`: BYOL against the untrained encoder, PCA of the pixels, and the same encoder trained with labels.

    python -m benchmarks.recipes --sets /tmp/small_sets --out /tmp/recipes --supervised
    python -m benchmarks.recipes --sets /tmp/small_sets --out /tmp/recipes --name bias --byol-only -- --model.head_bias true
    python -m benchmarks.recipes --sets /tmp/small_sets --out /tmp/recipes --only demo_scenes --preset cpu_demo_scenes --name cpu_demo_scenes
    python -m benchmarks.recipes --sets /tmp/small_sets --out /tmp/recipes --keep docs/recipes.json --table recipes    # into one file
    python -m benchmarks.recipes --sets /tmp/small_sets --out /tmp/leads --against base        # what the other recipes change, seed by seed

Each run is what a user types: `fastbyol suggest --devices 0`, then `fastbyol/train.py` with the file that it wrote (or with `--preset`) and what
follows `--`, in a process of its own with one thread. Figures are top-1 on val, in percent, of logistic regression and of 20 nearest neighbours on frozen
features (`fastbyol evaluate`'s protocols). One JSON file a run in OUT; a run that is there is not repeated.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.small_sets import DEMO_SETS, SETS, write_sets
from fastbyol.config.arguments import OneLineParser
from fastbyol.config.console import say
from fastbyol.config.errors import one_line_errors
from fastbyol.config.schema import TrainConfig
from fastbyol.data import build_image_loader, build_loader
from fastbyol.evaluation.protocols import evaluate_knn, evaluate_linear
from fastbyol.evaluation.splits import Split, Splits, common_classes, open_splits
from fastbyol.evaluation.subjects import FeatureBank
from fastbyol.export import encoder_of
from fastbyol.models import encoder_from
from fastbyol.run.checkpoint import load_run
from fastbyol.run.precision import autocast

ROOT = Path(__file__).resolve().parents[1]
SUBJECTS = ("byol", "untrained", "pca", "supervised")
WHOLE_IMAGE = "whole image at evaluation"
MAX_SEED = 100
PEAK_LR = 0.1
"""Peak learning rate of the training with labels, as He et al. (2016) have it for CIFAR at 128 images a step: two views of 64 here."""


def train(data: Path, run: Path, options: list[str], *, preset: str) -> float:
    """Trains a run with these options on top of the preset, or of the suggested settings where it is empty, and returns its CPU seconds, of
    the loader's threads and the start too.
    """
    run.parent.mkdir(parents=True, exist_ok=True)
    suggested = run.parent / f"{run.name}.yaml"
    settings: list[str | Path] = ["--preset", preset, "--data.train", data / "train"] if preset else ["--config", suggested]
    with (run.parent / f"{run.name}.log").open("w") as log:
        if not preset:
            _python(log, "-m", "fastbyol", "suggest", "--data", data / "train", "--devices", "0", "--out", suggested, "--overwrite")
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _python(log, ROOT / "fastbyol" / "train.py", *settings, "--out", run, *options)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def _python(log: TextIO, *arguments: str | Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *map(str, arguments)], check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)


def supervised_encoder(config: TrainConfig, splits: Splits, *, steps: int) -> nn.Module:
    """Returns the run's encoder trained with labels on the run's views: cross-entropy, SGD with Nesterov momentum 0.9, cosine."""
    torch.manual_seed(config.seed)
    num_classes = len(splits.class_names)
    encoder = encoder_from(config.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    head = nn.Linear(int(encoder.feature_dim), num_classes)  # type: ignore[arg-type]
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=PEAK_LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loader = build_loader(config.data, views=config.views, global_batch=config.global_batch, seed=config.seed)
    with loader:
        batches = loader.endless()
        for _ in range(steps):
            batch = next(batches)
            images, label = torch.cat([batch.view1, batch.view2]), torch.cat([batch.label, batch.label])
            with autocast(config.precision, device=torch.device("cpu")):
                logits = head(encoder(images))
            loss = F.cross_entropy(logits.float(), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return encoder.eval()


def scores_of(bank: FeatureBank, subjects: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Returns {subject: {'linear': top-1, 'knn': top-1}} in percent."""
    results = {"linear": evaluate_linear(bank, subjects=subjects), "knn": evaluate_knn(bank, subjects=subjects)}
    return {subject: {name: round(100 * result.scores[subject].top1, 1) for name, result in results.items()} for subject in subjects}


def whole_images(data: Path, config: TrainConfig) -> Splits:
    """Returns the splits with the largest centred square of each image instead of the evaluation's crop of 7/8."""
    train, val = (build_image_loader(data / split, views=config.views, batch=256, crop_share=1.0) for split in ("train", "val"))
    names = common_classes(train.class_names, val.class_names)
    first, second = (Split(loader, size_px=config.views.size_px, class_names=names) for loader in (train, val))
    return Splits(first, second)


def measure(
    data: Path, run: Path, options: list[str], *, preset: str = "", baselines: bool, supervised: bool, whole: bool = False
) -> dict[str, Any]:
    """Trains and evaluates one run and returns its record."""
    cpu_s = train(data, run, options, preset=preset)
    state = load_run(str(run))
    with open_splits(data, views=state.config.views, batch=256) as splits:
        bank = FeatureBank(encoder_of(state), config=state.config, splits=splits)
        scores = scores_of(bank, ("byol", "untrained", "pca") if baselines else ("byol",))
        if supervised:
            trained = supervised_encoder(state.config, splits, steps=state.step)
            scores["supervised"] = scores_of(FeatureBank(trained, config=state.config, splits=splits), ("byol",))["byol"]
        assert splits.val is not None
        num_val = splits.val.num_samples
    if whole:
        with whole_images(data, state.config) as splits:
            scores["byol_whole"] = scores_of(FeatureBank(encoder_of(state), config=state.config, splits=splits), ("byol",))["byol"]
    return {"scores": scores, "val": num_val, "steps": state.step, "cpu_s": round(cpu_s), "options": options}


def table(records: list[dict[str, Any]]) -> list[str]:
    """Returns a Markdown table with a row for each set and recipe: mean over the seeds, lowest to highest where there are several."""
    lines = [
        "| set | recipe | seeds | steps | CPU-min | BYOL linear / kNN | untrained | PCA | with labels |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["set"], record["recipe"]), []).append(record)
    for (name, recipe), runs in sorted(groups.items()):
        timed = [run["cpu_s"] for run in runs if "cpu_s" in run]  # a run of `make demo` is not timed by itself
        minutes = f"{sum(timed) / len(timed) / 60:.1f}" if timed else "-"
        cells = [_cell([run["scores"][subject] for run in runs if subject in run["scores"]]) for subject in SUBJECTS]
        lines.append(f"| {name} | {recipe} | {len(runs)} | {runs[0]['steps']:,} | {minutes} | {' | '.join(cells)} |")
    return lines


def differences(records: list[dict[str, Any]], *, base: str) -> list[str]:
    """Returns a Markdown table of what each recipe changes against `base`: mean over the common seeds of the differences of the same seed,
    plus or minus its standard error; settled where that mean is more than two standard errors from 0.

    The whole image at evaluation, where it was measured, is a row of its own, against the crop on the same encoders.
    """
    scores = {(record["set"], record["recipe"], record["seed"]): record["scores"]["byol"] for record in records}
    scores |= {
        (record["set"], WHOLE_IMAGE, record["seed"]): record["scores"]["byol_whole"]
        for record in records
        if record["recipe"] == base and "byol_whole" in record["scores"]
    }
    lines = ["| set | instead of the base | seeds | linear | kNN |", "|---|---|---|---|---|"]
    for name, recipe in sorted({(name, recipe) for name, recipe, _ in scores if recipe != base}):
        seeds = [seed for seed in range(MAX_SEED) if (name, recipe, seed) in scores and (name, base, seed) in scores]
        if len(seeds) < 2:
            continue
        cells = [
            _difference([scores[name, recipe, seed][protocol] - scores[name, base, seed][protocol] for seed in seeds])
            for protocol in ("linear", "knn")
        ]
        lines.append(f"| {name} | {recipe} | {len(seeds)} | {' | '.join(cells)} |")
    return lines


def _difference(values: list[float]) -> str:
    mean = sum(values) / len(values)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    verdict = "not settled" if abs(mean) <= 2 * error else "better" if mean > 0 else "worse"
    return f"{mean:+.1f} ± {error:.1f}, {verdict}"


def _cell(scores: list[dict[str, float]]) -> str:
    return " / ".join(_spread([score[protocol] for score in scores]) for protocol in ("linear", "knn")) if scores else "-"


def _spread(values: list[float]) -> str:
    mean = f"{sum(values) / len(values):.1f}"
    return mean if min(values) == max(values) else f"{mean} ({min(values):.1f} to {max(values):.1f})"


@one_line_errors
def main(given: Sequence[str] | None = None) -> None:
    parser = OneLineParser(prog="benchmarks.recipes", description=__doc__)
    parser.add_argument("--sets", type=Path, required=True, help="folder of the sets; missing ones are made")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and records")
    parser.add_argument("--name", default="suggested", help="name of the tried recipe in the table (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=(*SETS, *DEMO_SETS), default=list(SETS), help="sets to take")
    parser.add_argument("--preset", default="", help="preset to run, instead of what suggest writes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds (0 1)")
    parser.add_argument("--byol-only", action="store_true", help="leave out the baselines, which hardly depend on the recipe")
    parser.add_argument("--supervised", action="store_true", help="also train the encoder with labels, for as many steps")
    parser.add_argument("--whole-image", action="store_true", help="also evaluate on whole images instead of the crop of 7/8")
    parser.add_argument("--against", metavar="NAME", help="train nothing; print what the recipes of --out change against this one")
    parser.add_argument(
        "--keep", type=Path, metavar="FILE.json", help="train nothing; write all records of --out to a file and print the table"
    )
    parser.add_argument("--table", default="recipes", help="with --keep: records of the file that those of --out replace (%(default)s)")
    parser.add_argument("options", nargs="*", help="options of the run, after --")
    arguments = parser.parse_args(given)
    records = [json.loads(path.read_text()) for path in sorted(arguments.out.glob("*-*-*.json"))]
    if arguments.against:
        say(*differences(records, base=arguments.against))
        return
    if arguments.keep:
        kept = json.loads(arguments.keep.read_text()) if arguments.keep.exists() else []
        kept = [record for record in kept if record["table"] != arguments.table]
        kept += [{"table": arguments.table, **record} for record in records]
        arguments.keep.write_text("[\n" + ",\n".join(json.dumps(record) for record in kept) + "\n]\n")
        say(*table(records))
        return
    torch.set_num_threads(1)
    for seed in arguments.seeds:
        for data in write_sets(arguments.sets, tuple(arguments.only)):
            path = arguments.out / f"{data.name}-{arguments.name}-{seed}.json"
            if path.exists():
                continue
            options = [*arguments.options, "--seed", str(seed)]
            record = measure(
                data,
                path.with_suffix(""),
                options,
                preset=arguments.preset,
                baselines=not arguments.byol_only,
                supervised=arguments.supervised,
                whole=arguments.whole_image,
            )
            record = {"set": data.name, "recipe": arguments.name, "seed": seed, **record}
            path.write_text(json.dumps(record, indent=1) + "\n")
            say(f"{data.name} {arguments.name} {seed}: {record['scores']} {record['cpu_s']} s")


if __name__ == "__main__":
    main()
