"""python -m fastbyol evaluate: the quick protocols on frozen features, and the tasks of the paper."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbyol.commands.shared_options import CHECKPOINT_HELP, add_device_option, changes_from, device_named
from fastbyol.config.arguments import OneLineParser, local_or_url, path_text
from fastbyol.config.console import printable, say
from fastbyol.config.errors import UserError, is_out_of_memory, require, require_at_least
from fastbyol.config.plain import nearest_name
from fastbyol.config.schema import WEIGHTS_OPTIONS
from fastbyol.config.urls import is_url

if TYPE_CHECKING:
    from fastbyol.evaluation.subjects import FeatureBank
    from fastbyol.run.checkpoint import RunState

DATA_HELP = "folder that holds train and val: image folders, tar shards, or train.beton and val.beton; without labels, any images"
PATIENCE_S = 6 * 3600.0
"""Longest time a rank waits for another: rank 0 tests and writes while the others wait. If a rank dies, torchrun ends the others."""
GRACE_S = 60.0
ONE_VALUE = "Expected more than 1 value per channel"
"""Beginning of the ValueError that torch's batch norm raises in training mode if each channel has a single value."""
WHAT = {
    "linear": "a linear classifier on frozen features (--settings paper: SGD, rates swept side by side)",
    "knn": "k-nearest neighbours on frozen features (--settings paper: a grid of k, temperature and votes)",
    "finetune": "the whole network fine-tuned with all labels",
    "semi": "the whole network fine-tuned with 1 % and 10 % of the labels",
    "transfer linear": "logistic regression on frozen features of the paper's other data sets, or your own",
    "transfer finetune": "the whole network fine-tuned on the paper's other data sets, or your own",
    "labelfree": "quality of the features of images that have no labels",
    "all": "linear, knn and labelfree, as far as the images allow",
    "segmentation": "the encoder with the paper's head, fine-tuned on images and masks in VOC's layout; mean IoU",
    "detection": "Faster R-CNN on the encoder, trained on images and boxes in VOC's layout; average precision",
    "depth": "the encoder with fast up-projections, fine-tuned on images with depth as of NYU v2; thresholds and errors",
}
"""Describes each task in a line, for --help."""
TASK_OPTIONS = ("init", "seed", "dry_run", "again")
"""Options of tasks that the quick protocols do not have."""
LOCAL_TASKS = ("transfer", "segmentation", "detection", "depth")
"""First words of the tasks whose data sets have layouts of their own."""
QUICK = ("linear", "knn", "labelfree", "all")
"""Tasks with a quick protocol on features that are extracted once, compared with an untrained encoder and raw pixels."""


def add_evaluate(commands: Any) -> None:
    """Adds the command to the parser's sub-commands. Each task has options of its own: evaluate TASK --help lists them."""
    tasks = "\n".join(f"  {name:<20} {what}" for name, what in WHAT.items())
    parser = commands.add_parser(
        "evaluate",
        help="measure a run's accuracy in the paper's tasks, or its quality without labels, against baselines",
        description=f"{evaluate_run.__doc__}\n\ntasks (evaluate TASK --help lists the options of each):\n{tasks}",
    )
    parser.add_argument("task", choices=tuple(dict.fromkeys(name.partition(" ")[0] for name in WHAT)), metavar="TASK")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="options of the task")
    parser.set_defaults(command=evaluate_run)


def evaluate_run(options: argparse.Namespace) -> None:
    """Scores the trained encoder, the same encoder untrained, and raw pixels or the encoders of --compare, in one task.

    Prints tables and a verdict in words, and writes RUN/evaluation/TASK.json, one file per task, data set and settings. For a checkpoint file
    outside a run folder the results go beside it: best.pt gets best.evaluation/*.json.
    """
    typed = options.typed
    name, rest = _whole_name(options.task, options.rest)
    parser = _task_parser(name)
    options, rest = parser.parse_known_args(rest)
    for option in (argument.split("=")[0] for argument in rest if argument.startswith("-")):
        if option.removeprefix("--") not in WEIGHTS_OPTIONS:
            known = [each for each in (*parser._option_string_actions, *(f"--{each}" for each in WEIGHTS_OPTIONS)) if each.startswith("--")]
            nearest = nearest_name(option, known, prefix="--")
            raise UserError(
                f"{option}: is not an option of evaluate {name}{nearest} (python -m fastbyol evaluate {name} --help lists them)"
            )
    options.typed, options.run_options = typed, rest
    run = _run_task if getattr(options, "settings", "quick") == "paper" or name not in QUICK else _run_quick
    try:
        run(name, options)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"evaluate {name}: {_memory_advice(options)}") from error
    except ValueError as error:
        if not str(error).startswith(ONE_VALUE):
            raise
        raise UserError(
            f"evaluate {name}: batch norm has a single value of each channel on this rank (a map of {str(error).partition('size ')[2]}); use "
            "fewer ranks or a larger --global_batch"
        ) from error


