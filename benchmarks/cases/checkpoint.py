"""Measures a checkpoint of BYOL (ResNet-50: online, target, momentum, 412 MB): how long training pauses, and the total cost.

How: the product's `CheckpointWriter.save`, which copies and returns, then the wait for its thread, which checks that all values are
finite, writes, hashes, flushes to the disk and renames; nothing trains meanwhile. Reference: the same file written by the training
thread itself, as in trainers that call torch.save. Ceiling: `copy_` of the tensors. Then optimizer steps alone, and as many with a
checkpoint started among them: the difference is the total cost, including the writer's share of cores and memory bandwidth.

    python -m benchmarks.run checkpoint

Why: the copy is one pass over memory into buffers that are reused, so the pause is a copy and some bookkeeping per tensor. The rest
runs beside the steps: a pass that looks for NaN, torch.save's own checksum, SHA-256 and the disk. The notes give the share of the
time between two checkpoints (500 of the steps measured here, the default) for the pause alone and for everything beside the steps (2
% is allowed for the pause), and how short a step may become before the pause exceeds it. On a GPU the copy goes into pinned memory
(not measured yet).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from benchmarks.record import CaseResult, make_result
from benchmarks.timing import measure, subjects_of, torch_threads
from benchmarks.training_step import TrainingStep
from fastbyol.config.schema import ModelConfig, PrecisionConfig, TrainConfig
from fastbyol.config.views import ViewPair
from fastbyol.run.checkpoint import save_checkpoint
from fastbyol.run.checkpoint_writer import CheckpointWriter, copy_to_host

REFERENCE, CEILING, STALL = "written by the training thread", "copy_", "CheckpointWriter.save: training stands still"
WRITTEN, ALONE, BESIDE = "then in its thread, until it is durable", "steps alone", "as many steps, a checkpoint begun before them"
ALLOWED_PERCENT = 2
NUM_CLASSES = 10


@dataclass(frozen=True)
class Size:
    rounds: int
    model: ModelConfig = field(default_factory=ModelConfig)
    size_px: int = 64
    batch: int = 4
    steps: int = 4
    """Steps per call of the last two subjects, enough to outlast the writing."""
    threads: int = 1


QUICK = Size(rounds=6, model=ModelConfig(encoder="resnet8"), batch=2)
FULL = Size(rounds=11)


def run(size: Size, *, scratch: Path) -> CaseResult:
    with torch_threads(size.threads), CheckpointWriter(scratch / "thread", keep=2) as writer:
        views = ViewPair(size_px=size.size_px)
        config = TrainConfig(global_batch=size.batch, model=size.model, precision=PrecisionConfig(autocast="off"), views=views)
        step = TrainingStep(config, num_classes=NUM_CLASSES)
        step.run_on_noise()  # creates the momentum buffers

        def state() -> dict[str, object]:
            return {"step": 1, **step.state()}

        def beside() -> None:
            writer.save(state(), step=1)  # then both work: what the writer takes from the cores and the memory shows in the steps
            step.run_on_noise(size.steps)
            writer.wait()

        copy = copy_to_host(state())
        work = {
            CEILING: lambda: copy_to_host(state(), into=copy),
            STALL: lambda: writer.save(state(), step=1),
            # After STALL in every round, so it waits for the file that was begun there.
            WRITTEN: writer.wait,
            REFERENCE: lambda: save_checkpoint(scratch / "here", step=1, state=state(), keep=2),
            ALONE: lambda: step.run_on_noise(size.steps),
            BESIDE: beside,
        }
        subjects = subjects_of(work, notes={ALONE: f"{size.steps} steps of {size.batch} images at {size.size_px} px"})
        timings = measure(subjects, rounds=size.rounds)
        megabytes = sum(file.stat().st_size for file in (scratch / "here").rglob("*.pt")) / 1e6
    title = f"a checkpoint of {size.model.encoder}, {megabytes:.0f} MB"
    meaning = {"unit": "checkpoint", "threads": size.threads, "primary": "wall"}
    result = make_result("checkpoint", title, subjects, timings, reference=REFERENCE, ceiling=CEILING, settings=size, **meaning)
    stalls, alone, both = (timings[name].ms["wall"] for name in (STALL, ALONE, BESIDE))
    step_ms, every = median(alone) / size.steps, config.checkpoint_every
    stall = {
        f"% of the {every} steps between two": 100 * median(stalls) / (every * step_ms),
        "of ms each": step_ms,
        f"{ALLOWED_PERCENT} % where a step takes ms": median(stalls) / (ALLOWED_PERCENT / 100 * every),
    }
    # Differences within a round, because the writer's cost is small beside what a busy machine adds to the steps.
    more_ms = median(b - a for a, b in zip(alone, both, strict=True))
    return result.with_extra({STALL: stall, BESIDE: {f"% more for {every} steps": 100 * more_ms / (every * step_ms)}})
