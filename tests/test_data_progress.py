"""Tests of progress display: a line every ten seconds in a log, a bar on a terminal, nothing for short work."""

from __future__ import annotations

import os
import pty

import pytest

from fastbyol.host import progress
from fastbyol.host.progress import Progress
from tests.commands import run_python


def _clock(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    times = iter(seconds)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))


def test_a_log_gets_a_line_with_rate_and_time_left_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _clock(monkeypatch, 100.0, 103.0, 110.0, 112.0, 121.0)
    with Progress("headers", 4000, unit="images") as shown:
        shown.reach(50)
        shown.advance(950)
        shown.advance(500)
        shown.advance(600)
    assert capsys.readouterr().err.splitlines() == [
        "headers: 1,000 of 4,000 images, 30 s left, 100 images/s",
        "headers: 2,100 of 4,000 images, 19 s left, 100 images/s",
    ]


def test_a_conversions_line_has_bytes_and_dropped_images_and_the_rate_of_this_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _clock(monkeypatch, 0.0, 5.0, 20.0, 21.0)
    with Progress("a.beton", 1500, unit="images", done=1000) as shown:
        shown.advance(stored_bytes=4_000_000)
        shown.advance(399, stored_bytes=36_000_000, dropped=3)
        shown.advance(100)
    assert capsys.readouterr().err.splitlines() == [
        "a.beton: 1,400 of 1,500 images, 3 dropped, 5 s left, 20 images/s, 40 MB, 2 MB/s",
        "a.beton: 1,500 of 1,500 images, 3 dropped, in 21 s, 24 images/s, 40 MB, 1.9 MB/s",
    ]


def test_work_of_a_few_seconds_writes_nothing_to_a_log(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _clock(monkeypatch, 0.0, 1.0, 9.0)
    with Progress("a.tar", 2) as shown:
        shown.advance()
        shown.advance()
    assert capsys.readouterr().err == ""


def test_a_terminal_of_80_columns_gets_a_bar_with_progress_and_time_left() -> None:
    code = (
        "import time; from fastbyol.host.progress import Progress\n"
        "with Progress('train_tar', 1_281_167, unit='images', done=1_000_000) as p:\n"
        "  for i in range(4): time.sleep(0.12); p.advance(1000, stored_bytes=110_000_000, dropped=1)\n"
    )
    reader, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    run_python("-c", code, capture_output=False, stderr=terminal, check=True, env=environment)
    os.close(terminal)
    shown = os.read(reader, 1 << 16).decode()
    os.close(reader)
    assert "train_tar: 1,002,000 of 1,281,167 images, 2 dropped" in shown
    assert " left," in shown
    assert "━" in shown
