"""Shows whether the run is learning and how fast: averages over the logging interval, throughput, norms, and signs of collapse.

Nothing here reads from the device except `Monitor.record`, which is called on logged steps only and reads once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastbyol.byol import BYOLOutput
from fastbyol.config.schema import TrainConfig
from fastbyol.monitors.collapse import SIGNS, CollapseRule, collapse_signs
from fastbyol.monitors.compute import ComputeMeter, peak_memory_gib
from fastbyol.monitors.stopwatch import Stopwatch
from fastbyol.ranks.process_group import Process, all_reduce_mean

MEANS = ("loss", "alignment", "probe_loss", "probe_correct", "labelled")
NORMS = ("gradient_norm", "update_norm")


class Monitor:
    """Collects the outputs of every step, as sums on the device, and turns them into one record per logged step."""

    def __init__(
        self,
        *,
        global_batch: int,
        world_size: int,
        device: torch.device,
        compute: ComputeMeter | None = None,
        collapse: CollapseRule | None = None,
    ) -> None:
        self.global_batch, self.world_size = global_batch, world_size
        self._device, self._compute, self._collapse = device, compute, collapse
        self._sums = torch.zeros(len(MEANS), device=device)
        self._norms = StepNorms()
        self._stopwatch = Stopwatch(device)
        self._logged = False
        self._reset()

    def _reset(self) -> None:
        self._sums.zero_()
        self._stopwatch.reset()
        self._micro_batches, self._steps = 0, 0
        self._start = time.perf_counter()

    def start_step(self, *, logged: bool) -> None:
        """Marks the start of a step. `logged` says whether a record follows it: norms are computed only then."""
        self._logged = logged

    def waiting(self) -> AbstractContextManager[None]:
        """Counts the time inside the block as waiting for data."""
        return self._stopwatch.waiting()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside the block: it is neither training nor waiting."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def add(self, output: BYOLOutput) -> None:
        """Adds the output of one micro-batch."""
        # The probe's figures are sums over labelled images, divided in `record`: micro-batches may have few of them, or none. NaN, which does not
        # equal itself, stands for unlabelled.
        correct = output.probe_correct.float()
        labelled = (correct == correct).float().mean()
        values = (output.loss, output.alignment, output.probe_loss * labelled, correct.nan_to_num().mean(), labelled)
        self._sums += torch.stack([v.detach().float() for v in values])
        self._micro_batches += 1

    def gradients_ready(self, online: nn.Module) -> None:
        """Marks that the step's gradients are complete: reduced over ranks, unscaled, not yet used. Norms are those of `online`."""
        self._stopwatch.gradients_ready()
        if self._logged:
            self._norms.before_update(online.parameters())

    def step(self) -> None:
        """Marks the end of one optimizer step."""
        self._norms.after_update()
        self._stopwatch.step_done()
        self._steps += 1

    def record(self, *, step: int, epoch: float, lr: float, tau: float, last: BYOLOutput) -> dict[str, Any]:
        """Returns the record of the interval since the last one. Every rank must call it."""
        read = self._read(last)
        alarm = None
        if self._collapse is not None:
            alarm = self._collapse.check(step=step, epoch=epoch, alignment=read["alignment"], projection_std=read["projection_std"])
        record = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": read["loss"],
            # Unknown where no image has a label that the probe can learn from.
            "probe_loss": read["probe_loss"] / read["labelled"] if read["labelled"] else None,
            "probe_top1": read["probe_correct"] / read["labelled"] if read["labelled"] else None,
            "lr": lr,
            "tau": tau,
            # Infinite in a step that fp16's gradient scaler skips, and JSON has no infinity.
            **{name: read[name] if math.isfinite(read[name]) else None for name in NORMS},
            **self._speed(),
            **{name: read[name] for name in ("alignment", *SIGNS)},
            "alarm": alarm,
        }
        self._reset()
        return record

    def stop_when_collapsed(self, checkpoint_steps: Callable[[], Sequence[int]]) -> None:
        """Ends the run if `CollapseRule.stop_when_due` does; every rank calls it, after the record is written."""
        if self._collapse is not None:
            self._collapse.stop_when_due(checkpoint_steps)

    def _read(self, last: BYOLOutput) -> dict[str, float]:
        """Reads all values from the device, with one message between ranks and one read."""
        unknown = torch.full((), math.nan, device=self._device)
        norms = [n if n is not None else unknown for n in self._norms.take()]
        values: list[Tensor] = [self._sums / max(self._micro_batches, 1), torch.stack(norms), collapse_signs(last.projection, last.feature)]
        read = all_reduce_mean(torch.cat([v.to(self._device, torch.float32) for v in values])).tolist()
        return dict(zip((*MEANS, *NORMS, *SIGNS), read, strict=True))

    def _speed(self) -> dict[str, float | None]:
        elapsed_s = max(time.perf_counter() - self._start, 1e-9)
        images_per_s = self._steps * self.global_batch / elapsed_s
        per_device = images_per_s / self.world_size
        forward_backward_ms, update_ms = self._stopwatch.split_ms()
        return {
            "images_per_s": images_per_s,
            "images_per_s_per_device": per_device,
            "data_wait_share": min(self._stopwatch.wait_s / elapsed_s, 1.0),
            "data_wait_ms": 1000 * self._stopwatch.wait_s / max(self._steps, 1),
            "forward_backward_ms": forward_backward_ms,
            "update_ms": update_ms,
            **(self._compute.rates(images_per_s_per_device=per_device) if self._compute else {}),
            "memory_gib": peak_memory_gib(self._device),
        }


