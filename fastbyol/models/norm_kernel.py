"""Batch norm, addition of a shortcut and ReLU in as few passes over memory as possible: loops over rows of channels (CPU).

The forward pass reads memory once for the statistics and once for the output. The backward pass masks and sums the gradient, then
computes the gradient of the input. torch has a separate operation, and so at least one pass, for each of these steps. Rows are
float32, or the bits of bfloat16 in uint16, since numba has no bfloat16; arithmetic is in float32, sums over many rows are in float64.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba import extending, types
from numpy.typing import NDArray

from fastbyol.host.compile_cache import njit

Rows = NDArray[np.uint16] | NDArray[np.float32]
"""Array of (rows, channels), C-contiguous."""
F32, F64 = NDArray[np.float32], NDArray[np.float64]
_RUN = 256  # rows summed in float32 before they join a float64 sum
_FAST = {"reassoc", "contract"}  # without 'nnan', which would let the compiler assume that there is no NaN
_ZERO = np.float32(0)  # comparing with a plain 0 would convert to float64
_I32 = ir.IntType(32)


@cast(Any, extending.intrinsic)  # callers leave out the first argument, the typing context
def _wide(typing: Any, value: Any):
    """Converts a stored value to float32."""
    if value == types.float32:
        return types.float32(value), lambda context, builder, signature, values: values[0]

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        # bfloat16 is the upper half of a float32.
        bits = builder.shl(builder.zext(values[0], _I32), ir.Constant(_I32, 16))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.uint16), generate


@cast(Any, extending.intrinsic)
def _stored(typing: Any, value: Any, like: Any):
    """Converts a float32 to the type of `like`, rounded to nearest, ties to even."""
    if like == types.float32:
        return types.float32(types.float32, like), lambda context, builder, signature, values: values[0]

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        bits = builder.bitcast(values[0], _I32)
        # Adding 0x7FFF plus the lowest kept bit, then cutting off 16 bits, rounds to nearest with ties to even.
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.add(builder.add(bits, odd), ir.Constant(_I32, 0x7FFF))
        return builder.trunc(builder.lshr(rounded, ir.Constant(_I32, 16)), ir.IntType(16))

    return types.uint16(types.float32, types.uint16), generate


@njit(fastmath=_FAST, nogil=True)
def _add_rows(x: Any, r: int, shift: F32, total: F32, square: F32) -> None:
    """Adds four rows at a time, so the sums are read and written only a quarter as often."""
    x0, x1, x2, x3 = x[r], x[r + 1], x[r + 2], x[r + 3]
    for c in range(total.size):
        d0, d1, d2, d3 = _wide(x0[c]) - shift[c], _wide(x1[c]) - shift[c], _wide(x2[c]) - shift[c], _wide(x3[c]) - shift[c]
        total[c] += (d0 + d1) + (d2 + d3)
        square[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)


@njit(fastmath=_FAST, nogil=True)
def _add_row(x: Any, shift: F32, total: F32, square: F32) -> None:
    for c in range(total.size):
        d = _wide(x[c]) - shift[c]
        total[c] += d
        square[c] += d * d


@njit(cache=True, nogil=True)
def moments(x: Any, shift: F32) -> F64:
    """Returns the sums over all rows of x - shift and of its square, (2, channels)."""
    sums, run = np.zeros((2, shift.size)), np.empty((2, shift.size), np.float32)
    for start in range(0, len(x), _RUN):
        run[:] = 0
        end = min(start + _RUN, len(x))
        whole = end - (end - start) % 4
        for r in range(start, whole, 4):
            _add_rows(x, r, shift, run[0], run[1])
        for r in range(whole, end):
            _add_row(x[r], shift, run[0], run[1])
        sums += run
    return sums


@njit(fastmath=_FAST, nogil=True)
def _normalise_row(x: Any, out: Any, scale: F32, offset: F32, floor: np.float32) -> None:
    for c in range(out.size):
        y = scale[c] * _wide(x[c]) + offset[c]
        out[c] = _stored(floor if y < floor else y, x[c])


@njit(cache=True, nogil=True)
def normalise(x: Any, out: Any, scale: F32, offset: F32, floor: np.float32) -> None:
    """Computes out = max(scale * x + offset, floor); a floor of 0 is a ReLU."""
    for r in range(len(x)):
        _normalise_row(x[r], out[r], scale, offset, floor)


@njit(fastmath=_FAST, nogil=True)
def _normalise_add_row(x: Any, shortcut: Any, out: Any, scale: F32, offset: F32, floor: np.float32) -> None:
    for c in range(out.size):
        y = scale[c] * _wide(x[c]) + offset[c] + _wide(shortcut[c])
        out[c] = _stored(floor if y < floor else y, x[c])


@njit(cache=True, nogil=True)
def normalise_add(x: Any, shortcut: Any, out: Any, scale: F32, offset: F32, floor: np.float32) -> None:
    """Computes out = max(scale * x + offset + shortcut, floor)."""
    for r in range(len(x)):
        _normalise_add_row(x[r], shortcut[r], out[r], scale, offset, floor)


@njit(fastmath=_FAST, nogil=True)
def _mask_row(gradient: Any, y: Any, x: Any, masked: Any, mean: F32, total: F32, product: F32) -> None:
    for c in range(total.size):
        g = _ZERO if _wide(y[c]) <= _ZERO else _wide(gradient[c])
        masked[c] = _stored(g, gradient[c])
        total[c] += g
        product[c] += g * (_wide(x[c]) - mean[c])


@njit(cache=True, nogil=True)
def mask_gradient(gradient: Any, y: Any, x: Any, masked: Any, mean: F32) -> F64:
    """Sets masked = gradient where y > 0, else 0; returns its sums over all rows, alone and times x - mean, (2, channels)."""
    sums, run = np.zeros((2, mean.size)), np.empty((2, mean.size), np.float32)
    for start in range(0, len(x), _RUN):
        run[:] = 0
        for r in range(start, min(start + _RUN, len(x))):
            _mask_row(gradient[r], y[r], x[r], masked[r], mean, run[0], run[1])
        sums += run
    return sums


@njit(fastmath=_FAST, nogil=True)
def _add_gradient_row(gradient: Any, x: Any, mean: F32, total: F32, product: F32) -> None:
    for c in range(total.size):
        g = _wide(gradient[c])
        total[c] += g
        product[c] += g * (_wide(x[c]) - mean[c])


@njit(cache=True, nogil=True)
def gradient_sums(gradient: Any, x: Any, mean: F32) -> F64:
    """Returns the gradient's sums over all rows, alone and times x - mean, (2, channels): `mask_gradient` without a ReLU."""
    sums, run = np.zeros((2, mean.size)), np.empty((2, mean.size), np.float32)
    for start in range(0, len(x), _RUN):
        run[:] = 0
        for r in range(start, min(start + _RUN, len(x))):
            _add_gradient_row(gradient[r], x[r], mean, run[0], run[1])
        sums += run
    return sums


@njit(fastmath=_FAST, nogil=True)
def _input_gradient_row(masked: Any, x: Any, out: Any, a: F32, b: F32, c: F32) -> None:
    for i in range(out.size):
        out[i] = _stored(a[i] * _wide(masked[i]) + b[i] * _wide(x[i]) + c[i], x[i])


@njit(cache=True, nogil=True)
def input_gradient(masked: Any, x: Any, out: Any, a: F32, b: F32, c: F32) -> None:
    """Computes out = a * masked + b * x + c. Not in place: two names for one array would keep the compiler from vectorising."""
    for r in range(len(x)):
        _input_gradient_row(masked[r], x[r], out[r], a, b, c)
