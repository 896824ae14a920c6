"""Number formats and memory layout of the step: autocast, gradient scaler, channels-last, torch.compile."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fastbyol.config.errors import UserError, first_line, require
from fastbyol.config.schema import PrecisionConfig
from fastbyol.host.compile_cache import give_inductor_a_cache, why_not_writable
from fastbyol.host.cores import default_workers
from fastbyol.models.encoder import pad_stem
from fastbyol.ranks.process_group import gather_everywhere

log = logging.getLogger("fastbyol")
MOST_COMPILE_THREADS = 32
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(config: PrecisionConfig, *, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Returns the autocast context for the forward pass; parameters and the target stay float32."""
    dtype = input_dtype(config, device=device)
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def input_dtype(config: PrecisionConfig, *, device: torch.device) -> torch.dtype:
    """Returns the number format that the networks' first layer converts its input to: float32 for bf16 on a CPU that is slower with it."""
    if config.autocast == "bf16" and not is_bf16_fast(device):
        return torch.float32
    return _DTYPES.get(config.autocast, torch.float32)


@functools.cache
def is_bf16_fast(device: torch.device) -> bool:
    """Returns False for a CPU whose bfloat16 convolutions oneDNN computes one by one (x86 without AVX-512: eight times as long as float32)."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def build_scaler(config: PrecisionConfig, *, device: torch.device) -> torch.amp.GradScaler:  # type: ignore[name-defined]
    """Returns a gradient scaler, enabled for fp16 only: the smallest gradients would be 0 in its narrow range."""
    if config.autocast == "fp16" and device.type == "cpu":
        raise UserError("precision.autocast = 'fp16': needs a GPU; use bf16 (the default) or off")
    return torch.amp.GradScaler(device.type, enabled=config.autocast == "fp16")  # type: ignore[attr-defined]


def prepare_model(module: nn.Module, config: PrecisionConfig, *, device: torch.device) -> nn.Module:
    """Moves the module to its device and memory layout, and compiles it in place if the config says so; call it before DDP wraps it.

    Sets this process's switches (`use_switches`); on a CPU, sets what happens to freed memory. Raises
    UserError for what `check_compile` refuses, for options of a GPU on a CPU and the reverse, and for a cache folder that cannot be written.
    """
    _check_device(config, device)
    check_compile(config, device=device)
    use_switches(config)
    if config.autocast == "bf16" and not is_bf16_fast(device):
        log.warning("precision.autocast = 'bf16': this CPU has no instructions for it, so the networks compute in float32, which is faster")
    if device.type == "cpu":
        manage = keep_freed_memory if config.freed_memory == "keep" else return_large_blocks
        manage()
    if config.pad_stem:
        pad_stem(module)
    module = module.to(device)
    if config.channels_last:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    whole = resolved(config, device=device).compile == "yes"
    if whole or device.type == "cuda":
        _compile(module if whole else None, config, device=device)
    return module


def _check_device(config: PrecisionConfig, device: torch.device) -> None:
    """Raises UserError for options that have no effect on this device."""
    if device.type != "cuda":
        if config.autocast == "tf32":
            raise UserError(
                f"precision.autocast = 'tf32': a number format of CUDA's tensor cores, and the device is {device}; use bf16 or off"
            )
        if config.cudnn_benchmark:
            raise UserError(f"precision.cudnn_benchmark = true: cuDNN needs a GPU, and the device is {device}; leave it out")
    if device.type != "cpu" and config.freed_memory != "keep":
        raise UserError(
            f"precision.freed_memory = {config.freed_memory!r}: only for runs on a CPU, and the device is {device}; leave it out"
        )


def fitted(config: PrecisionConfig, *, device: torch.device, announce: Callable[[str], None]) -> PrecisionConfig:
    """Returns a run's precision for work on another kind of device, without the options that mean nothing there; announces those, if any."""
    compiled = resolved(config, device=device).compile == "yes"
    cpu = device.type == "cpu"
    without = {
        "autocast": "off" if cpu and config.autocast in ("fp16", "tf32") else config.autocast,
        "cudnn_benchmark": config.cudnn_benchmark and not cpu,
        "compile_mode": config.compile_mode if compiled and not (cpu and config.compile_mode == "reduce-overhead") else "default",
        "compile_cache": config.compile_cache if compiled or not cpu else "",
        "freed_memory": config.freed_memory if cpu else "keep",
    }
    if changed := [name for name, value in without.items() if value != getattr(config, name)]:
        options = ", ".join(f"precision.{name} {getattr(config, name)}" for name in changed)
        announce(f"the run's {options}: without effect on this device ({device.type}), so left out here")
    return replace(config, **without)


def use_switches(config: PrecisionConfig) -> None:
    """Sets two switches of the whole process: TF32 in float32 products, and cuDNN's search for algorithms.

    Code that takes steps of several configs in turn must call it before each.
    """
    tf32 = config.autocast == "tf32"
    # Both are set, for torch's own defaults disagree: TF32 is off in matrix products and on in cuDNN's convolutions.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = config.cudnn_benchmark


def resolved(config: PrecisionConfig, *, device: torch.device) -> PrecisionConfig:
    """Returns the precision with the compile that `auto` means on this device: yes on a GPU, no on a CPU."""
    return replace(config, compile="yes" if device.type == "cuda" else "no") if config.compile == "auto" else config


