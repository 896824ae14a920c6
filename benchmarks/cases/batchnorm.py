"""Measures batch norm and ReLU of both views, forward and backward, over every shape that ResNet-50 normalises at 224 px (one layer of
each).

How: activations in bf16, or in float32 on a CPU without instructions for bf16, whose runs compute in that; channels-last, float32
scale and offset, one thread, batch 16 per view. Reference: torch's nn.BatchNorm2d and in-place ReLU, one view at a time, as in the
official code. Ours (`norm_relu`) takes both views as one batch, first on one process, then in two processes at once without a message
between them (they share the memory's bandwidth and the machine's noise, so this is what two ranks are compared with), then over two
ranks on this machine (gloo), with one message for both views and with one for each, and in plain operations, as before the kernel
could do it. Ceiling: five copies of the activations, about what the smallest number of passes moves. Across ranks read the wall clock
(the CPU column sees this rank only). nn.SyncBatchNorm does not run on the CPU; "a view at a time" does what it would do, one message
per view.

    python -m benchmarks.run batchnorm

Why: norm and ReLU are one kernel that reads the activations only as often as the statistics require; across ranks it is the same
kernel with two messages in between (`models/cpu_norm.py`). Plain tensor operations take several float32 passes each, which Inductor can
fuse on a GPU (not measured yet); on a CPU they cost a multiple, and are left for float64 and for networks that are not channels-last.
Half the messages save half the latency, which with gloo is small beside the arithmetic, but limits the step beyond some 16 GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.own_process import start_process
from benchmarks.record import CaseResult, measured
from benchmarks.timing import subjects_of, torch_threads
from benchmarks.training_step import DTYPE, FORMAT
from fastbyol.models.norm_relu import norm_relu
from fastbyol.models.sync_batchnorm import cross_replica_normalise
from fastbyol.models.view_batchnorm import ViewBatchNorm
from fastbyol.run.precision import keep_freed_memory

REFERENCE, CEILING, OURS = "nn.BatchNorm2d and ReLU, a view at a time", "five copies of the activations", "fastbyol, both views"
SIDE_BY_SIDE = "fastbyol, both views, two processes at once"
TWO_RANKS = "fastbyol, both views, two ranks"
TWO_RANKS_BY_VIEW = "fastbyol, a view at a time, two ranks"
TWO_RANKS_PLAIN = "plain operations, both views, two ranks"
_WARMUP = 1


@dataclass(frozen=True)
class Size:
    rounds: int
    batch: int = 16
    shapes: tuple[tuple[int, int], ...] = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
    """(channels, px) of each layer."""


QUICK = Size(rounds=6, batch=4)
FULL = Size(rounds=15)


def run(size: Size, *, scratch: Path) -> CaseResult:
    keep_freed_memory()  # as a run does
    copies = [(torch.empty_like(x), x.detach()) for x in _activations(size)]
    title = f"batch norm and ReLU of two views, forward and backward, {len(size.shapes)} layers, batch {size.batch} a view, {FORMAT}"
    with torch_threads(1), _second_rank(size, scratch):
        work = {
            CEILING: lambda: [out.copy_(x) for out, x in copies for _ in range(5)],
            REFERENCE: _by_view(size, lambda channels: nn.BatchNorm2d(channels)),
            OURS: _both_views(size, across_ranks=False),
            **_across_ranks(size),
        }
        subjects = subjects_of(work)
        return measured(
            "batchnorm", title, subjects, reference=REFERENCE, ceiling=CEILING, unit="step", settings=size, primary="wall", warmup=_WARMUP
        )


def _across_ranks(size: Size) -> dict[str, Callable[[], object]]:
    """Returns the work of both ranks, which must call it in the same order."""
    alone = _both_views(size, across_ranks=False)
    by_view = _by_view(size, lambda channels: ViewBatchNorm(channels, views=1, across_ranks=True))
    plain = [PlainOperations(channels) for channels, _ in size.shapes]
    return {
        SIDE_BY_SIDE: lambda: (dist.barrier(), alone(), dist.barrier()),
        TWO_RANKS: _both_views(size, across_ranks=True),
        TWO_RANKS_BY_VIEW: by_view,
        TWO_RANKS_PLAIN: _forward_backward(list(zip(plain, _activations(size), strict=True))),
    }


class PlainOperations(nn.Module):
    """Batch norm of both views over all ranks by tensor operations alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self._norm = ViewBatchNorm(channels, views=2, across_ranks=True)

    def forward(self, x: Tensor) -> Tensor:
        norm = self._norm
        normalised = cross_replica_normalise(x, norm.weight, norm.bias, eps=norm.eps, views=norm.views)
        norm.update_running(normalised)
        return normalised.output


def _both_views(size: Size, *, across_ranks: bool) -> Callable[[], object]:
    layers = [ViewBatchNorm(channels, views=2, across_ranks=across_ranks) for channels, _ in size.shapes]
    return _forward_backward(list(zip(layers, _activations(size), strict=True)))


def _by_view(size: Size, make: Callable[[int], nn.Module]) -> Callable[[], object]:
    layers = [make(channels) for channels, _ in size.shapes]
    work = [(layer, view.requires_grad_()) for layer, x in zip(layers, _activations(size), strict=True) for view in x.detach().chunk(2)]
    return _forward_backward(work)


def _forward_backward(work: Sequence[tuple[nn.Module, Tensor]]) -> Callable[[], object]:
    # The input serves as the output's gradient: some tensor of the same shape and layout.
    return lambda: [torch.autograd.backward(norm_relu(layer, x), x.detach()) for layer, x in work]


def _activations(size: Size) -> list[Tensor]:
    """Returns one batch of both views for each layer, with gradients enabled."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2 * size.batch, channels, px, px) for channels, px in size.shapes]
    return [torch.randn(s, generator=generator).to(DTYPE).contiguous(memory_format=torch.channels_last).requires_grad_() for s in shapes]


@contextmanager
def _second_rank(size: Size, scratch: Path) -> Iterator[None]:
    """Makes this process rank 0 of two inside the block; the other one follows the calls of `measure` here."""
    store = str(scratch / "store")
    other, _ = start_process(_follow, size, store, daemon=True, method="forkserver")
    try:
        _join_group(0, store)
        yield
        other.join()
    finally:
        other.kill()  # still alive only if something failed above
        dist.destroy_process_group()


def _follow(_: object, size: Size, store: str) -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    _join_group(1, store)
    work = _across_ranks(size)
    # As often as rank 0 times it: one call more or less, and both would wait for the other's message for ever.
    for _round in range(_WARMUP + size.rounds):
        for step in work.values():
            step()
    dist.destroy_process_group()


def _join_group(rank: int, store: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
