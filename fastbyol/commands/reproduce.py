"""python -m fastbyol reproduce: the paper's tables, row by row, and our figures beside the paper's."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbyol.config.arguments import path_text
from fastbyol.config.console import say
from fastbyol.config.errors import UserError, require_between, shortened

if TYPE_CHECKING:
    from fastbyol.config.schema import TrainConfig
    from fastbyol.reproduction.records import Setup
    from fastbyol.reproduction.runner import PlannedRun

PRESETS = {"demo": "cpu_demo", "paper": "r50_300ep"}
DEMO_EPOCHS = 5.0
DEMO_CHECKPOINT_EVERY = 250
GRACE_S = 300.0
"""Longest time to wait for a run to save itself, or for an evaluation to end, after a signal."""
PAPER_GROUPS = ("model.", "objective.", "optim.", "views.")
"""Prefixes of the options that rows vary at the paper's scale."""
ABSOLUTE = (
    *("model.projector_layers", "model.predictor_layers", "objective.predictor", "objective.target", "objective.beta"),
    *("objective.alpha", "objective.normalization", "optim.projector_lr_factor", "optim.predictor_lr_factor"),
)
"""Options that rows at demo scale set to the paper's own values, so a recipe has the paper's base."""
CPU_BATCH = 16
"""Images in a timed step on a CPU; a larger batch takes as long for each image."""


def add_reproduce(commands: Any) -> None:
    """Adds the command to the parser's sub-commands."""
    parser = commands.add_parser(
        "reproduce",
        help="reproduce tables of the paper: run and evaluate their rows, and set our figures beside the paper's",
        description=reproduce.__doc__,
        allow_abbrev=False,
    )
    from fastbyol.reproduction.tables import TABLES

    names = "; ".join(f"{table.name}: {table.source}" for table in TABLES.values())
    parser.add_argument("tables", nargs="+", metavar="TABLE", help=f"tables to make, or all. {names}")
    parser.add_argument("--data", required=True, type=path_text, help="folder that holds labelled train and val images")
    parser.add_argument("--out", required=True, type=Path, help="folder for runs, records and tables")
    what = "demo: the table's changes made to a small recipe, minutes per row on a CPU; paper: the paper's own runs, days per row on eight GPUs"
    parser.add_argument("--scale", choices=tuple(PRESETS), default="demo", help=f"{what} (%(default)s)")
    what = "rows to run: their names; or i/n, part i (0 to n - 1) of n, the share of one of n machines; or auto, in tasks of SLURM"
    parser.add_argument("--rows", nargs="+", default=[], metavar="ROW", help=what)
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds of each row (%(default)s)")
    parser.add_argument("--ranks", type=int, help="processes of each run (default: one per GPU of this machine, or one on a CPU)")
    parser.add_argument(
        "--linear",
        choices=("quick", "paper"),
        help="settings of the linear evaluation (default: quick at demo scale, paper at the paper's scale)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="only list the rows and the time that they will take, estimated from a step measured here"
    )
    parser.set_defaults(command=reproduce)