def _memory_advice(options: argparse.Namespace) -> str:
    """Returns the error text for a GPU without enough memory; it names only options that the task has."""
    smaller = next((f"a smaller --{each}, " for each in ("global_batch", "batch_images") if hasattr(options, f"setting_{each}")), "")
    measured = "; --dry_run says how much a task needs" if hasattr(options, "dry_run") else ""
    return f"out of memory; use more ranks (torchrun), {smaller}or a smaller --batch for images without gradients{measured}"


def _whole_name(task: str, rest: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the task's name and its arguments: transfer has a second word, linear or finetune."""
    methods = [name.partition(" ")[2] for name in WHAT if name.startswith(f"{task} ")]
    if not methods:
        return task, list(rest)
    if not rest or rest[0] not in methods:
        raise UserError(f"evaluate {task}: say which, {' or '.join(f'evaluate {task} {method}' for method in methods)}")
    return f"{task} {rest[0]}", list(rest[1:])


def _task_parser(name: str) -> OneLineParser:
    from fastbyol.evaluation.tasks.registry import MODULES, task_named
    from fastbyol.evaluation.tasks.settings import add_settings

    parser = OneLineParser(prog=f"fastbyol evaluate {name}", description=WHAT[name])
    parser.add_argument("--checkpoint", required=True, type=path_text, help=CHECKPOINT_HELP)
    add_data_options(parser)
    if name in ("knn", "all"):
        parser.add_argument("--k", type=int, help="number of neighbours in kNN (20)")
        parser.add_argument("--temperature", type=float, help="temperature of the kNN votes (0.07)")
    if name in QUICK:
        parser.add_argument("--subset", type=path_text, metavar="LIST", help="use only the train images that this file names, one per line")
    other = "evaluate another run, checkpoint or weights file too, on the same images at its own size; may be repeated with --settings"
    # labelfree refuses it with a reason.
    help_text = argparse.SUPPRESS if name == "labelfree" else other
    parser.add_argument("--compare", action="append", default=[], metavar="[NAME=]PATH", help=help_text)
    if name in MODULES:
        task = task_named(name)
        add_settings(parser, task.versions)
        which = "byol, untrained, or [NAME=]PATH: encoder to evaluate instead of the trained and the untrained one; may be repeated"
        parser.add_argument("--init", action="append", default=[], help=which)
        parser.add_argument("--seed", type=int, default=0, help="seed of all random choices of the task (%(default)s)")
        parser.add_argument("--dry_run", action="store_true", help="only say how much there is to do, estimated from a step measured here")
        parser.add_argument("--again", action="store_true", help="compute the result again even if it exists already")
    return parser


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which images are evaluated, and how."""
    parser.add_argument("--data", required=True, type=local_or_url, help=DATA_HELP)
    parser.add_argument("--out", type=Path, help="folder to write to (default: the run folder)")
    parser.add_argument("--batch", type=int, default=256, help="images per forward pass (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="decoding threads; 0: one per core of the process's share")
    add_device_option(parser)


def _run_quick(protocol: str, options: argparse.Namespace) -> None:
    from rich.console import Console

    from fastbyol.evaluation.evaluate import evaluate, next_command, result_tables
    from fastbyol.evaluation.tasks.settings import PREFIX

    _refuse(
        options,
        [name for name in vars(options) if name.startswith(PREFIX)] + list(TASK_OPTIONS),
        f"the quick {protocol} protocol; add --settings paper",
    )
    if (ranks := int(os.environ.get("WORLD_SIZE") or "1")) > 1:
        raise UserError(
            f"WORLD_SIZE = {ranks}: the quick {protocol} protocol runs in one process; start it without torchrun, or add --settings paper"
        )
    if len(compared := getattr(options, "compare", [])) > 1:
        raise UserError(
            f"--compare {compared[1]}: the quick protocols compare with one encoder at a time; add --settings paper, or leave it out"
        )
    if compared and protocol == "labelfree":
        raise UserError("--compare: has no effect on labelfree, whose views are the run's own; leave it out, or evaluate linear or knn")
    knn_options = {name: value for name in ("k", "temperature") if (value := getattr(options, name, None)) is not None}
    if "k" in knn_options:
        require_at_least("k", knn_options["k"], 1)  # checked before the slow feature extraction
    with opened_bank(options, scored=protocol != "labelfree") as (run, bank):
        where = {"checkpoint": options.checkpoint, "data": options.data, "out": options.out or run.results, "command": options.typed}
        results, verdict = bank.past_damage(lambda: evaluate(run, bank, protocol, **where, knn_options=knn_options))
    for table in result_tables(results, title=run.title):
        Console().print(table)
    say(*verdict.lines(), f"next: {next_command(options.checkpoint, options.data)}")


def _refuse(options: argparse.Namespace, names: Sequence[str], on_what: str) -> None:
    """Raises UserError for the first of these options that was given."""
    for name in names:
        if getattr(options, name, None):
            raise UserError(f"--{name.removeprefix('setting_')}: has no effect on {on_what}, or leave it out")


def _run_task(name: str, options: argparse.Namespace) -> None:
    _refuse(options, ("k", "temperature", "subset"), f"--settings paper of {name}; use the quick protocol")
    if is_url(options.data) and name.partition(" ")[0] in LOCAL_TASKS:
        raise UserError(f"--data {options.data}: {name} reads its data sets' own folders on this machine; fetch them first")
    require_at_least("--batch", options.batch, 1)
    require_at_least("--workers", options.workers, 0)
    require(0 <= options.seed < 2**63, "--seed", options.seed, "in [0, 2^63)")
    changes = changes_from(options.run_options)
    import torch

    from fastbyol.evaluation.tasks.registry import TaskOptions, run_task, task_named
    from fastbyol.evaluation.tasks.settings import settings_from
    from fastbyol.host.signals import StopRequest, end_with_torchrun
    from fastbyol.ranks.process_group import Process, join_process_group, leave_process_group, lost_ranks_named

    task = task_named(name)
    if options.settings not in task.versions:
        raise UserError(f"--settings {options.settings}: {name} has {' and '.join(task.versions)} only")
    settings = settings_from(options, task.versions)
    device_named(options.device)  # refused before the ranks join
    end_with_torchrun()
    with StopRequest(grace_s=GRACE_S) as stop:
        process = join_process_group(timeout_s=PATIENCE_S)
        if options.device == "cpu":
            process = Process(process.rank, process.world_size, torch.device("cpu"))
        complete = False
        try:
            with lost_ranks_named(process):
                given = {
                    key: getattr(options, key)
                    for key in ("init", "checkpoint", "data", "compare", "out", "batch", "workers", "seed", "dry_run", "again")
                }
                run_task(
                    name,
                    task,
                    settings,
                    TaskOptions(**given, version=options.settings, changes=changes, command=options.typed),
                    process=process,
                    stop=stop,
                    announce=announce,
                )
            complete = True
        finally:
            leave_process_group(failed=not complete)


@contextmanager
def opened_bank(options: argparse.Namespace, *, scored: bool = True, foreign: bool = True) -> Iterator[tuple[RunState, FeatureBank]]:
    """Yields the run's newest checkpoint and the features, extracted on demand, of its encoder and of the baselines.

    foreign: the checkpoint may be another program's weights.
    """
    require_at_least("--batch", options.batch, 1)
    require_at_least("--workers", options.workers, 0)
    from fastbyol.evaluation.embedding import weights_digest
    from fastbyol.evaluation.evaluate import subset_settings
    from fastbyol.evaluation.label_free import RANK_IMAGES
    from fastbyol.evaluation.splits import open_splits
    from fastbyol.evaluation.subjects import FeatureBank, OtherEncoder
    from fastbyol.evaluation.tasks.job import named_path
    from fastbyol.export import encoder_of
    from fastbyol.run.checkpoint import load_run
    from fastbyol.run.foreign_weights import load_runs_or_weights

    device = device_named(options.device)
    changes = changes_from(options.run_options)
    subset, compared = getattr(options, "subset", None), getattr(options, "compare", [])
    name, path = named_path(compared[0]) if compared else ("", "")
    paths = [options.checkpoint, path] if path else [options.checkpoint]
    run, *rivals = load_runs_or_weights(paths, changes=changes) if foreign else [load_run(options.checkpoint, option="run")]
    settings = subset_settings(subset)
    opened_with = {"batch": options.batch, "workers": options.workers, "subset": subset, "at_most": RANK_IMAGES, "scored": scored}
    with ExitStack() as opened:
        splits = opened.enter_context(open_splits(options.data, views=run.config.views, **opened_with))
        other = None
        for rival in rivals:  # one at most
            encoder = encoder_of(rival, announce=announce)
            images = opened.enter_context(open_splits(options.data, views=rival.config.views, **opened_with))
            title = name or f"{'run' if rival.title == 'BYOL' else 'weights'} {printable(Path(path).name)}"
            other = OtherEncoder(f"{title}, baseline", encoder, images)
            settings |= {"baseline": path, "baseline_weights": weights_digest(encoder)}
        yield (
            run,
            FeatureBank(
                encoder_of(run, announce=announce),
                config=run.config,
                splits=splits,
                device=device,
                announce=announce,
                data_settings=settings,
                title=run.title,
                other=other,
            ),
        )


def announce(text: str) -> None:
    say(f"... {text}", file=sys.stderr)
