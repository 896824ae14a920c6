"""Converts ten thousand and a hundred thousand tiny images to each format, and prints the largest memory of the writer and of a worker.

python -m tests.long.flat_memory [--images 10000 100000]        (minutes)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from tests.commands import DATA_PREP, children_of
from tests.images import write_many


def peak_mib(process: int) -> float:
    """Its high-water mark so far, 0 if it has gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (FileNotFoundError, ProcessLookupError, StopIteration):
        return 0.0


def watch(command: list[str | Path]) -> tuple[float, float, float]:
    """Runs it: peak of the process, peak of its largest child (MiB), seconds."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peaks = [0.0, 0.0]

    def look() -> None:
        while process.poll() is None:
            peaks[0] = max(peaks[0], peak_mib(process.pid))
            peaks[1] = max([peaks[1], *map(peak_mib, children_of(process.pid))])
            time.sleep(0.02)

    thread = threading.Thread(target=look)
    thread.start()
    process.wait()
    thread.join()
    if process.returncode:
        sys.exit(f"{command}: exit code {process.returncode}")
    return peaks[0], peaks[1], time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000])
    for num in parser.parse_args().images:
        with tempfile.TemporaryDirectory(prefix="fastbyol-memory-") as scratch:
            data = write_many(Path(scratch) / "images", images=num, classes=100)
            for script, name in (("to_ffcv.py", "x.beton"), ("to_dali.py", "x")):
                writer, worker, seconds = watch(
                    [sys.executable, DATA_PREP / script, "--data", data, "--out", Path(scratch) / name, "--workers", "2"]
                )
                figures = {"script": script, "images": num, "writer_mib": round(writer), "worker_mib": round(worker), "s": round(seconds)}
                print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
