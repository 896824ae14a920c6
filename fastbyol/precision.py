"""Numbers and memory layout of the step: autocast, gradient scaler, channels-last, compile."""

from __future__ import annotations

import contextlib
import logging

import torch
from torch import nn

from fastbyol.config.errors import UserError
from fastbyol.config.schema import PrecisionConfig

log = logging.getLogger("fastbyol")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(config: PrecisionConfig, *, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """The context of the forward; parameters and the target stay float32."""
    if config.autocast == "off":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[config.autocast])


def build_scaler(config: PrecisionConfig, *, device: torch.device) -> torch.amp.GradScaler:  # type: ignore[name-defined]
    """A gradient scaler, active for fp16 only. Unscale before LARS: BN and bias updates are not invariant to the scale."""
    if config.autocast == "fp16" and device.type == "cpu":
        raise UserError("precision.autocast = 'fp16': needs a GPU; use bf16 (the default) or off")
    return torch.amp.GradScaler(device.type, enabled=config.autocast == "fp16")  # type: ignore[attr-defined]


def prepare_model(module: nn.Module, config: PrecisionConfig, *, device: torch.device) -> nn.Module:
    """The module on its device, in the chosen memory layout, compiled in place where asked (before DDP wraps it: then the graph is one)."""
    module = module.to(device)
    if config.channels_last:
        module = module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.compile:
        module.compile(dynamic=False)
    return module
