"""Conversions that are killed at random moments and continued: for the suite on a few images, for `tests/long/kill_conversions.py` on many."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

SCRIPTS = Path(__file__).parents[1] / "data_prep"


def write_many(root: Path, *, images: int, classes: int = 3, bad_every: int = 0) -> Path:
    """A folder of `images` small files, no two alike; of every `bad_every` one is cut and one is a PNG."""
    photo = Image.effect_noise((48, 40), 60).convert("RGB")
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    for index in range(images):
        comment = f"{index:08d}".encode()
        content = jpeg[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + jpeg[2:]
        if bad_every and index % bad_every == 3:
            content = content[:-200]
        elif bad_every and index % bad_every == 5:
            buffer = io.BytesIO()
            photo.resize((20 + index % 7, 21)).save(buffer, "PNG")
            content = buffer.getvalue()
        folder = root / f"class{index % classes}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:06d}.jpg").write_bytes(content)
    return root


@dataclass(frozen=True)
class Conversion:
    """One command, to be run as often as it takes."""

    script: str
    data: Path
    out: Path
    options: tuple[str, ...] = ()

    @property
    def work(self) -> Path:
        return self.out.with_name(f".{self.out.name}.partial")

    def done(self) -> int:
        """Images that the journal vouches for."""
        try:
            return json.loads((self.work / "journal.json").read_text())["done"]
        except FileNotFoundError:
            return 0

    def start(self, **popen: object) -> subprocess.Popen[str]:
        command = [sys.executable, SCRIPTS / self.script, "--data", self.data, "--out", self.out, "--flush-every", "0", *self.options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)  # type: ignore[call-overload]

    def run(self, **popen: object) -> subprocess.CompletedProcess[str]:
        process = self.start(**popen)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def interrupt(self, number: signal.Signals, *, after: int, pause_s: float = 0.0) -> tuple[int, str, list[int]]:
        """Sends a signal when so many images are done and a pause is over: exit code, stderr, and the workers that there were."""
        process = self.start()
        while self.done() < after and process.poll() is None:
            time.sleep(0.002)
        time.sleep(pause_s)
        workers = children_of(process.pid)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        return process.returncode, err, workers

    def result(self) -> dict[str, bytes]:
        """Every file that the conversion left, by name."""
        files = (
            [path for path in self.out.rglob("*") if path.is_file()]
            if self.out.is_dir()
            else list(self.out.parent.glob(f"{self.out.name}*"))
        )
        return {path.name: path.read_bytes() for path in files}

    def is_finished(self) -> bool:
        return self.out.exists() and not self.work.exists()


def kill_and_continue(conversion: Conversion, *, images: int, kills: int, seed: int) -> list[int]:
    """Kills the command at random moments, spread over its work, and continues it to its end: what the journal said at each kill."""
    moments = random.Random(seed)
    done_at_kill = []
    for kill in range(kills):
        after = round(0.7 * images * (kill + moments.random()) / kills)
        code, _, workers = conversion.interrupt(signal.SIGKILL, after=after, pause_s=moments.random() * 0.03)
        if code != -signal.SIGKILL or not conversion.work.exists():  # it was done before the moment came
            break
        done_at_kill.append(conversion.done())
        await_gone(workers)
    was_in_place = conversion.out.exists()
    if not conversion.is_finished():
        finished = conversion.run()
        # Killed when the output had just taken its place, there is nothing to do but to take the work folder away.
        assert finished.returncode == (2 if was_in_place else 0), finished.stderr
        assert conversion.is_finished()
    return done_at_kill


def children_of(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def await_gone(processes: list[int], *, timeout_s: float = 30.0) -> None:
    """AssertionError if one of them is still running after that time."""
    deadline = time.monotonic() + timeout_s
    while running := [process for process in processes if is_running(process)]:
        assert time.monotonic() < deadline, running
        time.sleep(0.02)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def limit_file_size(limit: int) -> object:
    """For `preexec_fn`: a disk that is full after so many bytes."""
    import resource

    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
