"""Kills both converters at 20 random moments each, continues them, and compares every byte with an undisturbed conversion.

python -m tests.long.kill_conversions [--images 12000] [--kills 20] [--seed 0]        (minutes; the suite does the same with fewer)
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.commands import CONVERSIONS, kill_and_continue
from tests.images import write_many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fastbyol-kill-") as scratch:
        data = write_many(Path(scratch) / "images", images=options.images, bad_every=50)
        for kind, command_of in CONVERSIONS.items():
            results = []
            for run in ("undisturbed", "killed"):
                folder = Path(scratch) / kind / run
                folder.mkdir(parents=True)
                command = command_of(data, folder, "--max-dropped", "0.1", "--workers", "2")
                kills = options.kills if run == "killed" else 0
                done = kill_and_continue(command, images=options.images, kills=kills, seed=options.seed)
                results.append(command.result())
            same = results[0] == results[1]
            size = sum(map(len, results[0].values()))
            print(f"{kind}: killed {len(done)} times, at {done} of {options.images} images; {len(results[0])} files, {size:,} bytes: "
                  f"{'identical' if same else 'DIFFERENT'}", flush=True)  # fmt: skip
            if not same or len(done) < options.kills:
                sys.exit(1)


if __name__ == "__main__":
    main()
