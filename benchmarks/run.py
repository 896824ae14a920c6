"""Runs benchmark cases; writes OUT/records.json and OUT/report.md and prints the tables.

python -m benchmarks.run --quick
python -m benchmarks.run loader ema --out benchmarks/out
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cases import CASES, check_names, load_case
from benchmarks.record import CaseResult
from benchmarks.report import case_table, report_markdown
from benchmarks.timing import measuring_overhead_ms
from fastbyol.config.arguments import OneLineParser
from fastbyol.config.errors import UserError, one_line_errors
from fastbyol.provenance import collect_provenance

FORMAT = 1
"""Of records.json; a later one that cannot be compared with it gets another number."""
LOG_COLUMNS = 180


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    names = list(dict.fromkeys(options.cases)) or list(CASES)
    check_names(names)
    _make_folder(options.out)
    console = _console()
    typed = sys.argv[1:] if arguments is None else arguments
    record = _new_record(quick=options.quick, command=shlex.join(["python", "-m", "benchmarks.run", *typed]))
    results: list[CaseResult] = []
    for name in names:
        console.print(f"[bold]{name}[/bold] ...")
        try:
            result = _run_case(name, quick=options.quick)
        except UserError as error:  # an optional package is missing: the other cases are none the worse
            record["skipped"][name] = str(error)
            console.print(f"{name} skipped: {error}", markup=False)
        else:
            results.append(result)
            record["cases"][name] = result.as_dict()
            console.print(case_table(result))
        _write(options.out, record, results)  # after every case: what is measured is kept, whatever comes next
    console.print(f"wrote {options.out / 'records.json'} and report.md", markup=False)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(CASES)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/out"), metavar="DIR", help="where the record goes (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="small settings: all cases in under 3 minutes on 2 cores")
    return parser


def _console() -> Console:
    """As wide as the terminal; a log, which has no width, gets whole lines."""
    console = Console()
    return console if console.is_terminal else Console(width=LOG_COLUMNS)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be made ({error.strerror}); choose another folder") from error


def _run_case(name: str, *, quick: bool) -> CaseResult:
    case = load_case(name)
    with tempfile.TemporaryDirectory(prefix=f"fastbyol-{name}-") as scratch:
        return case.run(case.QUICK if quick else case.FULL, scratch=Path(scratch))


def _new_record(*, quick: bool, command: str) -> dict[str, Any]:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "format": FORMAT,
        "quick": quick,
        "started": now,
        "start_s": time.perf_counter(),
        "measuring_overhead_ms": measuring_overhead_ms(),
        "load_average": {"start": os.getloadavg()},
        "provenance": collect_provenance() | {"command": command},
        "cases": {},
        "skipped": {},
    }


def _write(out: Path, record: dict[str, Any], results: list[CaseResult]) -> None:
    written = {name: value for name, value in record.items() if name != "start_s"}
    written["seconds"] = round(time.perf_counter() - record["start_s"], 1)
    written["load_average"] = {**record["load_average"], "end": os.getloadavg()}
    (out / "records.json").write_text(json.dumps(written, indent=1) + "\n")
    (out / "report.md").write_text(report_markdown(written, results))


if __name__ == "__main__":
    main()