def reproduce(options: argparse.Namespace) -> None:
    """Trains every row of the tables in a run folder of its own, evaluates it, and writes OUT/tables.html and OUT/tables.md after each.

    The same command continues where it was stopped and repeats no finished row; a row that fails or collapses is named, and the
    next one is run. Several commands may share one OUT. At demo scale the rows change the preset cpu_demo with 5 epochs, or the run that
    --preset, --config and other training options describe, as for training.
    """
    from fastbyol.host.signals import StopRequest, leave_at_once_on_signals

    if not options.dry_run:
        leave_at_once_on_signals()  # the imports below take seconds

    from fastbyol.reproduction.tables import TABLES, table_named

    require_between("--seeds", options.seeds, 1, 100)
    tables = list(TABLES.values()) if "all" in options.tables else [table_named(name) for name in dict.fromkeys(options.tables)]
    base = _base(options.run_options, scale=options.scale)

    from fastbyol.reproduction.page import write_tables
    from fastbyol.reproduction.runner import Runner, part_of, planned_runs

    setup = _setup(options, base)
    planned = planned_runs(tables, setup, options.out, seeds=options.seeds)
    runs = part_of(planned, options.rows)
    if options.dry_run:
        _list(runs, setup)
        return
    _open_folder(options.out, setup)
    with StopRequest(grace_s=GRACE_S) as stop:
        runner = Runner(
            setup,
            options.out,
            stop,
            announce=lambda line: say(line, file=sys.stderr),
            after_each=lambda: write_tables(options.out),
            command=options.typed,
        )
        records = runner.run_all(runs)
    write_tables(options.out)
    counts = Counter(record.status for record in records)
    done = sum(run.done for run in runs)
    others = len(runs) - done - len(records)
    said = "".join(f", {count} {status}" for status, count in counts.items()) + (f", {others} left to other processes" if others else "")
    say(f"{len(runs)} runs: {done} were done before{said}")
    say(f"tables: {options.out / 'tables.html'} and tables.md")
    if failed := [record for record in records if record.status == "failed"]:
        reasons = "; ".join(f"{record.run} seed {record.seed}: {shortened(record.why, limit=400)}" for record in failed[:3])
        raise UserError(f"{len(failed)} of {len(runs)} runs failed ({reasons}); the same command tries them again")


def _base(run_options: Sequence[str], *, scale: str) -> TrainConfig:
    """Returns the config of the run without any change. Raises UserError for an option that rows set themselves."""
    from fastbyol.config.schema import TrainConfig
    from fastbyol.run.command_line import names_given, parse_train_config

    typed = names_given(run_options)
    own = {
        "data.train": "--data",
        "data.val": "--data",
        "out": "--out",
        "seed": "--seeds",
        "rank_batch": "--ranks",
        "init_from": "",
        "resume": "",
    }
    for name in sorted(typed & set(own)):
        raise UserError(f"--{name}: is set for each row{f'; use {own[name]}' if own[name] else ''}")
    described = bool(typed & {"preset", "config"})
    if described and scale == "paper":
        raise UserError(
            "--preset, --config: have no effect at the paper's scale, whose rows are presets; leave them out, or use --scale demo"
        )
    options = [*([] if described else ["--preset", PRESETS[scale]]), *run_options]
    if scale == "demo" and not described and not typed & {"epochs", "steps"}:
        options += ["--epochs", str(DEMO_EPOCHS)]
    config = parse_train_config(options, usage="")
    # A --config file may be a run's own: what each row sets for itself is not taken from it.
    config = replace(config, out="", seed=0, resume=TrainConfig.resume, rank_batch=0)
    if config.init_from:
        raise UserError(f"--config: init_from = {config.init_from!r}: rows begin with random weights; delete this line from the file")
    _check_is_not_varied(typed, config, scale=scale)
    if scale == "demo":
        # Rows that collapse are trained to the end, so that all rows are equally long: some tables are about collapse.
        config = replace(config, monitors=replace(config.monitors, stop_on_collapse=False))
        config = replace(config, checkpoint_every=min(config.checkpoint_every, DEMO_CHECKPOINT_EVERY))
    return config


def _check_is_not_varied(typed: set[str], config: TrainConfig, *, scale: str) -> None:
    """Raises UserError if the user set an option that rows vary: a row's name would then state a value that the row does not have."""
    from fastbyol.config.ablations import BASE
    from fastbyol.config.plain import flatten, to_plain
    from fastbyol.run.folder import FREE_TO_CHANGE

    if scale == "paper":
        for name in sorted(typed - FREE_TO_CHANGE):
            if name == "global_batch" or name.startswith(PAPER_GROUPS):
                raise UserError(f"--{name}: rows at the paper's scale have the paper's values; leave it out, or use --scale demo")
        return
    own, papers = flatten(to_plain(config)), flatten(to_plain(BASE))
    for name in ABSOLUTE:
        if own[name] != papers[name]:
            raise UserError(
                f"{name} = {own[name]}: must be {papers[name]}, because the rows of the tables are named after their values of this option"
            )


