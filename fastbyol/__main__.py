"""The command line: `fastbyol COMMAND`, or `python -m fastbyol COMMAND` where the script is not on the path. COMMAND --help shows more.

Dashes and underscores in the name of an option mean the same: --dry-run, --dry_run.

python -m fastbyol doctor
python -m fastbyol demo-data --out demo
python -m fastbyol convert --data photos --out photos.beton
python -m fastbyol verify photos.beton
python -m fastbyol suggest --data photos --out suggested.yaml
python -m fastbyol train --config suggested.yaml --out runs/mine
torchrun --nproc-per-node 8 -m fastbyol train --preset r50_300ep --data.train train.beton --out runs/r50
python -m fastbyol evaluate linear --checkpoint runs/demo --data demo
python -m fastbyol evaluate all --checkpoint runs/demo --data demo
python -m fastbyol evaluate labelfree --checkpoint runs/demo --data photos
python -m fastbyol report --run runs/demo --data demo
python -m fastbyol compare runs/*/ --out compare.html
python -m fastbyol reproduce batch tau --data demo --out tables
python -m fastbyol embed --checkpoint runs/demo --data photos --out features.parquet
python -m fastbyol neighbours --features features.parquet --query photos/a.jpg --out neighbours.png
python -m fastbyol export --checkpoint runs/demo --to onnx --out encoder.onnx
python -m fastbyol weights resnet50.pth
python -m fastbyol views --data demo/train.beton --preset cpu_demo --out views.png
python -m fastbyol tune --data demo/train.beton --preset cpu_demo --out tuned.yaml
python -m fastbyol presets
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from fastbyol import __version__
from fastbyol.commands.compare import add_compare
from fastbyol.commands.convert import add_convert
from fastbyol.commands.demo_data import add_demo_data
from fastbyol.commands.doctor import add_doctor
from fastbyol.commands.embed import add_embed, embed_images
from fastbyol.commands.evaluate import add_data_options, add_evaluate, announce, opened_bank
from fastbyol.commands.export import add_export, export_encoder
from fastbyol.commands.info import add_info
from fastbyol.commands.neighbours import add_neighbours
from fastbyol.commands.reproduce import add_reproduce, reproduce
from fastbyol.commands.subset import add_subset
from fastbyol.commands.train import add_train, train_run
from fastbyol.commands.verify import add_verify
from fastbyol.commands.weights import add_weights, list_weights
from fastbyol.config.arguments import OneLineParser, as_spelled, local_or_url, path_text
from fastbyol.config.console import say
from fastbyol.config.errors import UserError, one_line_errors, public_arguments, require_between
from fastbyol.config.schema import BACKENDS, RUN_OPTIONS


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    if arguments is None and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `fastbyol presets | head` ends quietly
    parser = _build_parser()
    typed = sys.argv[1:] if arguments is None else public_arguments(arguments)
    options, options.run_options = parser.parse_known_args(as_spelled(typed, RUN_OPTIONS))
    used = parser.parser_of(typed)
    if options.command not in WITH_RUN_OPTIONS:
        if options.run_options:
            used.refuse(options.run_options)
    elif options.command is not train_run:  # train has only the options of a run, and reports errors in them itself
        given = [argument.split("=", 1)[0] for argument in options.run_options if argument.startswith("--")]
        if unknown := [name for name in given if name not in RUN_OPTIONS]:
            used.refuse(unknown, others=RUN_OPTIONS)
    if options.command is None:
        parser.print_help()
        return
    options.typed = shlex.join(["python", "-m", "fastbyol", *typed])
    options.command(options)


def _build_parser() -> OneLineParser:
    parser = OneLineParser(prog="fastbyol", description=__doc__)
    parser.set_defaults(command=None)
    parser.add_argument("--version", action="version", version=f"fastbyol {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    for add in (add_doctor, add_demo_data, add_convert, add_verify, add_info, add_subset, add_train):
        add(commands)

    add_evaluate(commands)
    report = commands.add_parser(
        "report", help="write RUN/report.html and print a summary", description=report_run.__doc__, allow_abbrev=False
    )
    report.add_argument("--run", required=True, type=path_text, dest="checkpoint", help="run folder")
    report.set_defaults(command=report_run)

    add_data_options(report)

    for add in (add_compare, add_reproduce, add_embed, add_export, add_neighbours, add_weights):
        add(commands)

    views = commands.add_parser("views", help="draw a picture of the views that a run would be trained on", description=draw_views.__doc__)
    what = "a .beton file, tar shards or an image folder; give several to compare them side by side"
    views.add_argument("--data", required=True, type=local_or_url, nargs="+", help=what)
    views.add_argument("--out", required=True, type=Path, help="PNG file to write")
    views.add_argument("--backend", choices=BACKENDS, default="auto", help="loader that reads --data (%(default)s)")
    views.add_argument("--rows", type=int, default=6, help="number of images (%(default)s)")
    views.add_argument("--epochs", type=int, default=2, help="pairs of views of each image (%(default)s)")
    views.set_defaults(command=draw_views)

    what = "find the fastest settings for this machine by measurement, and write them to a file"
    tune = commands.add_parser("tune", help=what, description=tune_run.__doc__)
    what = "a .beton file, tar shards or an image folder; repeat it for each format the images are stored in"
    tune.add_argument("--data", required=True, type=local_or_url, action="append", help=what)
    tune.add_argument("--out", type=Path, default=Path("tuned.yaml"), help="YAML file to write (%(default)s)")
    tune.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    tune.add_argument("--seconds", type=float, default=10.0, help="seconds per comparison (%(default)g)")
    tune.add_argument("--ranks", type=int, help="processes of the planned run (default: one per GPU of this machine, or one on a CPU)")
    tune.set_defaults(command=tune_run)

    suggest = commands.add_parser(
        "suggest",
        help="write a file of settings for your own images and this machine, each with its reason",
        description=suggest_run.__doc__,
    )
    suggest.add_argument(
        "--data", required=True, type=local_or_url, help="the images: a folder, tars, a list, a .beton file (docs/data.md)"
    )
    suggest.add_argument("--devices", type=int, help="GPUs of the planned run; 0: a CPU (default: the GPUs of this machine)")
    suggest.add_argument(
        "--hours", type=float, help="length of the run in hours; steps are timed on this machine (default: the preset's number of steps)"
    )
    suggest.add_argument("--out", type=Path, default=Path("suggested.yaml"), help="YAML file to write (%(default)s)")
    suggest.add_argument("--overwrite", action="store_true", help="replace the output file if it exists")
    suggest.set_defaults(command=suggest_run)

    presets = commands.add_parser("presets", help="list the named runs, with their commands and expected figures")
    presets.add_argument("word", nargs="?", default="", help="list only presets whose name contains this, for example ablation_tau")
    presets.set_defaults(command=lambda options: print_presets(options.word))
    return parser


def report_run(options: argparse.Namespace) -> None:
    """Writes RUN/report.html, one self-contained page, and prints its headline figures and a verdict in words.

    Runs the evaluations that RUN/evaluation lacks. If the images have no labels, the page has every part that does not need them.
    """
    from rich.console import Console

    from fastbyol.evaluation.evaluate import result_tables
    from fastbyol.evaluation.report import Report, build_report
    from fastbyol.evaluation.summary import headline_table
    from fastbyol.run.next_command import embed

    with opened_bank(options, foreign=False) as (run, bank):

        def written() -> tuple[Report, Path]:
            report = build_report(run, bank, data=options.data, command=options.typed, out=options.out)
            return report, report.write()

        report, path = bank.past_damage(written)
    console = Console()
    for table in result_tables(report.results, title=run.title):
        console.print(table)
    console.print(headline_table(report.headline()))
    say(*report.verdict.lines(), f"report: {path}", f"next: {embed(options.checkpoint, report.bank.splits.train.source)}")


def draw_views(options: argparse.Namespace) -> None:
    """Draws a contact sheet: random images of the data, their views in the first epochs of a run, and the parameters drawn for each view.

    The augmentation is chosen as for a run: --preset, --config, --seed and --views.…, for example --views.size_px 96.
    """
    from fastbyol.evaluation.contact_sheet import write_contact_sheet
    from fastbyol.run.command_line import parse_train_config

    for name in (argument.split("=")[0] for argument in options.run_options if argument.startswith("--")):
        if name not in ("--preset", "--config", "--seed") and not name.startswith("--views."):
            raise UserError(f"{name}: has no effect on views; the options of a run that do are --preset, --config, --seed and --views.…")
    config = parse_train_config(options.run_options, usage="")
    shown = {name: getattr(options, name) for name in ("out", "backend", "rows", "epochs")}
    write_contact_sheet(options.data, views=config.views, seed=config.seed, **shown)
    say(f"views: {options.out}")


def tune_run(options: argparse.Namespace) -> None:
    """Measures loaders, steps and both together on this machine, and writes the config of a run with the fastest settings.

    Describe the run as for training: --preset, --config, and any training option. Options given on the command line are kept, not tuned.
    On a CPU the step is timed with a batch small enough to be quick; on a GPU the largest rank_batch that fits is searched for (not
    yet run by us on a GPU).
    torch.compile is tried with --seconds 30 or more, its mode max-autotune with 120 or more: compiling takes minutes on top.
    Other ranks are not started, so communication between ranks is not measured.
    Then: python -m fastbyol train --config tuned.yaml --out runs/NAME
    """
    from rich.console import Console

    from fastbyol.host.signals import INTERRUPTED_EXIT
    from fastbyol.run.command_line import names_given, parse_train_config
    from fastbyol.tuning.report import check_output, comparison_table, config_yaml, write_config

    if any(argument.split("=")[0] == "--data.train" for argument in options.run_options):
        raise UserError("--data.train: use --data instead, once for each format the images are stored in")
    check_output(options.out, overwrite=options.overwrite)
    config = parse_train_config([*options.run_options, f"--data.train={options.data[0]}"], usage="")
    kept = frozenset(names_given(options.run_options))
    from fastbyol.tuning.bench import Request  # imports torch (seconds), so only after the cheap checks
    from fastbyol.tuning.procedure import tune

    try:
        found = tune(Request(config, options.data, ranks=options.ranks, seconds=options.seconds, kept=kept), announce=announce)
    except KeyboardInterrupt:
        say("fastbyol: interrupted; nothing was written", file=sys.stderr)
        sys.exit(INTERRUPTED_EXIT)
    write_config(options.out, config_yaml(found.config, found.notes, head=[options.typed, *found.lines]))
    Console().print(comparison_table(found.comparisons, per=found.per))
    say(*found.lines, f"tuned: {options.out}", f"next: {found.command(options.out)}")


def suggest_run(options: argparse.Namespace) -> None:
    """Looks at a sample of the images and at this machine, and writes the settings of a first run, each with its reason.

    Labels are not needed, and not used. Then: python -m fastbyol train --config suggested.yaml --out runs/mine
    """
    from fastbyol.tuning.report import check_output, write_config

    check_output(options.out, overwrite=options.overwrite)
    if options.devices is not None:
        require_between("--devices", options.devices, 0, 2**16)
    if options.hours is not None:
        require_between("--hours", options.hours, 0.001, 10_000.0)
    from fastbyol.data.inspection.sample import look_at
    from fastbyol.tuning.suggestion import fit_hours, suggest

    announce("looking at a sample of the images")
    sample = look_at(options.data)
    import torch

    here = torch.cuda.device_count()
    gpus = here if options.devices is None else options.devices
    found = suggest(options.data, sample, gpus=gpus)
    if options.hours is not None:
        if gpus and not here:
            raise UserError(
                "--hours: steps of a GPU cannot be timed on this machine, which has none; leave it out, or give --devices 0 for a run on this CPU"
            )
        fit_hours(found, options.hours, gpus=gpus, announce=announce)
    config = found.config()
    write_config(options.out, found.yaml(head=[options.typed]))
    say(found.reasons["data.train"], f"preset {found.preset}: {found.reasons['preset']}", *found.remarks)
    say(f"views.view1.flip_p, views.view2.flip_p = {config.views.view1.flip_p:g}: {found.reasons['views.view1.flip_p']}")
    say(f"suggested: {options.out}, with a reason for each setting", f"next: {found.command(options.out)}")


def print_presets(word: str = "") -> None:
    """Prints each preset whose name contains the word: description, published figure, source, our own result, command."""
    from fastbyol.config.plain import nearest_name
    from fastbyol.config.presets import PRESETS

    chosen = {name: preset for name, preset in PRESETS.items() if word in name}
    if not chosen:
        raise UserError(f"presets {word}: no preset's name contains this{nearest_name(word, PRESETS)}")
    for name, preset in chosen.items():
        say(name, f"    what      {preset.what}", f"    expected  {preset.expected} ({preset.source})")
        say(f"    here      {preset.run_here}", *([f"    change    {preset.first}"] if preset.first else []))
        say(f"    command   {preset.command(name)}", "")


WITH_RUN_OPTIONS = (train_run, draw_views, tune_run, reproduce, embed_images, export_encoder, list_weights)
"""Commands that also take the options of a run, which parse_train_config checks."""

if __name__ == "__main__":
    main()
