"""Runs a CPU kernel on as many threads as torch uses.

Each thread takes the next item when it has finished one, and no thread waits for another before the end, so if one core is busy the
others do its share. The kernels release the interpreter lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Returns the result of `work` for each item, in order."""
    threads = min(torch.get_num_threads(), len(items))
    return list(map(work, items) if threads <= 1 else _pool(threads).map(work, items))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fastbyol-kernel")
