"""Checks that values read from a file have the structure of those this program writes, so that nothing else reaches a kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastbyol.config.errors import shown


def first_difference(saved: object, own: object, where: str, *, missing_allowed: bool = False) -> str | None:
    """Returns where saved values first differ in structure from the program's own, or None if they agree.

    They agree if dicts have the same keys (or, in the outermost one with `missing_allowed`, some of them), lists the same length, tensors
    the same shape and dtype, and numbers are finite (an integer may stand for a float, None for anything).
    """
    if isinstance(own, Tensor):
        if wrong := tensor_difference(saved, own, where):
            return wrong
        # Kernels read the raw memory, so elements must not overlap, nor only be marked as negated or conjugated.
        each_once = isinstance(saved, Tensor) and is_dense(saved) and not saved.is_neg() and not saved.is_conj()
        return None if each_once else f"{where} does not hold each of its elements once"
    if isinstance(own, dict):
        if not isinstance(saved, dict):
            return f"{where} is {shown(saved)}, must be a dict"
        if missing := [key for key in own if key not in saved and not missing_allowed]:
            return f"{where} lacks {shown(missing[0])}"
        if unknown := [key for key in saved if key not in own]:
            return f"{where} has {shown(unknown[0])}, which is unknown here"
        pairs = [(f"{where}.{key}", saved[key], own[key]) for key in saved]
    elif isinstance(own, list | tuple):
        if not isinstance(saved, list | tuple) or len(saved) != len(own):
            return f"{where} is {shown(saved)}, must hold {len(own)} values"
        pairs = [(f"{where}.{i}", value, mine) for i, (value, mine) in enumerate(zip(saved, own, strict=True))]
    else:
        return None if saved is None or own is None or _same_kind(saved, own) else f"{where} is {shown(saved)}, must be like {shown(own)}"
    # Only as deep as the program's own values: the saved ones may be nested, or contain themselves, without end.
    return next((found for name, value, mine in pairs if (found := first_difference(value, mine, name))), None)


def tensor_difference(saved: object, own: Tensor, where: str, *, any_float: bool = False) -> str | None:
    """Returns why a value from a file cannot replace this tensor (with any floating-point dtype if `any_float`), or None if it can."""
    if not isinstance(saved, Tensor):
        return f"{where} is {shown(saved)}, must be a tensor"
    if saved.layout != torch.strided or saved.is_meta or saved.is_quantized:
        return f"{where} is a {'meta' if saved.is_meta else saved.layout} tensor, must be a plain one"
    if saved.shape != own.shape:
        return f"{where} is {tuple(saved.shape)}, must be {tuple(own.shape)}"
    if saved.dtype != own.dtype and not (any_float and saved.is_floating_point() and own.is_floating_point()):
        return f"{where} is {saved.dtype}, must be {own.dtype}"
    return None


def is_count(value: object) -> bool:
    """Returns True if a value from a file is a plausible count: a non-negative integer and not a bool."""
    # Below 2^53, up to which float64, and so JSON in other programs, is exact.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def is_dense(tensor: Tensor) -> bool:
    """Returns True if the elements fill their part of memory without gaps or overlaps, in any order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _same_kind(saved: object, own: object) -> bool:
    if isinstance(own, bool) or not isinstance(own, int | float):
        return type(saved) is type(own)
    if isinstance(saved, bool) or not isinstance(saved, int if isinstance(own, int) else int | float):
        return False
    return isinstance(saved, int) or math.isfinite(saved)
