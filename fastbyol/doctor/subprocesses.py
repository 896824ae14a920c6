"""Runs pieces of Python in other processes, so that native code that crashes or hangs costs a line and not the doctor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbyol.config.errors import shortened

MARK = "fastbyol-doctor: "
"""Begins the lines that carry results; libraries print whatever they like beside them."""


@dataclass(frozen=True)
class Ended:
    """What a process reported, in order, and why it ended early, or ''."""

    reports: list[dict[str, Any]]
    fault: str


def run_python(*arguments: str, limit_s: float) -> Ended:
    """Runs `python ARGUMENTS` until it has printed nothing for `limit_s` seconds; what it starts itself is ended with it."""
    # Files, not pipes: a grandchild that survives would keep a pipe open for ever.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        package = str(Path(__file__).parents[2])  # also from a checkout that is not installed
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONFAULTHANDLER": "1"}
        process = subprocess.Popen(
            [sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=errors, env=environment, start_new_session=True
        )
        late, printed, heard = False, 0, time.monotonic()
        try:
            while process.poll() is None and not late:
                time.sleep(0.02)
                if (size := os.fstat(out.fileno()).st_size) > printed:
                    printed, heard = size, time.monotonic()
                late = time.monotonic() - heard > limit_s
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        errors.seek(0)
        said = out.read().decode(errors="replace").splitlines(keepends=True)
        complaint = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
    reports = [json.loads(line.removeprefix(MARK)) for line in said if line.startswith(MARK) and line.endswith("\n")]
    if late:
        return Ended(reports, f"gave no answer within {limit_s:g} s")
    if process.returncode < 0:
        return Ended(reports, f"crashed ({signal.Signals(-process.returncode).name})")
    if process.returncode:
        return Ended(reports, shortened(complaint[-1], limit=300) if complaint else f"ended with exit code {process.returncode}")
    return Ended(reports, "")


def run_each(names: Sequence[str], *arguments: str, limit_s: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs `python ARGUMENTS NAMES`, which reports (begun=name) and then one result for each, and yields (name, result).

    All names share a process, since its imports cost the most. A name at which it crashes or hangs gets {'fault': …}; a new process does the rest.
    """
    left = list(names)
    while left:
        ended = run_python(*arguments, *left, limit_s=limit_s)
        at = ""
        for result in ended.reports:
            if "begun" in result:
                at = result["begun"]
            else:
                left.remove(at)
                yield at, result
        if left:  # the process ended while it worked on this one
            at = at if at in left else left[0]
            left.remove(at)
            yield at, {"fault": ended.fault or "ended without a result"}


def report(**values: Any) -> None:
    """Prints a result for the process that called `run_python`."""
    sys.stdout.write(f"{MARK}{json.dumps(values)}\n")
    sys.stdout.flush()
