"""Lists the candidates worth trying: threads, batches, precisions, queues. Pure functions of the machine's numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch

from fastbyol.byol import NUM_VIEWS
from fastbyol.config.schema import UPDATES, PrecisionConfig
from fastbyol.run.precision import why_nothing_compiles

Value = TypeVar("Value")
AUTOCAST = {"cuda": ("bf16", "fp16", "off"), "cpu": ("bf16", "off")}
"""fp16 needs a gradient scaler, which a run has on a GPU only."""
SMALLEST_RANK_BATCH = 16
INDEX_LIMIT = 2**31
PREFETCH = (2, 4, 8)
"""Numbers of batches made ahead, ascending, because batches cost memory and the first of equally fast candidates is taken."""
COMPILE_NEEDS_S = 30.0
"""torch.compile of the networks takes a minute or more: not worth it for a quick look."""
AUTOTUNE_NEEDS_S = 120.0
"""max-autotune times kernels while it compiles, for several minutes."""
COMPILE_MODES = {"cuda": ("default", "reduce-overhead", "max-autotune"), "cpu": ("default", "max-autotune")}
"""The modes in order of preference; reduce-overhead means CUDA graphs."""
FEED_MARGIN = 1.25
"""Factor by which a loader should be faster than the step: decoding times vary, and the step should never wait."""


def worker_counts(cores: int) -> list[int]:
    """Returns 1, 2, 4, ... and the number of cores."""
    return sorted({2**power for power in range(cores.bit_length()) if 2**power <= cores} | {max(1, cores)})


def rank_batches(share: int, *, most: int) -> list[int]:
    """Returns batch sizes up to `most` that divide a rank's share of the global batch: powers of two from `SMALLEST_RANK_BATCH` on, and the
    share itself; if none is that small, the largest divisor that is.
    """
    powers = [2**power for power in range(share.bit_length()) if 2**power >= SMALLEST_RANK_BATCH and share % 2**power == 0]
    fitting = sorted(batch for batch in {*powers, share} if batch <= most)
    return fitting or [next(batch for batch in range(most, 0, -1) if share % batch == 0)]


def most_images(activation: int) -> int:
    """Returns how many images of both views, each with this many numbers in its largest activation, stay below 2^31 numbers."""
    # Beyond that, kernels that count in 32 bits overflow, and cuDNN and Triton switch to slower ones.
    return max(1, (INDEX_LIMIT - 1) // (NUM_VIEWS * activation))


def precisions(own: PrecisionConfig, *, device: str, kept: frozenset[str], bf16: bool = True) -> dict[str, PrecisionConfig]:
    """Returns each number format in both memory layouts by name, the config's own first; options in `kept` stay as they are.

    bf16: False for a CPU on which `bf16` computes in float32 as `off` does, so that there is nothing to choose.
    """
    formats = [own.autocast] if "precision.autocast" in kept or not bf16 else own_first(own.autocast, AUTOCAST[device])
    layouts = [own.channels_last] if "precision.channels_last" in kept else own_first(own.channels_last, (True, False))
    return {
        f"{autocast} {'channels_last' if layout else 'channels_first'}": replace(own, autocast=autocast, channels_last=layout)
        for autocast in formats
        for layout in layouts
    }


def eager(own: PrecisionConfig) -> PrecisionConfig:
    """Returns the same precision without torch.compile and its options."""
    return replace(own, compile="no", compile_mode="default", compile_cache="")


def compiled(own: PrecisionConfig, *, device: str, seconds: float, kept: frozenset[str], accumulate: int) -> dict[str, PrecisionConfig]:
    """Returns ways to compile by name, the config's own mode first.

    Other modes are left out where they take too long for `seconds`, and CUDA graphs where a step has several micro-batches, for which `train`
    refuses them.
    """
    modes = own_first(own.compile_mode, COMPILE_MODES[device])
    if "precision.compile_mode" in kept:
        modes = [own.compile_mode]
    elif seconds < AUTOTUNE_NEEDS_S:
        modes = [own.compile_mode, *(mode for mode in modes[1:] if mode != "max-autotune")]
    if accumulate > 1:
        modes = [mode for mode in modes if mode == own.compile_mode or mode != "reduce-overhead"]
    return {step_name(variant): variant for variant in (replace(own, compile="yes", compile_mode=mode) for mode in modes)}


def step_name(precision: PrecisionConfig) -> str:
    """Returns 'eager', or the mode it is compiled in."""
    return f"compiled, {precision.compile_mode}" if precision.compile == "yes" else "eager"


def updates(own: str) -> list[str]:
    """Returns the values of optim.update that differ on a GPU, the config's own first; auto is foreach there."""
    same = "auto" if own == "foreach" else "foreach"
    return [update for update in own_first(own, UPDATES) if update != same]


def reason_not_to_compile(device: torch.device, *, seconds: float) -> str | None:
    """Returns why torch.compile is not worth a try, or None if it is."""
    if seconds < COMPILE_NEEDS_S:
        return f"not tried, because it takes minutes (--seconds {COMPILE_NEEDS_S:g} or more)"
    reason = why_nothing_compiles(device)
    return f"no compiler works here ({reason})" if reason else None


def workers_to_feed(rates: Mapping[int, float], *, step_rate: float) -> int:
    """Returns the fewest loader threads that feed a step of `step_rate` images per second, with `FEED_MARGIN` to spare.

    `rates`: images per second of the loader alone, by threads.
    """
    wanted = FEED_MARGIN * step_rate
    enough = [workers for workers, rate in sorted(rates.items()) if rate >= wanted]
    if enough:
        return enough[0]
    # Each thread beyond those measured is assumed to add as much as they do on average.
    most = max(rates)
    return math.ceil(wanted / (rates[most] / most))


def doubled_batches(first: int, *, most: int) -> list[int]:
    """Returns first, twice that, and so on up to `most`, which is always the last."""
    return sorted({*(first * 2**power for power in range(most.bit_length()) if first * 2**power < most), most})


def own_first(own: Value, values: tuple[Value, ...]) -> list[Value]:
    """Returns the values with the config's own in front."""
    # Of equally fast candidates the first is taken, so nothing changes without a gain.
    return [own, *(value for value in values if value != own)]
