"""Kernels for one tensor's LARS step and target update on a CPU, in float32.

They pass over memory twice, the second time while the end of the first pass is still in cache.

The loops run over slices: LLVM does not vectorise them over `range(start, stop)`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fastbyol.host.compile_cache import njit

F32 = NDArray[np.float32]
_RUN = 8192  # elements summed in float32 before they join a float64 sum


@njit(fastmath={"reassoc", "contract"}, cache=True, nogil=True)
def _squares(w: F32, g: F32, decay: np.float32) -> tuple[np.float32, np.float32]:
    ww, uu = np.float32(0), np.float32(0)
    for i in range(w.size):
        u = g[i] + decay * w[i]
        ww += w[i] * w[i]
        uu += u * u
    return ww, uu


@njit(cache=True, nogil=True)
def trust_ratio(w: F32, g: F32, decay: np.float32, coefficient: float) -> float:
    """Returns coefficient * |w| / |g + decay * w|, or 1 where either norm is 0; w, g (N,) contiguous."""
    ww, uu = 0.0, 0.0
    for start in range(0, w.size, _RUN):
        a, b = _squares(w[start : start + _RUN], g[start : start + _RUN], decay)
        ww += a
        uu += b
    return coefficient * math.sqrt(ww / uu) if ww > 0 and uu > 0 else 1.0


@njit(fastmath={"contract"}, cache=True, nogil=True)
def update(w: F32, g: F32, m: F32, scale: np.float32, decay: np.float32, momentum: np.float32, lr: np.float32) -> None:
    """Sets m = momentum * m + scale * (g + decay * w), then w -= lr * m, in place."""
    for i in range(w.size):
        v = momentum * m[i] + scale * (g[i] + decay * w[i])
        m[i] = v
        w[i] -= lr * v


@njit(fastmath={"contract"}, cache=True, nogil=True)
def update_with_target(
    w: F32, g: F32, m: F32, t: F32, scale: np.float32, decay: np.float32, momentum: np.float32, lr: np.float32, weight: np.float32
) -> None:
    """Does the same, then sets t += weight * (w - t)."""
    for i in range(w.size):
        v = momentum * m[i] + scale * (g[i] + decay * w[i])
        m[i] = v
        x = w[i] - lr * v
        w[i] = x
        t[i] += weight * (x - t[i])
