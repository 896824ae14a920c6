"""The cases `ema`, `lars` and `fused_update`: what follows a backward, apart and together, by the ways of `benchmarks/updates.py`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import updates as ways
from benchmarks.record import CaseResult, make_result, measured
from benchmarks.rivals import those_installed
from benchmarks.timing import Timings, measure, same_round_ratios, subjects_of, torch_threads
from benchmarks.updates import BY_TENSOR, CEILING, LR, RIVAL, TAU, OnlineUpdates, lars_by_tensor, solo_learn_update, target_and_online
from fastbyol.config.schema import ModelConfig
from fastbyol.optim.ema import ema_update

ANOTHER_RULE = "another rule: |g| + wd |w|"


@dataclass(frozen=True)
class Size:
    rounds: int
    calls: int = 1
    """Calls per round."""
    model: ModelConfig = field(default_factory=ModelConfig)


class Ema:
    """Measures the target's update after a step, over all parameters of encoder and projector (ResNet-50: 33.0 M in 164 tensors).

    How: float32 on one thread, tau 0.99. Reference: the equation as solo-learn writes it, one tensor at a time: a new tensor tau t + (1 -
    tau) o. Ceiling: `copy_` of the same tensors, the usual unit; it moves as many bytes as the update must (a write first reads its cache
    line). Rivals: torch's AveragedModel (swa_utils, its multi_avg function, which takes all tensors at once), and if installed lightly's
    update_momentum (by foreach) and ema-pytorch (its default loop, and its option use_foreach), the latter with its rate fixed at tau.

        python -m benchmarks.run ema

    Why: there is hardly any arithmetic, so only passes over memory count. The reference makes three temporaries per tensor, in fresh
    memory that the system has to clear first; mul_ and add_ (lightly's) pass twice; a lerp (torch's and ema-pytorch's too) passes once, as a copy
    does. It may even be faster than the copy: it loads the lines that the copy only stores to, and a CPU prefetches loads best (one flat
    array shows the same).
    """

    REFERENCE, OURS, AVERAGED = "solo-learn's loop", "fastbyol ema_update", "torch AveragedModel, multi_avg"
    LIGHTLY, PACKAGE, PACKAGE_FOREACH = "lightly update_momentum", "ema-pytorch", "ema-pytorch, use_foreach"
    QUICK, FULL = Size(rounds=9, calls=2), Size(rounds=21, calls=3)

    @classmethod
    def run(cls, size: Size, *, scratch: Path) -> CaseResult:
        follower, followed = target_and_online(size.model)
        target, online = ([parameter.detach() for parameter in network.parameters()] for network in (follower, followed))
        skipped: dict[str, str] = {}
        makers = {
            cls.AVERAGED: lambda: ways.averaged_model_update(follower, followed, TAU),
            cls.LIGHTLY: lambda: ways.lightly_update(follower, followed, TAU),
            cls.PACKAGE: lambda: ways.ema_pytorch_update(follower, followed, TAU, use_foreach=False),
            cls.PACKAGE_FOREACH: lambda: ways.ema_pytorch_update(follower, followed, TAU, use_foreach=True),
        }
        rivals = those_installed(makers, skipped)
        work = {
            CEILING: lambda: torch._foreach_copy_(target, online),
            cls.OURS: lambda: ema_update(target, online, TAU),
            cls.REFERENCE: lambda: solo_learn_update(target, online, TAU),
            **rivals,
        }
        notes = {name: "buffers of batch norm too" for name in (cls.PACKAGE, cls.PACKAGE_FOREACH)}
        subjects = subjects_of(work, calls=size.calls, notes=notes, rivals=rivals)
        title = ways.target_title(target)
        with torch_threads(1), torch.no_grad():
            # Two untimed rounds: in its first call ema-pytorch only copies.
            return measured(
                "ema", title, subjects, reference=cls.REFERENCE, ceiling=CEILING, unit="update", settings=size, warmup=2, skipped=skipped
            )


class Lars:
    """Measures one LARS step over the online network with its predictor (ResNet-50: 35.1 M in 169 tensors), gradients given.

    How: float32 on one thread; all subjects update the same parameters from the same gradients, each with its own momentum buffer.
    Reference: torch-optimizer's LARS, or the rule one tensor at a time if that is not installed; rival: lightly's. Ceiling: `copy_` of
    the parameters' bytes. The other libraries divide by |g| + wd |w|, where the official code has |g + wd w|: another rule with as many
    passes (`optim/build.py`).

        python -m benchmarks.run lars

    Why: memory bandwidth again. The rule reads w and g for the norms, then reads w, g, m and writes w, m: 7 streams where a copy has 3,
    so 2.33 x a copy is the limit of an implementation that keeps nothing in cache. Ours takes the norms and the update of a tensor close
    together, so part of w and g is still in cache. The rest of the other libraries' time goes into further passes and temporaries the
    size of the network. On a GPU, the reference's `if norm != 0` also costs two synchronisations for each of 57 weights; ours has none.
    """

    LIGHTLY, OURS = "lightly LARS", "fastbyol LARS.step"
    QUICK, FULL = Size(rounds=6), Size(rounds=21, calls=2)

    @classmethod
    def run(cls, size: Size, *, scratch: Path) -> CaseResult:
        updates = OnlineUpdates(size.model)
        skipped: dict[str, str] = {}
        makers = {
            RIVAL: lambda: updates.optimizer("torch_optimizer_lars").step,
            cls.LIGHTLY: lambda: ways.lightly_lars(updates.byol.online, lr=LR),
        }
        rivals = {BY_TENSOR: lars_by_tensor(updates.params, lr=LR), **those_installed(makers, skipped)}
        notes = {**dict.fromkeys(makers, ANOTHER_RULE), BY_TENSOR: "two host syncs a tensor"}
        work = {CEILING: updates.copy(), cls.OURS: updates.optimizer().step, **rivals}
        subjects = subjects_of(work, calls=size.calls, notes=notes, rivals=rivals)
        title, reference = ways.lars_title(updates), BY_TENSOR if RIVAL in skipped else RIVAL
        with torch_threads(1):
            # Two untimed rounds: the first step creates the momentum buffers, and only the second reads them.
            return measured(
                "lars", title, subjects, reference=reference, ceiling=CEILING, unit="step", settings=size, warmup=2, skipped=skipped
            )


@dataclass(frozen=True)
class FusedSize(Size):
    more_rounds: int = 6
    """Rounds with the other core busy, and with two threads."""


class FusedUpdate:
    """Measures everything after a backward: LARS over the online network (ResNet-50: 35.1 M in 169 tensors), then the target's update
    (33.0 M in 164).

    How: float32, gradients given, channels-last. Ours in one pass (`optimizer.step(target_update=...)`, the very call of `train_step`; the
    row keeps its name of earlier records), ours one after the other, and LARS alone. Reference: torch-optimizer's LARS (if it is not
    installed, the rule one tensor at a time), then solo-learn's loop over the target. Rival: lightly's LARS and update_momentum.
    Ceiling: `copy_` of the 35.1 M. The figures are for one thread; the last column repeats 'x ceiling' with two threads, and with one while
    another process of ours copies memory on another core, each relative to a copy under the same conditions ('x copy', medians of
    same-round ratios, wall clock).

        python -m benchmarks.run fused_update

    Why: memory bandwidth. Two separate steps read w once more than one: 10 streams, where a copy has 3, so 3.33 x a copy without a cache;
    one pass has 9, or 3.0 x. Part of w and g is still in cache after the norms, which brings the pass below that. With two threads, each
    takes the next tensor when it has finished one (`host/kernel_threads.py`): no barrier waits for a busy core, and the result is bitwise
    the same. torch's own operations, including the separate target update, use one thread (`one_thread_on_cpu`), because their many small
    parallel regions are slow on a busy machine. On a GPU the two run one after the other (not measured yet).
    """

    RIVAL, LIGHTLY = "torch-optimizer LARS, solo-learn loop", "lightly LARS, update_momentum"
    BY_TENSOR = "the rule and the equation, a tensor at a time"
    OURS = "fastbyol lars_ema"  # not renamed: `benchmarks.compare` and README find the row by it
    QUICK, FULL = FusedSize(rounds=6, more_rounds=3), FusedSize(rounds=15, more_rounds=15, calls=2)

    @classmethod
    def run(cls, size: FusedSize, *, scratch: Path) -> CaseResult:
        skipped: dict[str, str] = {}
        updates = OnlineUpdates(size.model, layout=torch.channels_last)
        makers = {cls.RIVAL: lambda: updates.solo_learn_after(updates.optimizer("torch_optimizer_lars").step), cls.LIGHTLY: updates.lightly}
        rivals = those_installed(makers, skipped)
        if cls.RIVAL in skipped:
            rivals[cls.BY_TENSOR] = updates.solo_learn_after(lars_by_tensor(updates.params, lr=LR))
        work = {
            CEILING: updates.copy(),
            cls.OURS: updates.lars_with_target(),
            "fastbyol LARS.step, then ema_update": updates.lars_then_target(),
            "fastbyol LARS.step alone": updates.optimizer().step,
            **rivals,
        }
        notes = {"fastbyol LARS.step alone": "no target", **dict.fromkeys(makers, ANOTHER_RULE)}
        subjects = subjects_of(work, calls=size.calls, notes=notes, rivals=rivals)
        with torch_threads(1):
            timings = measure(subjects, rounds=size.rounds, warmup=2)
            with _other_core_busy():
                busy = measure(subjects, rounds=size.more_rounds)
        with torch_threads(2):
            two = measure(subjects, rounds=size.more_rounds)
        title, reference = "LARS and the target's update of one step", cls.BY_TENSOR if cls.RIVAL in skipped else cls.RIVAL
        result = make_result(
            "fused_update", title, subjects, timings, reference=reference, ceiling=CEILING, unit="step", settings=size, skipped=skipped
        )
        conditions = {"x copy, two threads": two, "x copy, other core busy": busy}
        return result.with_extra({name: {label: _times_copy(timed, name) for label, timed in conditions.items()} for name in work})


def _times_copy(timings: dict[str, Timings], name: str) -> float:
    # By the wall clock: CPU time would count both threads, and not the wait for memory that the neighbour uses.
    return same_round_ratios(timings[name].ms["wall"], timings[CEILING].ms["wall"]).median


@contextmanager
def _other_core_busy() -> Iterator[None]:
    """Runs another process that repeatedly copies 128 MiB, inside the block."""
    # 128 MiB do not fit in any cache, so the neighbour takes memory bandwidth, which limits these updates.
    code = "import numpy; a = numpy.zeros(1 << 24); b = a.copy()\nwhile True: b[:] = a"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        process.kill()
        process.wait()
