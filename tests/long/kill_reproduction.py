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

from fastbyol.reproduction.records import SETUP_FILE, Record, read_records
from tests.commands import SMALL_RUN
from tests.conftest import noisy_colours

ROWS = ("byol", "tau_0", "tau_0.9", "tau_0.999", "tau_1")
LONGEST_S = 120.0
"""The whole command takes at most this long where waits are drawn: a busy machine may have been slow at first."""
STARTING_S = 1.0
"""A command hears signals this long after its start at the latest."""
OF_ONE_EXECUTION = {"cpu_s": 0.0, "wall_s": 0.0, "cost_is_whole": True, "command": "", "provenance": {}}
"""What differs between two executions of the same command: the seconds, whether a killed start's are among them, when and where."""


def results(out: Path) -> list[Record]:
    """Returns the records without the fields of OF_ONE_EXECUTION and without the folder's own name."""
    return [
        dataclasses.replace(record, config=dataclasses.replace(record.config, out=""), **OF_ONE_EXECUTION) for record in read_records(out)
    ]


def differences(ours: Record, theirs: Record) -> list[str]:
    """Returns a line for each field that differs."""
    fields = (field.name for field in dataclasses.fields(ours))
    return [f"{ours.run}: {name}: {a} and {b}" for name in fields if (a := getattr(ours, name)) != (b := getattr(theirs, name))]


def begun(out: Path) -> int:
    """Returns when the last command that came to its work began it: each writes the set-up first."""
    setup = out / SETUP_FILE
    return setup.stat().st_mtime_ns if setup.exists() else 0


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
            before = begun(killed)
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
                    # While Python itself still starts, the signal ends it as any program.
                    starting = code == -signal.SIGTERM and begun(killed) == before and wait < STARTING_S
                    if sent == signal.SIGTERM and code != 75 and not starting:
                        print(said)
                        sys.exit(f"{ended[-1]} where 75 was expected")
                    continue
            if process.returncode:
                sys.exit(process.stderr.read() if process.stderr else "failed")
            # It was done before it was killed often enough: the last row is taken away, to be done again.
            (killed / "records" / "tau_1-seed0.json").unlink()
        subprocess.run(command(killed), check=True, capture_output=True)
        expected, found = results(undisturbed), results(killed)
        if len(found) != len(ROWS):
            sys.exit(f"{len(found)} records of {len(ROWS)} rows after {len(ended)} kills")
        if different := [line for pair in zip(expected, found, strict=True) for line in differences(*pair)]:
            sys.exit("\n".join([f"DIFFERENT records after {len(ended)} kills:", *different]))
        print(f"the same records of {len(ROWS)} rows after {len(ended)} kills")


if __name__ == "__main__":
    main()
