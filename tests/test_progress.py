"""Progress shown during training: lines in a log, a live line on a terminal, Weights & Biases."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from rich.console import Console

from fastbyol.config.errors import UserError
from fastbyol.config.schema import MonitorsConfig, TrainConfig
from fastbyol.run.live_line import PROGRESS, LiveLine, live_line, progress_line
from fastbyol.run.wandb_log import check_wandb

RECORD = {
    **{"step": 49, "epoch": 0.5, "loss": 1.25, "lr": 0.1, "tau": 0.99, "images_per_s": 640.0, "images_per_s_per_device": 320.0},
    **{"data_wait_share": 0.25, "probe_top1": 0.5, "projection_std": 0.8, "effective_rank": 17.0, "mean_cosine": 0.2},
}
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


@pytest.fixture
def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80, legacy_windows=False)


def _drawn(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_line_says_where_the_run_is_how_it_learns_and_how_fast():
    line = progress_line(RECORD, total_steps=100)
    assert line.startswith("step 50/100  epoch 0.50  loss 1.2500  lr 0.1  tau 0.9900  320 images/s per device  data wait 25%")
    assert "kNN" not in line
    assert "mfu" not in line
    assert "320 images/s per device  mfu 41%  data wait" in progress_line({**RECORD, "mfu": 0.412}, total_steps=100)
    assert "probe" not in progress_line({**RECORD, "probe_top1": None}, total_steps=100), "one class, or no labels"
    assert "probe 50.0%  kNN 61.2%  proj-std 0.80" in progress_line({**RECORD, "knn_top1": 0.612}, total_steps=100)


def test_a_terminal_shows_step_loss_speed_and_accuracy_in_one_line_and_gets_its_cursor_back(terminal):
    live = LiveLine(total_steps=312_784, first_step=20, console=terminal)
    live.show({**RECORD, "knn_top1": 0.612})
    live.handler().close()
    drawn = _drawn(terminal)
    last = [line for line in drawn.replace("\r", "\n").splitlines() if "step" in line][-1]
    for part in ("step 50/312784", "epoch 0.50 loss 1.250 640 images/s waits 25%", "-:--:--"):
        assert part in last
    assert drawn.rindex(SHOW_CURSOR) > drawn.rindex(HIDE_CURSOR)
    live.close()


def test_messages_pass_above_the_live_line_and_lines_that_repeat_it_do_not(terminal):
    live = LiveLine(total_steps=100, first_step=0, console=terminal)
    log = logging.getLogger("test_progress")
    log.propagate = False
    log.setLevel(logging.INFO)
    log.addHandler(live.handler())
    log.info("step 50/100 as in the file", extra=PROGRESS)
    log.warning("ALARM [red]as typed[/red] with a very long text that goes on and on: " + "x" * 200)
    live.close()
    assert "as in the file" not in _drawn(terminal)
    assert "[red]as typed[/red]" in _drawn(terminal)
    assert "x" * 200 in _drawn(terminal), "not broken, so that it can be searched for"


def test_a_log_file_has_no_live_line(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert live_line(total_steps=1, first_step=0) is None
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    assert live_line(total_steps=1, first_step=0) is None


def test_asking_for_wandb_without_it_ends_in_one_line_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"monitors.wandb_project = 'byol': wandb is not installed; pip install 'fastbyol\[wandb\]'"):
        check_wandb(TrainConfig(monitors=MonitorsConfig(wandb_project="byol")))
    check_wandb(TrainConfig())
