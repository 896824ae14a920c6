"""python -m fastbyol compare: any runs side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fastbyol.config.arguments import path_text
from fastbyol.config.console import say


def add_compare(commands: Any) -> None:
    """Adds the command to the parser's sub-commands."""
    parser = commands.add_parser("compare", help="compare runs side by side, in a table and on one page", description=compare_runs.__doc__)
    parser.add_argument("runs", nargs="+", type=path_text, metavar="RUN", help="run folder; the others are compared with the first")
    parser.add_argument(
        "--out", type=Path, metavar="PAGE.html", help="HTML page to write, with configs, curves, scores and speed (default: no page)"
    )
    parser.set_defaults(command=compare_runs)


def compare_runs(options: argparse.Namespace) -> None:
    """Prints how far each run came, its scores and speed, and what differs in their configs; --out writes a page with curves too.

    Reads the folders only: config, log and the results that evaluate has written. Nothing is trained or evaluated. Runs may differ in
    length, batch and images; notes say what cannot be compared.
    """
    from fastbyol.evaluation.comparison_page import best_lines, difference_lines, overview_notes, overview_table, write_comparison
    from fastbyol.evaluation.run_comparison import read_runs
    from fastbyol.evaluation.tasks.registry import print_table

    found = read_runs(options.runs)
    say(*found.remarks, file=sys.stderr)
    if options.out is not None:  # checked first, so that for a page that cannot be written nothing but the error is printed
        write_comparison(found, options.out, command=options.typed)
    groups = found.score_groups()
    print_table(overview_table(found))
    say(*(f"{run.name}: {run.outcome.text}" for run in found.runs if run.outcome.word != "complete"))
    say(*best_lines(found, groups), *difference_lines(found), *overview_notes(found, groups))
    say(f"page: {options.out}" if options.out else "next: the same command with --out compare.html, for curves and all scores")
