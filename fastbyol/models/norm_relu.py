"""relu(norm(x) + shortcut), which ends every convolution of a ResNet, in as few passes over memory as possible.

These operations do little arithmetic, so memory bandwidth limits them. In training on a CPU they are one operation, `cpu_norm.py`, for
statistics per view, channels-last, in bfloat16 or float32. Everywhere else they are separate operations, which Inductor fuses if the
step is compiled.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastbyol.models.cpu_norm import fits_cpu, normalise_on_cpu
from fastbyol.models.view_batchnorm import ViewBatchNorm


def norm_relu(norm: nn.Module, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """Returns relu(norm(x) + shortcut) and updates the norm's running statistics, as calling a batch norm of any kind would.

    x: (N, C, H, W); in training with a `ViewBatchNorm`, (views * N, C, H, W), one view after the other.
    """
    if isinstance(norm, ViewBatchNorm) and fits_cpu(norm, x, shortcut, views=norm.views, across_ranks=norm.sees_other_ranks):
        shared = {"across_ranks": norm.sees_other_ranks, "group": norm.group}
        result = normalise_on_cpu(norm, x, shortcut, views=norm.views, relu=True, **shared)
        norm.update_running(result)
        return result.output
    output = norm(x)
    return F.relu(output if shortcut is None else output + shortcut, inplace=True)
