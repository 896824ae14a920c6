"""python -m fastbyol doctor: what is installed, what works, and what helps."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbyol.config.console import say
from fastbyol.host.signals import stoppable

if TYPE_CHECKING:
    from fastbyol.doctor.finding import Finding


def add_doctor(commands: Any) -> None:
    """Adds the command to the parser's sub-commands."""
    what = "check what works in this installation and on this machine, and name the command that mends the rest"
    parser = commands.add_parser("doctor", help=what, description=examine.__doc__)
    parser.add_argument(
        "--path",
        type=Path,
        action="append",
        default=[],
        help="also measure how fast the disk of this file or folder reads; may be repeated",
    )
    parser.add_argument(
        "--quick", action="store_true", help="run no self tests and import only torch, to ask it for the GPUs; takes a few seconds"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(command=examine)


@stoppable
def examine(options: argparse.Namespace) -> None:
    """Says what is installed, in which version, what does not work without each missing part and which command installs it; looks at GPU,
    driver, limits of the container and disk; and tests each backend and kernel on real data, each in a process of its own, in about a
    minute.

    ok: works; low: works with a limit; missing: is not there; broken: is there and does not work. Exit code 1 if anything is broken,
    otherwise 0.
    """
    from fastbyol.doctor.finding import lines, summary

    found = list(_findings(options))
    if options.json:
        say(*json.dumps({"findings": [asdict(finding) for finding in found], "summary": summary(found)}, indent=1).split("\n"))
    else:
        say(*lines(found), summary(found))
    sys.exit(1 if any(finding.state == "broken" for finding in found) else 0)


def _findings(options: argparse.Namespace) -> Iterator[Finding]:
    from fastbyol.doctor.disk import disk_finding
    from fastbyol.doctor.machine import gpu_findings, machine_findings
    from fastbyol.doctor.packages import package_findings
    from fastbyol.doctor.self_tests import self_test_findings

    disks = [disk_finding(path) for path in options.path]  # first, so that a missing path is refused before the slow checks
    _announce("machine")
    machine = [*machine_findings(), *gpu_findings()]
    yield from sorted(machine, key=lambda finding: finding.group != machine[0].group)
    yield from disks
    _announce("packages")
    packages = list(package_findings(imports=not options.quick))
    yield from packages
    if options.quick:
        return
    parts = {finding.name for finding in [*machine, *packages] if finding.state == "ok"}
    names = {"ffcv": "ffcv", "C++ compiler": "compiler", "apex": "apex", "GPU 0": "gpu"}
    here = {names[part] for part in parts if part in names} | ({"dali"} if any(part.startswith("nvidia-dali") for part in parts) else set())
    # Only its C library is used, so its Python package need not import.
    if importlib.util.find_spec("ffcv") is not None:
        here.add("ffcv")
    yield from self_test_findings(here, announce=_announce)


def _announce(text: str) -> None:
    say(f"... {text}", file=sys.stderr)