def check_compile(config: PrecisionConfig, *, device: torch.device, accumulate: int = 1) -> None:
    """Raises UserError for options of the compiler that have no effect or do harm on this device."""
    compiled = resolved(config, device=device).compile == "yes"
    off = f"where precision.compile is {config.compile} and the device {device}"
    require(compiled or config.compile_mode == "default", "precision.compile_mode", config.compile_mode, f"'default' {off}")
    anything = compiled or device.type == "cuda"
    require(anything or not config.compile_cache, "precision.compile_cache", config.compile_cache, f"'' {off}")
    if config.compile_mode == "reduce-overhead" and device.type != "cuda":
        raise UserError(f"precision.compile_mode = 'reduce-overhead': means CUDA graphs, and the device is {device}; use default")
    if config.compile_mode == "reduce-overhead" and accumulate > 1:
        # The second forward pass would overwrite what the first one's backward and the monitor still read (pytorch issue 169545).
        raise UserError(
            f"precision.compile_mode = 'reduce-overhead': CUDA graphs keep the outputs of one forward pass, and rank_batch makes {accumulate} a step; "
            "use default, or a larger rank_batch"
        )


def _compile(module: nn.Module | None, config: PrecisionConfig, *, device: torch.device) -> None:
    """Prepares the compiler for the augmentation, and compiles the module's forward pass and loss, if given, as one graph with fixed shapes.

    Everything stays eager on every rank if one of them cannot compile. Every rank must call it.
    """
    if not config.compile_cache:
        give_inductor_a_cache()
    elif reason := why_not_writable(path := Path(config.compile_cache).resolve()):
        raise UserError(f"precision.compile_cache = {config.compile_cache!r}: cannot be made or written ({reason}); choose another folder")
    else:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path)
    set_up_inductor()
    # One decision for all ranks: a single rank in eager mode would slow down all others in every step, and only rank 0's warning is shown.
    reasons = gather_everywhere(why_nothing_compiles(device))
    if failed := [(rank, reason) for rank, reason in enumerate(reasons) if reason]:
        rank, reason = failed[0]
        where = "on this machine" if len(reasons) == 1 else f"on {len(failed)} of {len(reasons)} ranks"
        why = reason if len(reasons) == 1 else f"rank {rank}: {reason}"
        log.warning("precision.compile: nothing compiles %s (%s); the run goes on in eager mode", where, why)
        return
    what = "the step" if module is not None else "the augmentation"
    log.info("the first step compiles %s and takes a minute or more; later starts find the code in its cache", what)
    if module is not None:
        # fullgraph: a graph break is an error, not a silent slow-down. dynamic=False: all batches have one shape, and code for variable
        # shapes is slower. Inside DDP the graph is split at its buckets all the same (torch's default, `optimize_ddp`), so that gradients are
        # sent while the rest of the backward pass runs.
        # torch's own max-autotune means CUDA graphs too; ours does not, so that it works with micro-batches.
        mode = "max-autotune-no-cudagraphs" if config.compile_mode == "max-autotune" else config.compile_mode
        module.compile(fullgraph=True, dynamic=False, mode=mode)


def set_up_inductor() -> None:
    """Gives Inductor's compile workers this process's share of the cores, and its kernels a launcher that lets other threads run.

    TORCHINDUCTOR_COMPILE_THREADS and TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER count where they are set.
    """
    import torch._inductor.config as inductor

    # Inductor's static launcher holds Python's interpreter lock while a launch waits for a full queue: the decoding threads would stop, and on a
    # device that hangs the hang watch and the signals too. Triton's own launcher releases it.
    if "TORCHINDUCTOR_USE_STATIC_CUDA_LAUNCHER" not in os.environ:
        inductor.use_static_cuda_launcher = False
    # Inductor's own choice is one for each usable core and at most 32, in every process: 256 on a machine with eight GPUs.
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        inductor.compile_threads = min(MOST_COMPILE_THREADS, default_workers())


def is_compiled(module: nn.Module) -> bool:
    """Returns True if `prepare_model` was asked to compile the module and could."""
    return module._compiled_call_impl is not None


def compiles_augmentation(device: torch.device) -> bool:
    """Returns True if the augmentation on this device is compiled: on every GPU where anything compiles, whatever precision.compile is."""
    # Eager, it reads and writes 741 MB an image in a thousand launches; compiled, it is a few kernels.
    return device.type == "cuda" and _nothing_compiles(device) is None


@functools.cache
def _nothing_compiles(device: torch.device) -> str | None:
    return why_nothing_compiles(device)


def why_nothing_compiles(device: torch.device) -> str | None:
    """Returns why nothing compiles on this device (no C++ compiler, no Triton), or None; it tries a sum of two numbers."""
    try:
        torch.compile(torch.add, dynamic=False)(torch.ones(2, device=device), 1.0)
    except Exception as error:  # torch has a different exception class for each missing part
        return first_line(error, limit=300)
    return None


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # malloc.h
_LARGEST, _LARGE_BLOCK = 2**31 - 1, 8 << 20


def keep_freed_memory() -> None:
    """Keeps freed memory for the next step; the process never shrinks again. No effect with a C library other than glibc."""
    # glibc returns large blocks to the system, and the next step then pays for fresh pages: zeroed ones, one fault each.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _LARGEST)


def return_large_blocks() -> None:
    """Returns freed blocks of 8 MiB and more to the system at once. No effect with a C library other than glibc."""
    # By itself glibc raises this limit to 32 MiB, the size of many activations, which then leave gaps between what is in use.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE_BLOCK)
        mallopt(_TRIM_THRESHOLD, _LARGEST)
