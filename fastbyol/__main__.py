"""The command line: `python -m fastbyol evaluate | report | presets`. Training is `fastbyol/train.py`.

python -m fastbyol evaluate linear --checkpoint runs/demo --data demo
python -m fastbyol evaluate all --checkpoint runs/demo --data demo
python -m fastbyol report --run runs/demo --data demo
python -m fastbyol presets
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from fastbyol import __version__
from fastbyol.config.errors import UserError, one_line_errors, require_at_least

if TYPE_CHECKING:
    from fastbyol.checkpoint import RunState
    from fastbyol.evaluation.subjects import FeatureBank

DATA_HELP = "folder that holds train and val: image folders, tar shards, or train.beton and val.beton"


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors, so that they end in one line as all others do."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; --help lists what there is")


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    if arguments is None and hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `fastbyol presets | head` ends quietly
    parser = _build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return
    typed = sys.argv[1:] if arguments is None else arguments
    options.typed = shlex.join(["python", "-m", "fastbyol", *typed])
    options.command(options)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastbyol", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.set_defaults(command=None)
    parser.add_argument("--version", action="version", version=f"fastbyol {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="")

    evaluate = commands.add_parser(
        "evaluate", help="linear or kNN accuracy of a run, against two baselines", description=evaluate_run.__doc__
    )
    evaluate.add_argument("protocol", choices=("linear", "knn", "all"))
    evaluate.add_argument("--checkpoint", required=True, help="run folder (its newest checkpoint) or one checkpoint file")
    evaluate.add_argument("--k", type=int, help="neighbours that vote in kNN (20)")
    evaluate.add_argument("--temperature", type=float, help="of kNN's votes (0.07)")
    evaluate.set_defaults(command=evaluate_run)

    report = commands.add_parser("report", help="RUN/report.html and a summary", description=report_run.__doc__, allow_abbrev=False)
    report.add_argument("--run", required=True, dest="checkpoint", help="run folder")
    report.set_defaults(command=report_run)

    for command in (evaluate, report):
        command.add_argument("--data", required=True, help=DATA_HELP)
        command.add_argument("--batch", type=int, default=256, help="images per forward (%(default)s)")
        command.add_argument("--workers", type=int, default=0, help="threads that decode; 0: all cores")
        command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")

    presets = commands.add_parser("presets", help="the named runs, with their commands and expected figures")
    presets.set_defaults(command=lambda _: print_presets())
    return parser


def evaluate_run(options: argparse.Namespace) -> None:
    """Top-1 and top-5 on val: the trained encoder, the same one untrained, PCA of the raw pixels. A table, and RUN/evaluation/*.json."""
    from rich.console import Console

    from fastbyol.evaluation.protocols import EVALUATION_FOLDER, PROTOCOLS
    from fastbyol.evaluation.summary import score_table

    knn_options = {name: getattr(options, name) for name in ("k", "temperature") if getattr(options, name) is not None}
    if options.protocol == "linear" and knn_options:
        raise UserError(f"--{next(iter(knn_options))}: has no effect on the linear protocol; leave it out, or evaluate knn")
    results = []
    with _opened(options) as (run, bank):
        for protocol in PROTOCOLS if options.protocol == "all" else (options.protocol,):
            result = PROTOCOLS[protocol](bank, **(knn_options if protocol == "knn" else {}))
            path = result.write(run.folder / EVALUATION_FOLDER, step=run.step, data=options.data, command=options.typed)
            print(f"wrote {path}", file=sys.stderr)
            results.append(result)
    Console().print(score_table(results))


def report_run(options: argparse.Namespace) -> None:
    """Writes RUN/report.html, one self-contained page, and prints its headline. Evaluates what RUN/evaluation does not hold yet."""
    from rich.console import Console

    from fastbyol.evaluation.report import build_report
    from fastbyol.evaluation.summary import headline_table, score_table

    with _opened(options) as (run, bank):
        report = build_report(run, bank, data=options.data, command=options.typed)
        path = report.write()
    console = Console()
    console.print(score_table(report.results))
    console.print(headline_table(report.headline()))
    print(f"report: {path}")


def print_presets() -> None:
    """Each preset with what it is, the published figure and its source, what was measured here, and its command."""
    from fastbyol.config.presets import PRESETS

    for name, preset in PRESETS.items():
        print(f"{name}\n    what      {preset.what}\n    expected  {preset.expected} ({preset.source})")
        print(f"    here      {preset.run_here}\n    command   {preset.command(name)}\n")


@contextmanager
def _opened(options: argparse.Namespace) -> Iterator[tuple[RunState, FeatureBank]]:
    """The run's newest state, and the features of its encoder and of the baselines, not yet extracted."""
    require_at_least("--batch", options.batch, 1)
    require_at_least("--workers", options.workers, 0)
    from fastbyol.checkpoint import load_run
    from fastbyol.evaluation.splits import open_splits
    from fastbyol.evaluation.subjects import FeatureBank
    from fastbyol.export import load_encoder

    device = _device(options.device)
    run = load_run(options.checkpoint)
    with open_splits(options.data, views=run.config.views, batch=options.batch, workers=options.workers) as splits:
        yield run, FeatureBank(load_encoder(options.checkpoint), config=run.config, splits=splits, device=device, announce=_announce)


def _device(name: str) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible to PyTorch; leave it out to run on the CPU")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _announce(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
