"""Runs benchmark cases, prints their tables and writes OUT/records.json, OUT/report.md and OUT/report.html.

python -m benchmarks.run --quick
python -m benchmarks.run loader ema --out benchmarks/out
"""

from __future__ import annotations

import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cases import CASES, check_names, load_case
from benchmarks.gpu import Findings
from benchmarks.own_process import PartFailed
from benchmarks.record import CaseResult
from benchmarks.record_file import FILE, new_record, read_record, write_record
from benchmarks.report import write_reports
from benchmarks.report_text import case_table, log_console
from fastbyol.config.arguments import OneLineParser
from fastbyol.config.errors import UserError, one_line_errors
from fastbyol.host.signals import INTERRUPTED_EXIT


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    names = list(dict.fromkeys(options.cases)) or list(CASES)
    check_names("CASE", names, CASES)
    make_folder(options.out)
    console = log_console()
    record = new_record(quick=options.quick, command=typed_command("benchmarks.run", arguments))
    failed: list[str] = []
    for name in names:
        try:
            failed += [] if keep_result(name, partial(_run_case, name, quick=options.quick), record, console) else [name]
        except KeyboardInterrupt:  # no Exception, so `keep_result` lets it through
            console.print(f"interrupted in {name}; the record in {options.out} holds the earlier cases", markup=False)
            sys.exit(INTERRUPTED_EXIT)
        write_record(options.out, record)  # after every case, so that a later crash loses nothing
    written = read_record(options.out)
    write_reports(options.out, written)
    console.print(f"wrote {options.out / FILE}, report.md and report.html; {written['seconds']:.0f} s in all", markup=False)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see above")


def keep_result(name: str, measure: Callable[[], CaseResult | Findings], record: dict[str, Any], console: Console) -> bool:
    """Measures, keeps the result in the record, or why there is none, and prints it; returns False if the case failed."""
    console.print(f"[bold]{name}[/bold] ...")
    start, failed = time.perf_counter(), False
    try:
        result = measure()
    except UserError as error:  # an optional package is missing: the other cases can still run
        record["skipped"][name] = str(error)
        console.print(f"{name} skipped: {error}", markup=False)
    except PartFailed as error:  # its traceback is in its log
        failed, record["skipped"][name] = True, f"failed: {error}"
        console.print(f"{name} failed: {error}", markup=False)
    except Exception as error:  # a bug in one case must not lose the results of the others
        traceback.print_exc()
        failed, record["skipped"][name] = True, f"failed: {type(error).__name__}: {' '.join(str(error).split())}"
    else:
        put_result(name, result, record)
        if isinstance(result, Findings):
            found = [f"  {what}: {text}" for what, text in result.found.items()]
        else:
            console.print(case_table(result))
            found = [f"{row} skipped: {why}" for row, why in result.skipped.items()]
        for line in found:
            console.print(line, markup=False)
    record["case_seconds"][name] = round(time.perf_counter() - start, 1)
    console.print(f"{name}: {record['case_seconds'][name]} s, set-up and warm-up included", markup=False)
    return not failed


def put_result(name: str, result: CaseResult | Findings, record: dict[str, Any]) -> None:
    """Puts the result into the record, in the place of what was there of it before."""
    if isinstance(result, Findings):
        record["findings"][name] = {"title": result.title, "found": result.found}
    else:
        record["cases"][name] = result.as_dict()


def typed_command(module: str, arguments: Sequence[str] | None) -> str:
    """Returns the command that starts this run again."""
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)])


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), metavar="DIR", help="folder for the record (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small settings: all cases in under 3 minutes on 2 cores")
    return parser


def make_folder(out: Path) -> None:
    """Creates the folder. Raises UserError if that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); choose another folder") from error


def _run_case(name: str, *, quick: bool) -> CaseResult:
    case = load_case(name)
    with tempfile.TemporaryDirectory(prefix=f"fastbyol-{name}-") as scratch:
        return case.run(case.QUICK if quick else case.FULL, scratch=Path(scratch))


if __name__ == "__main__":
    main()
