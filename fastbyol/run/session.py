"""The session of a run: what is open as long as the training loop goes on, so that the loop in train.py shows the method only."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Self

import fastbyol
from fastbyol.config.errors import Diverged, UserError
from fastbyol.config.plain import flatten, to_plain
from fastbyol.config.schema import TrainConfig
from fastbyol.host.signals import StopRequest
from fastbyol.ranks.process_group import Process, broadcast_from_main
from fastbyol.ranks.stop_vote import StopVote, Verdict
from fastbyol.run.checkpoint import check_resume, checkpoint_path, checkpoint_steps, mend_config, require_room
from fastbyol.run.checkpoint_writer import CheckpointWriter
from fastbyol.run.folder import CONFIG_FILE, DIVERGED_FILE, check_run_folder, locked_run_folder, note_divergence, open_run_folder
from fastbyol.run.hang_watch import HangWatch
from fastbyol.run.log import RunLog
from fastbyol.run.mirror import Mirror, MirrorWriter
from fastbyol.run.next_command import after_training
from fastbyol.run.plan import RunPlan
from fastbyol.run.precision import is_compiled
from fastbyol.run.profiling import StepProfiler
from fastbyol.run.state import TrainState
from fastbyol.run.wandb_log import check_wandb

log = logging.getLogger("fastbyol")
_CLASSES = ("without labels", "of one class")
COMPILE_S = 3600.0
"""Time for the first step where it compiles: max-autotune on few cores takes longer than timeout_s."""


def check_run(config: TrainConfig) -> Mirror | None:
    """Checks on rank 0, before any work, that the run can be stored and logged, and returns its mirror. Raises UserError if not."""
    mend_config(Path(config.out))
    check_run_folder(config)
    mirror = Mirror(config) if config.mirror else None
    check_resume(config, mirrored=mirror.steps if mirror else ())
    if mirror:
        mirror.check_writable()
    check_wandb(config)
    return mirror


class Session:
    """Context manager that locks the run folder, restores the newest checkpoint, and then logs, saves and watches the run.

    Every rank has one and calls the same methods at the same steps. Only rank 0 writes, and has a mirror if the config names one.

    Attributes:
        first_step: step at which this process starts. done: optimizer steps taken, of the whole run.
        stopping: True once any rank was asked to stop; equal on all ranks.
    """

    def __init__(
        self, config: TrainConfig, process: Process, state: TrainState, plan: RunPlan, stop: StopRequest, mirror: Mirror | None
    ) -> None:
        self._config, self._process, self._state, self._plan, self._stop = config, process, state, plan, stop
        self._mirror = mirror
        self._folder = Path(config.out)
        self._writer: CheckpointWriter | None = None
        self._log: RunLog | None = None
        self.stopping = False

    def __enter__(self) -> Self:
        config, process, plan = self._config, self._process, self._plan
        with ExitStack() as leaving:
            # Locked before anything is read: a job that was told to stop may still be saving into this folder.
            kept: dict[str, Any] = {"keep": config.keep_checkpoints, "stays": plan.stays}
            if process.is_main:
                leaving.enter_context(locked_run_folder(open_run_folder(config)))
                if self._mirror:
                    self._mirror.bring_newest(self._folder)
                    # Entered before the hang watch: the last copy may take longer than a step.
                    kept["saved"] = leaving.enter_context(MirrorWriter(self._mirror, self._folder, **kept)).add
            self.first_step = self.done = self._state.restore(self._folder, config=config, process=process)
            if process.is_main and self.first_step < plan.total_steps:
                require_room(self._folder, self._state.byol.state_dict())
            self._announce()
            # Entered before the writer and the log, so that it still watches while they are being closed.
            compiles = is_compiled(self._state.byol) or process.device.type == "cuda"  # a GPU always compiles the augmentation
            self._hang_watch = leaving.enter_context(HangWatch(config.timeout_s, first_s=COMPILE_S if compiles else 0.0))
            if process.is_main:
                (self._folder / DIVERGED_FILE).unlink(missing_ok=True)
                self._writer = leaving.enter_context(CheckpointWriter(self._folder, **kept))
                self._log = leaving.enter_context(RunLog(self._folder, config, total_steps=plan.total_steps, first_step=self.first_step))
            # A compiled graph has no parts that a trace could name.
            parts = {} if is_compiled(self._state.byol) else dict(self._state.byol.named_children())
            steps = config.profile_steps if process.is_main else 0
            self._profiler = leaving.enter_context(StepProfiler(self._folder, steps=steps, parts=parts, device=process.device))
            self._vote = StopVote(rank=process.rank, world_size=process.world_size)
            # Last, so that its threads end before the last checkpoint is waited for.
            leaving.enter_context(self._state.loader)
            self._leaving = leaving.pop_all()
        return self

    def __exit__(self, *error: Any) -> bool | None:
        try:
            if isinstance(error[1], UserError):
                self._save_before_error()
            return self._leaving.__exit__(*error)
        except Diverged as found:  # from the checkpoint writer, which found weights that are not finite
            error = (type(found), found, found.__traceback__)
            raise
        finally:
            if self._process.is_main and isinstance(error[1], Diverged):
                note_divergence(self._folder, str(error[1]))

    def _save_before_error(self) -> None:
        """Saves the last step where bad data end the run, so that nothing is lost. Other ranks wait inside a step, so one process only; and
        within a step of several micro-batches the loader is no longer at the step's beginning.
        """
        if self._process.world_size == self._state.accumulate == 1 and self.first_step < self.done not in self.saved_steps():
            self.save()
            log.info("saved after step %d, from which the same command continues", self.done)

    def end_step(self, done: int) -> None:
        """Reports that `done` steps are taken, and learns what the other ranks reported after the step before.

        Raises Diverged if a loss was not finite on some rank; nothing of that step is saved.
        """
        self.done = done
        self._hang_watch.beat()
        self._profiler.step()
        # Before a record or a checkpoint the ranks wait for each other's verdict on this very step, so that neither holds a bad one.
        settle = self._plan.logs(done) or self._plan.saves(done)
        # On a GPU the loss is read only where the host waits for the device anyhow.
        bad_step = self._state.finite.first_bad_step() if settle or self._process.device.type == "cpu" else None
        verdict = self._vote.cast(stop=self._stop.requested, bad_step=bad_step, settle=settle)
        if verdict.bad_step is not None:
            raise self._diverged(verdict)
        self.stopping = verdict.stop
        if self._log is not None:
            self._log.estimate(done)

    def log(self, record: dict[str, Any]) -> None:
        """Writes one record to the run's logs."""
        if self._log is not None:
            self._log.write(record)

    def save(self) -> None:
        """Saves the state after the last step. The step waits for a copy in memory, not for the disk."""
        snapshot = self._state.snapshot(step=self.done, config=self._config, process=self._process)
        # The snapshot above is a collective, so every rank takes it, although only rank 0 writes.
        if self._writer is not None:
            self._writer.save(snapshot, step=self.done)

    def saved_steps(self) -> list[int]:
        """Returns the steps of the run's checkpoints, after waiting for one that is being written."""
        if self._writer is not None:
            self._writer.wait()
        return checkpoint_steps(self._folder)

    def paused(self) -> AbstractContextManager[None]:
        """Lets the block take longer than `timeout_s`."""
        return self._hang_watch.paused()

    def end(self) -> bool:
        """Waits for the other ranks and returns True if the run is complete. Call it after leaving the context."""
        broadcast_from_main(None)  # launchers end all ranks when one exits, so none may exit before rank 0 has saved
        total_steps, name = self._plan.total_steps, self._stop.name or "another rank"
        if self.done < total_steps:
            text = "stopped (%s): saved after step %d of %d; the same command continues the run in %s"
            log.info(text, name, self.done, total_steps, self._folder)
            return False
        following = after_training(self._config, labelled=self._num_classes > 1)
        log.info("complete: all %d steps, in %s; next: %s", total_steps, checkpoint_path(self._folder, self.done), following)
        return True

    @property
    def _num_classes(self) -> int:
        """Number of classes that have a training image."""
        return sum(count > 0 for count in self._state.loader.class_counts().values())

    def _diverged(self, verdict: Verdict) -> Diverged:
        steps, scaler = self.saved_steps(), self._state.scaler
        last = f"the last good checkpoint is {checkpoint_path(self._folder, steps[-1])}" if steps else "there is no checkpoint yet"
        scale = f", loss scale {scaler.get_scale():g}" if scaler.is_enabled() else ""
        step = self.first_step + (verdict.bad_step or 0)
        return Diverged(
            f"the loss is not finite in step {step + 1} on rank {verdict.bad_rank} (lr {self._plan.lr(step):.4g}{scale}): the run diverged; "
            f"lower optim.base_lr, lengthen optim.warmup_epochs, or set precision.autocast to off. Nothing of that step was saved: {last}"
        )

    def _announce(self) -> None:
        """Logs what is about to run, so that an old installed copy, a wrong data set or a wrong batch is seen in the first lines."""
        config, loader, total_steps = self._config, self._state.loader, self._plan.total_steps
        log.info("fastbyol %s from %s", fastbyol.__version__, Path(fastbyol.__file__).parent)
        defaults = flatten(to_plain(TrainConfig()))
        chosen = [f"{name}={value}" for name, value in flatten(to_plain(config)).items() if value != defaults[name]]
        log.info("config, all of it in %s: %s", self._folder / CONFIG_FILE, " ".join(chosen))
        classes = (
            f"of {len(loader.class_names)} classes" if self._num_classes > 1 else f"{_CLASSES[self._num_classes]}, so the probe is off"
        )
        log.info("%s: %d images %s, backend %s", config.data.train, loader.num_samples, classes, loader.backend)
        ranks, accumulate = self._process.world_size, self._state.accumulate
        each = config.global_batch // (ranks * accumulate)
        batch = f"global batch {config.global_batch} = {ranks} ranks x {accumulate} micro-batches x {each} images"
        log.info("%d x %s: %s; %d steps", ranks, self._process.device, batch, total_steps)
        warmup_steps = self._plan.warmup_steps
        if warmup_steps >= total_steps:
            unit = "steps" if config.optim.warmup_steps else "epochs"
            warmup = config.optim.warmup_steps or config.optim.warmup_epochs
            log.warning("optim.warmup_%s = %g: with %d steps the learning rate never reaches its peak", unit, warmup, total_steps)
        if self.first_step >= total_steps:
            log.info("already complete at step %d", self.first_step)
        elif self.first_step:
            restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            log.info("continues after step %d%s", self.first_step, f" (restart {restart})" if restart != "0" else "")