def _setup(options: argparse.Namespace, base: TrainConfig) -> Setup:
    """Returns the set-up of this command. Raises UserError if the images have no labelled val, or the folder belongs to another set-up."""
    import torch

    from fastbyol.evaluation.splits import open_splits
    from fastbyol.reproduction.records import Setup, check_same_images, read_setup, setup_changes

    ranks = options.ranks or max(1, torch.cuda.device_count())
    require_between("--ranks", ranks, 1, 2**16)
    if base.global_batch % ranks:
        raise UserError(f"--ranks {ranks}: does not divide the batch of {base.global_batch} images; choose a number that does")
    setup = Setup(options.scale, options.linear or ("paper" if options.scale == "paper" else "quick"), ranks, options.data, base)
    before = read_setup(options.out)
    if before is not None and (changed := setup_changes(before, setup)):
        raise UserError(f"--out {options.out}: holds tables of another set-up ({'; '.join(changed[:5])}); choose a new folder")
    with open_splits(options.data, views=base.views, batch=1) as splits:
        if splits.unscored:
            raise UserError(f"--data {options.data}: {splits.unscored}, so there is no accuracy for a table")
        assert splits.val is not None
        setup = replace(setup, images={"train": splits.train.fingerprint(), "val": splits.val.fingerprint()})
        check_same_images(options.out, before, setup, num_train=splits.train.num_samples, num_val=splits.val.num_samples)
    return setup


def _open_folder(folder: Path, setup: Setup) -> None:
    from fastbyol.reproduction.records import SETUP_FILE, write_setup

    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / SETUP_FILE).exists())):
        raise UserError(f"--out {folder}: exists and does not hold tables; choose a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_setup(folder, setup)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written ({error.strerror}); choose another folder") from error


def _list(runs: Sequence[PlannedRun], setup: Setup) -> None:
    """Prints the runs, their steps, and the hours that the unfinished ones will take.

    Without a GPU it prints no hours for the paper's scale: a single step of its largest encoder would take many minutes.
    """
    import torch

    from fastbyol.data import build_image_loader
    from fastbyol.host.quantities import count_text, duration_text
    from fastbyol.run.plan import RunPlan
    from fastbyol.tuning.comparison import TrialFailed
    from fastbyol.tuning.suggestion import images_per_s

    if not runs:
        say("no runs")
        return
    with build_image_loader(runs[0].config.data.train, views=setup.base.views, batch=1, option="--data") as loader:
        num_samples = loader.num_samples
    device = "cuda" if torch.cuda.is_available() else "cpu"
    share = setup.base.global_batch // setup.ranks if device == "cuda" else CPU_BATCH
    is_timed = device == "cuda" or setup.scale == "demo"
    if is_timed:
        say(f"timing steps of {share} images")
    total_s, rates = 0.0, dict[tuple[str, int], float]()
    for run in runs:
        model = (run.config.model.encoder, run.config.model.width)
        if is_timed and model not in rates:
            try:
                rates[model] = setup.ranks * images_per_s(replace(run.config, global_batch=share, rank_batch=0), device=device)
            except TrialFailed as error:
                rates[model] = 0.0
                say(f"{run.name}: a step of {share} images cannot be timed ({error}), so its time is not in the sum")
        steps = RunPlan.of(run.config, num_samples=num_samples).total_steps
        seconds = steps * run.config.global_batch / rates[model] if rates.get(model) else 0.0
        total_s += 0.0 if run.done else seconds
        takes = "done" if run.done else duration_text(seconds) if seconds else "not known" if is_timed else ""
        say(f"{run.name:<50} {steps:>9,} steps  {takes}".rstrip())
    to_do = sum(not run.done for run in runs)
    if not is_timed:
        say(
            f"{count_text(to_do, 'run')} to do; how long they take can only be measured on a machine with a GPU: give the same command there"
        )
        return
    say(
        f"{count_text(to_do, 'run')} to do, {duration_text(total_s)} of training with {setup.ranks} process{'es' * (setup.ranks > 1)}; "
        "estimated from a step of one process, timed in the first row of each encoder, without communication between processes; evaluation comes on top"
    )
