"""Runs work in a process of its own between rounds, if its effect on memory or torch's settings would disturb the other subjects."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.timing import count_cpu_seconds
from fastbyol.config.errors import UserError


@contextmanager
def in_own_process(make: Callable[..., Callable[[], object]], *arguments: Any) -> Iterator[Callable[[], None]]:
    """Yields a function that calls `make(*arguments)()` in the other process, where `make` runs once, at the first call. Its CPU time
    counts as if spent here.

    Args:
        make: importable by name; its arguments must be picklable.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
    process.start()
    theirs.close()

    def call() -> None:
        try:
            ours.send("go")
            count_cpu_seconds(ours.recv())
        except (EOFError, OSError):
            process.join()
            raise UserError(f"{make.__name__}: its process died (exit code {process.exitcode}); is memory short?") from None

    try:
        yield call
    finally:
        ours.close()
        process.join()


def _serve(pipe: Connection, make: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> None:
    work = make(*arguments)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        start = time.process_time()
        work()
        pipe.send(time.process_time() - start)
