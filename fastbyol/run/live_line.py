"""Progress display of a training run: one live line on a terminal, plain lines in a log."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastbyol.host.progress import bar_console, text_bar

if TYPE_CHECKING:
    from rich.console import Console

REFRESH_PER_S = 2
WIDTH_WITHOUT_BAR = 96
"""Columns that step, time and text need in a long run; a wider terminal gets a longer bar."""
WAIT_SHOWN = 0.05
"""Share of the time spent waiting for data above which the live line shows it."""
PROGRESS = {"progress": True}
"""`extra` of a log record that only repeats what the live line shows."""


def progress_line(record: dict[str, Any], *, total_steps: int) -> str:
    """Formats the main figures of a logged step as one line."""
    knn = f"kNN {record['knn_top1']:.1%}  " if record.get("knn_top1") is not None else ""
    probe = f"probe {record['probe_top1']:.1%}  " if record.get("probe_top1") is not None else ""
    mfu = f"mfu {record['mfu']:.0%}  " if record.get("mfu") is not None else ""
    return (
        f"step {record['step'] + 1}/{total_steps}  epoch {record['epoch']:.2f}  loss {record['loss']:.4f}  lr {record['lr']:.3g}  "
        f"tau {record['tau']:.4f}  {record['images_per_s_per_device']:.0f} images/s per device  {mfu}data wait {record['data_wait_share']:.0%}  "
        f"{probe}{knn}proj-std {record['projection_std']:.2f}  rank {record['effective_rank']:.1f}  "
        f"cos {record['mean_cosine']:.2f}"
    )


class LiveLine:
    """A progress bar with step, epoch, loss, accuracy, images/s and remaining time in 80 columns; log messages are printed above it."""

    def __init__(self, *, total_steps: int, first_step: int, console: Console) -> None:
        from rich.progress import TextColumn, TimeRemainingColumn

        self._console = console
        bar_width = max(4, console.width - WIDTH_WITHOUT_BAR)
        # On a narrow terminal we cut the text on the right; rich would cut the step and the time first.
        self._text_width = max(0, console.width - len(f"step {total_steps}/{total_steps}  00:00:00  ") - bar_width)
        columns = TextColumn("step {task.completed:.0f}/{task.total:.0f}"), TimeRemainingColumn(elapsed_when_finished=True)
        self._bar = text_bar(console, *columns, bar_width=bar_width, refresh_per_s=REFRESH_PER_S)
        self._task = self._bar.add_task("", total=total_steps, completed=first_step)
        self._bar.start()
        atexit.register(self.close)  # gives the terminal its cursor back however the process ends

    def show(self, record: dict[str, Any]) -> None:
        """Shows one logged step; the share of time spent waiting for data appears only if it is above WAIT_SHOWN."""
        knn = f" kNN {record['knn_top1']:.0%}" if record.get("knn_top1") is not None else ""
        probe = f" probe {record['probe_top1']:.0%}" if record.get("probe_top1") is not None else ""
        wait = f" waits {record['data_wait_share']:.0%}" if record["data_wait_share"] > WAIT_SHOWN else ""
        speed = f"{record['images_per_s']:.0f} images/s"
        text = f"epoch {record['epoch']:.2f} loss {record['loss']:.3f} {speed}{wait}{probe}{knn}"
        self._bar.update(self._task, completed=record["step"] + 1, description=text[: self._text_width])

    def handler(self) -> logging.Handler:
        """Returns a log handler that prints above the bar and skips lines that only repeat it; closing the handler closes the bar."""
        handler = _AboveTheBar(self._console, self.close)
        handler.addFilter(lambda record: not getattr(record, "progress", False))
        return handler

    def close(self) -> None:
        """Stops the bar and leaves it on the screen; calling it twice is harmless."""
        self._bar.stop()
        atexit.unregister(self.close)


class _AboveTheBar(logging.Handler):
    def __init__(self, console: Console, close_bar: Callable[[], None]) -> None:
        super().__init__()
        self._console, self._close_bar = console, close_bar

    def emit(self, record: logging.LogRecord) -> None:
        self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._close_bar()
        super().close()


def live_line(*, total_steps: int, first_step: int) -> LiveLine | None:
    """Returns a live line on stderr if that is a terminal that can draw one, else None."""
    console = bar_console()
    return LiveLine(total_steps=total_steps, first_step=first_step, console=console) if console else None
