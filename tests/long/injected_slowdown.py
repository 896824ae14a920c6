"""Measures the loader twice as it is and once made 20 % slower, and compares the records: the first two must be equal, the third flagged.

python tests/long/injected_slowdown.py [--slower 0.2] [--full] [--keep DIR]        (2 minutes on a quiet machine; exit code 1: not as it must be)

Each measurement is `python -m benchmarks.run loader` in a process of its own. The slow-down is real: after each view that the kernel has rendered,
the loader's thread spins for that share of the CPU time that it took since the view before, decoding included. Only the CPU clock counts, so a busy
machine widens the intervals and changes no figure: there some of the slowed rows may come out as 'within noise', which --full (ten minutes) mends.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the suite runs from a checkout and is not installed

from benchmarks import compare, run  # noqa: E402
from benchmarks.record_file import read_record  # noqa: E402
from fastbyol.augment.view_kernel import ViewKernel  # noqa: E402

SLOWED = {f"{backend}: {what}" for backend in ("ffcv", "dali", "folder") for what in ("crops", "views")}


def slow_down(share: float) -> None:
    """From here on each rendered view costs its thread so much more CPU time."""
    render, local = ViewKernel.render, threading.local()

    def slower(self: ViewKernel, *arguments: object) -> None:
        start = getattr(local, "end", None) or time.thread_time()
        render(self, *arguments)  # type: ignore[arg-type]
        until = time.thread_time() + share * (time.thread_time() - start)
        while time.thread_time() < until:
            pass
        local.end = time.thread_time()

    ViewKernel.render = slower  # type: ignore[method-assign, assignment]


def measure(out: Path, *, slower: float, full: bool) -> None:
    """A record of the loader in the folder, by a process of its own."""
    how = [] if full else ["--quick"]
    command = [sys.executable, __file__, "--measure", str(slower), "loader", "--out", str(out), *how]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def compared(before: Path, after: Path) -> tuple[dict[str, set[str]], int]:
    """(rows by verdict, the command's exit code); what the command prints is shown."""
    verdicts: dict[str, set[str]] = {compare.SLOWER: set(), compare.NOISE: set()}
    for change in compare.compare(read_record(before), read_record(after)):
        verdicts.setdefault(change.verdict(compare.THRESHOLD), set()).add(change.subject)
    command = [sys.executable, "-m", "benchmarks.compare", str(before), str(after)]
    return verdicts, subprocess.run(command, cwd=ROOT).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slower", type=float, default=0.2)
    parser.add_argument("--full", action="store_true", help="the case's full settings instead of the quick ones")
    parser.add_argument("--keep", type=Path, help="folder for the three records")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastbyol-slowdown-") as scratch:
        out = options.keep or Path(scratch)
        for name, slower in (("first", 0.0), ("again", 0.0), ("slowed", options.slower)):
            measure(out / name, slower=slower, full=options.full)
        same, same_exit = compared(out / "first", out / "again")
        slowed, slowed_exit = compared(out / "first", out / "slowed")
    flagged, moved = slowed[compare.SLOWER], slowed[compare.NOISE]
    right = not same[compare.SLOWER] and same_exit == 0 and flagged <= SLOWED <= flagged | moved and slowed_exit == compare.SLOWER_EXIT
    print(f"the same twice: {len(same[compare.SLOWER])} rows flagged; {options.slower:.0%} slower: of {len(SLOWED)} slowed rows {len(flagged)} "
          f"flagged, {len(SLOWED & moved)} within the noise: {'as it must be' if right else 'WRONG'}")  # fmt: skip
    sys.exit(not right)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        if share := float(sys.argv[2]):
            slow_down(share)
        run.main(sys.argv[3:])
    else:
        main()
