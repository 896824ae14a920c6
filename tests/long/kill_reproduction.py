"""Ends `reproduce` at 20 random moments, by SIGKILL and SIGTERM in turn, continues it, and compares its tables with undisturbed ones.

python -m tests.long.kill_reproduction [--kills 20] [--steps 60] [--seed 0]        (minutes)
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fastbyol.reproduction.records import Record, read_records
from tests.commands import SMALL_RUN
from tests.conftest import noisy_colours

ROWS = ("byol", "tau_0", "tau_0.9", "tau_0.999", "tau_1")
LONGEST_S = 120.0
"""The whole command takes at most this long where waits are drawn: a busy machine may have been slow at first."""
COSTS = {"cpu_s": 0.0, "wall_s": 0.0, "command": "", "provenance": {}}


def results(out: Path) -> list[Record]:
    """Returns the records without what the time they took changes, and without the folder's own name."""
    return [dataclasses.replace(record, config=dataclasses.replace(record.config, out=""), **COSTS) for record in read_records(out)]


def state(out: Path) -> dict[Path, int]:
    """Returns when each file of the folder was last written."""
    return {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="fastbyol-kill-") as scratch:
        data = noisy_colours(Path(scratch) / "colours", train=24, val=8)

        def command(out: Path) -> list[str]:
            run = [
                "--preset",
                "cpu_demo",
                "--steps",
                str(options.steps),
                "--optim.warmup_epochs",
                "0",
                *SMALL_RUN[2:],
                "--checkpoint_every",
                "20",
            ]
            return [sys.executable, "-m", "fastbyol", "reproduce", "tau", "--data", str(data), "--out", str(out), *run]

        undisturbed, killed = Path(scratch) / "undisturbed", Path(scratch) / "killed"
        start = time.monotonic()
        subprocess.run(command(undisturbed), check=True, capture_output=True)
        whole_s, ended = time.monotonic() - start, []
        while len(ended) < options.kills:
            before = state(killed)
            process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            wait = rng.uniform(0.05, 0.4) * min(whole_s, LONGEST_S)
            try:
                process.wait(wait)
            except subprocess.TimeoutExpired:
                sent = signal.SIGKILL if len(ended) % 2 else signal.SIGTERM
                process.send_signal(sent)
                if code := process.wait():  # 0: it was done when the signal came
                    ended.append(f"{sent.name} after {wait:.0f} s: exit code {code}")
                    print(ended[-1], flush=True)
                    said = process.stderr.read() if process.stderr else ""
                    # One that has not touched a file yet, or whose rows are all done, is ended by the signal as any program is.
                    idle = state(killed) == before or len(read_records(killed)) == len(ROWS)
                    if sent == signal.SIGTERM and code != 75 and not (idle and code == -signal.SIGTERM):
                        print(said)
                        sys.exit(f"{ended[-1]} where 75 was expected")
                    continue
            if process.returncode:
                sys.exit(process.stderr.read() if process.stderr else "failed")
            # It was done before it was killed often enough: the last row is taken away, to be done again.
            (killed / "records" / "tau_1-seed0.json").unlink()
        subprocess.run(command(killed), check=True, capture_output=True)
        same = results(undisturbed) == results(killed) and len(results(killed)) == len(ROWS)
        print(
            "\n".join(ended),
            f"{'the same' if same else 'DIFFERENT'} records of {len(ROWS)} rows after {len(ended)} kills",
            sep="\n",
            flush=True,
        )
        sys.exit(not same)


if __name__ == "__main__":
    main()
