"""fastbyol/train.py with one fault in it: FAULT=kind:rank:step, step counted from 1 in this process. It says FAULT before it strikes.

kinds: kill and stop (the signals), raise, exit (0, early), hang (the data never come), nan (in one image).
A worker that torchrun restarted has no fault.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

import fastbyol.train as train
from fastbyol.data.batch import ViewBatch

KIND, RANK, STEP = os.environ["FAULT"].split(":")
inner, taken = train.train_step, 0


def train_step(config: Any, process: Any, state: Any, batches: Any, *rest: Any, **options: Any) -> Any:
    global taken
    taken += 1
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if taken == int(STEP) and process.rank == int(RANK) and not restarted:
        print(f"FAULT {KIND} on rank {process.rank} in step {taken}", file=sys.stderr, flush=True)
        batches = strike(batches)
    return inner(config, process, state, batches, *rest, **options)


def strike(batches: Iterator[ViewBatch]) -> Iterator[ViewBatch]:
    if KIND in ("kill", "stop"):
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[KIND])
    if KIND == "raise":
        raise KeyError("injected")
    if KIND == "exit":
        os._exit(0)
    return damaged(batches)


def damaged(batches: Iterator[ViewBatch]) -> Iterator[ViewBatch]:
    if KIND == "hang":
        time.sleep(10**6)
    for batch in batches:
        view1 = batch.view1.clone()
        view1[0] = torch.nan
        yield batch._replace(view1=view1)


train.train_step = train_step
if __name__ == "__main__":
    train.main()
