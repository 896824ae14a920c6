"""Progress: a line now and then in a log, a bar on a terminal, nothing for work that ends at once."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from fastbyol.data import progress
from fastbyol.data.progress import Progress


def test_a_log_gets_a_line_with_rate_and_rest_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([100.0, 103.0, 110.0, 112.0, 121.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Progress("headers", 4000, unit="images") as shown:
        shown.reach(50)
        shown.advance(950)
        shown.advance(500)
        shown.advance(600)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "headers: 1,000 of 4,000 images, 100 images/s, 30 s left",
        "headers: 2,100 of 4,000 images, 100 images/s, 19 s left",
    ]


def test_a_terminal_gets_a_bar() -> None:
    code = (
        "import time; from fastbyol.data.progress import Progress\n"
        "with Progress('headers', 4) as p:\n"
        "  for i in range(4): time.sleep(0.12); p.advance(1)\n"
    )
    reader, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    subprocess.run([sys.executable, "-c", code], stderr=terminal, timeout=60, check=True, env=environment)
    os.close(terminal)
    shown = os.read(reader, 1 << 16).decode()
    os.close(reader)
    assert "headers" in shown
    assert "50%" in shown