def build_monitor(config: TrainConfig, process: Process) -> Monitor:
    """Builds the monitor of a run, with everything it can measure."""
    return Monitor(
        global_batch=config.global_batch,
        world_size=process.world_size,
        device=process.device,
        compute=ComputeMeter(config, device=process.device) if process.is_main else None,
        collapse=CollapseRule(config),
    )


class StepNorms:
    """Norms over all parameters for one step, as tensors on their device; nothing is read back here.

    Meant for logged steps only. The two norms cost three passes over the weights (copy, difference, norm) and one over the gradients;
    taken only once in `log_every` steps this is cheap, and the norm of one step is as informative as a mean of ten.
    """

    def __init__(self) -> None:
        self.gradient: Tensor | None = None
        self.update: Tensor | None = None
        self._parameters: list[Tensor] = []
        self._before: list[Tensor] = []

    @torch.no_grad()
    def before_update(self, parameters: Iterable[Tensor]) -> None:
        """Records the gradient's norm and copies the weights; call it between the last backward and the optimizer."""
        self._parameters = [p for p in parameters if p.grad is not None]
        self.gradient = global_norm([p.grad for p in self._parameters if p.grad is not None])
        if [b.shape for b in self._before] != [p.shape for p in self._parameters]:
            self._before = [torch.empty_like(p) for p in self._parameters]
        torch._foreach_copy_(self._before, self._parameters)

    @torch.no_grad()
    def after_update(self) -> None:
        """Computes the norm of the weight change, after the optimizer; does nothing unless `before_update` was called in this step."""
        if not self._parameters:
            return
        torch._foreach_sub_(self._before, self._parameters)
        self.update = global_norm(self._before)
        if self._parameters[0].is_cuda:
            # On a GPU memory is scarce and quick to allocate; on the CPU allocating fresh pages costs as much as the copy, so keep them.
            self._before = []
        self._parameters = []

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """Returns the norms of the gradient and of the update since the last call, or None for each that was not taken."""
        taken = self.gradient, self.update
        self.gradient = self.update = None
        return taken


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the 2-norm over all elements of all tensors as a scalar on their device; 0 for no tensors."""
    if not tensors:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))
