"""Writes checkpoints in a thread, so the training step waits for a copy in memory but not for the disk."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from fastbyol.config.errors import Diverged, NotSaved
from fastbyol.run.checkpoint import CheckpointError, checkpoint_path, checkpoint_steps, save_checkpoint, sweep_unfinished
from fastbyol.run.finite_check import first_not_finite

log = logging.getLogger("fastbyol")


class CheckpointWriter:
    """Writes one checkpoint at a time in the background; leaving the context waits for the last one.

    A failed write is logged; earlier checkpoints and the training are not affected. `keep` and `stays` say what `save_checkpoint` keeps;
    `saved` is called with the step of each that is written. Nothing else may write to the run folder.
    """

    def __init__(
        self,
        run: Path,
        *,
        keep: int,
        stays: Callable[[int], bool] = lambda step: False,
        saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.run, self.keep, self.stays, self.saved = run, keep, stays, saved
        self._copy: Any = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fastbyol-checkpoint")
        self._pending: Future[Exception | None] | None = None
        sweep_unfinished(run)

    def save(self, state: dict[str, Any], *, step: int) -> None:
        """Waits for the last write, then copies the state, which may change from then on; the copy is written after this returns."""
        self.wait()
        # The previous copy is on the disk by now, so its memory can be overwritten.
        self._copy = copy_to_host(state, into=self._copy)
        self._pending = self._pool.submit(self._write, self._copy, step)

    def wait(self) -> Exception | None:
        """Waits until no write is in progress; returns the error of the last one, or None."""
        return self._pending.result() if self._pending is not None else None

    def close(self) -> None:
        """Waits for the last checkpoint. Raises NotSaved if it could not be written, Diverged if it held a tensor that is not finite."""
        error = self.wait()
        self._pool.shutdown()
        if isinstance(error, Diverged):
            raise error
        if error is not None:
            where = "continues from the newest" if checkpoint_steps(self.run) else "starts anew"
            raise NotSaved(f"{error}. After that the same command {where}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:  # another error is already being reported
            self.wait()
            self._pool.shutdown()

    def _write(self, state: dict[str, Any], step: int) -> Exception | None:
        """Runs in the thread. Logs and returns the error, if any, because training goes on."""
        try:
            if where := first_not_finite({name: state[name] for name in ("byol", "optimizer") if name in state}):
                raise Diverged(
                    f"{where} is not finite after step {step}, so it was not saved; the checkpoints after steps {checkpoint_steps(self.run)} are good"
                )
            save_checkpoint(self.run, step=step, state=state, keep=self.keep, stays=self.stays)
            self.saved(step)
        except (CheckpointError, Diverged) as error:
            log.warning("%s", error)
            return error
        except Exception as error:
            log.exception("checkpoint %s was not written; training goes on", checkpoint_path(self.run, step))
            return error
        return None


def copy_to_host(state: Any, *, into: Any = None) -> Any:
    """Copies nested dicts and lists with their tensors to the host, keeping memory layouts; reuses tensors of an earlier copy that fit."""
    # Allocating fresh pages would cost more than the copy itself.
    copied = _copied(state, into)
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # copies to pinned memory are asynchronous
    return copied


def _copied(state: Any, into: Any) -> Any:
    if isinstance(state, Tensor):
        tensor = state.detach()
        fits = isinstance(into, Tensor) and (into.shape, into.dtype, into.stride()) == (tensor.shape, tensor.dtype, tensor.stride())
        target = into if fits else torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return target.copy_(tensor, non_blocking=True)
    if isinstance(state, dict):
        return {key: _copied(value, into.get(key) if isinstance(into, dict) else None) for key, value in state.items()}
    if isinstance(state, list | tuple):
        earlier = into if isinstance(into, list | tuple) and len(into) == len(state) else [None] * len(state)
        return type(state)(_copied(value, before) for value, before in zip(state, earlier, strict=True))
    return state
