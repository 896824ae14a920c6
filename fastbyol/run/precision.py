"""Number formats and memory layout of the step: autocast, gradient scaler, channels-last, torch.compile."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from pathlib import Path

import torch
from torch import nn

from fastbyol.config.errors import UserError, first_line
from fastbyol.config.schema import PrecisionConfig
from fastbyol.host.compile_cache import can_write, give_inductor_a_cache

log = logging.getLogger("fastbyol")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(config: PrecisionConfig, *, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Returns the autocast context for the forward pass; parameters and the target stay float32."""
    if config.autocast not in _DTYPES:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[config.autocast])


def build_scaler(config: PrecisionConfig, *, device: torch.device) -> torch.amp.GradScaler:  # type: ignore[name-defined]
    """Returns a gradient scaler, enabled for fp16 only: the smallest gradients would be 0 in its narrow range."""
    if config.autocast == "fp16" and device.type == "cpu":
        raise UserError("precision.autocast = 'fp16': needs a GPU; use bf16 (the default) or off")
    return torch.amp.GradScaler(device.type, enabled=config.autocast == "fp16")  # type: ignore[attr-defined]


def prepare_model(module: nn.Module, config: PrecisionConfig, *, device: torch.device) -> nn.Module:
    """Moves the module to its device and memory layout, and compiles it in place if the config asks for it; call it before DDP wraps it.

    Sets this process's float32 matrix products to TF32 or to float32; on a CPU, lets the process keep freed memory. Raises UserError for
    tf32 or CUDA graphs without a GPU, and for a cache folder that cannot be written.
    """
    tf32 = config.autocast == "tf32"
    if tf32 and device.type != "cuda":
        raise UserError(f"precision.autocast = 'tf32': a number format of CUDA's tensor cores, and the device is {device}; use bf16 or off")
    # Both are set, for torch's own defaults disagree: TF32 is off in matrix products and on in cuDNN's convolutions.
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    if device.type == "cpu":
        keep_freed_memory()
    module = module.to(device)
    if config.channels_last:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile:
        _compile(module, config, device=device)
    return module


def _compile(module: nn.Module, config: PrecisionConfig, *, device: torch.device) -> None:
    """Compiles the whole forward pass and loss as one graph with fixed shapes; stays eager if this machine cannot compile."""
    if config.compile_mode == "reduce-overhead" and device.type != "cuda":
        raise UserError(f"precision.compile_mode = 'reduce-overhead': means CUDA graphs, and the device is {device}; use default")
    if not config.compile_cache:
        give_inductor_a_cache()
    elif can_write(path := Path(config.compile_cache).resolve()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path)
    else:
        raise UserError(f"precision.compile_cache = {config.compile_cache!r}: cannot be made or written; choose another folder")
    if reason := why_nothing_compiles(device):
        log.warning("precision.compile: nothing compiles on this machine (%s); the run goes on in eager mode", reason)
        return
    # fullgraph: a graph break is an error, not a silent slow-down. dynamic=False: all batches have one shape, and code for variable shapes
    # is slower.
    module.compile(fullgraph=True, dynamic=False, mode=config.compile_mode)


def is_compiled(module: nn.Module) -> bool:
    """Returns True if `prepare_model` was asked to compile the module and could."""
    return module._compiled_call_impl is not None


def why_nothing_compiles(device: torch.device) -> str | None:
    """Returns why nothing compiles on this device (no C++ compiler, no Triton), or None; it tries a sum of two numbers."""
    try:
        torch.compile(torch.add, dynamic=False)(torch.ones(2, device=device), 1.0)
    except Exception as error:  # torch has a different exception class for each missing part
        return first_line(error, limit=300)
    return None


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Keeps freed memory for the next step; the process never shrinks again. No effect with a C library other than glibc."""
    # glibc returns large blocks to the system, and the next step then pays for fresh pages: zeroed ones, one fault each.
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _LARGEST)
