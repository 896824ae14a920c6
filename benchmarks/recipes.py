"""Tries a recipe on the sets of `small_sets`: BYOL against the untrained encoder, PCA of the pixels, and the same encoder trained with labels.

    python -m benchmarks.recipes --sets /tmp/small_sets --out /tmp/recipes --name own_tiny --seeds 2
    python -m benchmarks.recipes --sets /tmp/small_sets --out /tmp/recipes --name no_rotation --only icons -- --views.view1.rotation_deg 0

Each run is `fastbyol/train.py` in a process of its own, with one thread, as a user types it; what follows `--` are its options. Figures are
top-1 on val of logistic regression and of 20 nearest neighbours on frozen features (`fastbyol evaluate`'s protocols). One JSON file a run, and
OUT/table.md of all that are there.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.small_sets import SETS, write_sets
from fastbyol.config.arguments import OneLineParser
from fastbyol.config.console import say
from fastbyol.config.errors import one_line_errors
from fastbyol.config.schema import TrainConfig
from fastbyol.data import build_loader
from fastbyol.evaluation.protocols import evaluate_knn, evaluate_linear
from fastbyol.evaluation.splits import Splits, open_splits
from fastbyol.evaluation.subjects import FeatureBank
from fastbyol.export import encoder_of
from fastbyol.models import encoder_from
from fastbyol.run.checkpoint import load_run

ROOT = Path(__file__).resolve().parents[1]
PEAK_LR = 0.1
"""Peak learning rate of the training with labels, per 256 images: He et al. (2016), with 64 images a step a quarter."""


def train(data: Path, run: Path, options: list[str]) -> float:
    """Trains a run and returns its CPU seconds, of the loader's threads and the start too."""
    command = [sys.executable, str(ROOT / "fastbyol" / "train.py"), "--data.train", str(data / "train"), "--out", str(run), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run.parent.mkdir(parents=True, exist_ok=True)
    with (run.parent / f"{run.name}.log").open("w") as log:
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=subprocess.STDOUT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def supervised_encoder(config: TrainConfig, splits: Splits, *, steps: int) -> nn.Module:
    """Returns the run's encoder trained with labels on the run's views: cross-entropy, SGD with Nesterov momentum 0.9, cosine from 0.1 a 256."""
    torch.manual_seed(config.seed)
    num_classes = len(splits.class_names)
    encoder = encoder_from(config.model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    head = nn.Linear(encoder.feature_dim, num_classes)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=PEAK_LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loader = build_loader(config.data, views=config.views, global_batch=config.global_batch, seed=config.seed)
    with loader:
        batches = loader.endless()
        for _ in range(steps):
            batch = next(batches)
            images, label = torch.cat([batch.view1, batch.view2]), torch.cat([batch.label, batch.label])
            loss = F.cross_entropy(head(encoder(images)), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return encoder.eval()


def scores_of(bank: FeatureBank, subjects: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """Returns {subject: {'linear': top-1, 'knn': top-1}} in percent."""
    results = {"linear": evaluate_linear(bank, subjects=subjects), "knn": evaluate_knn(bank, subjects=subjects)}
    return {subject: {name: round(100 * result.scores[subject].top1, 1) for name, result in results.items()} for subject in subjects}


def measure(data: Path, run: Path, options: list[str], *, labels: bool, supervised: bool) -> dict[str, Any]:
    """Trains and evaluates one run and returns its record."""
    cpu_s = train(data, run, options)
    state = load_run(str(run))
    with open_splits(data, views=state.config.views, batch=256) as splits:
        bank = FeatureBank(encoder_of(state), config=state.config, splits=splits)
        scores = scores_of(bank, ("byol", "untrained", "pca") if labels else ("byol",))
        if supervised:
            trained = supervised_encoder(state.config, splits, steps=state.step)
            scores["supervised"] = scores_of(FeatureBank(trained, config=state.config, splits=splits), ("byol",))["byol"]
        num_val = splits.val.num_samples
    return {"scores": scores, "val": num_val, "steps": state.step, "cpu_s": round(cpu_s), "options": options}


@one_line_errors
def main() -> None:
    parser = OneLineParser(prog="benchmarks.recipes", description=__doc__)
    parser.add_argument("--sets", type=Path, required=True, help="folder of the sets; what is missing is made")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs and records")
    parser.add_argument("--name", default="own_tiny", help="name of what is tried, in the table (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=tuple(SETS), default=list(SETS), help="sets to take")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds (%(default)s)")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--byol-only", action="store_true", help="leave out the baselines, which do not depend on the recipe's views")
    parser.add_argument("--supervised", action="store_true")
    parser.add_argument("options", nargs="*", help="options of the run, after --")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    options = arguments.options
    if not any(option.startswith(("--preset", "--config")) for option in options):
        options = ["--preset", "own_tiny", *options]
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for data in write_sets(arguments.sets, tuple(arguments.only)):
            path = arguments.out / f"{data.name}-{arguments.name}-{seed}.json"
            if path.exists():
                continue
            record = measure(
                data, path.with_suffix(""), [*options, "--seed", str(seed)], labels=not arguments.byol_only, supervised=arguments.supervised
            )
            record = {"set": data.name, "recipe": arguments.name, "seed": seed, **record}
            path.write_text(json.dumps(record, indent=1) + "\n")
            say(f"{data.name} {arguments.name} {seed}: {record['scores']} {record['cpu_s']} s")


if __name__ == "__main__":
    main()
