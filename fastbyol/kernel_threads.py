"""Calls of a CPU kernel on as many threads as torch has.

Each thread takes the next item when it is done with its own, and none waits for another before the end: where a core is busy with something else,
the others do its share. The kernels let go of the interpreter's lock.
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
    """What `work` gives for each item, in their order."""
    threads = min(torch.get_num_threads(), len(items))
    return list(map(work, items) if threads <= 1 else _pool(threads).map(work, items))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fastbyol-kernel")
