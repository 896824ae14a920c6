"""Checks an optimizer's state from a file against what the optimizer itself keeps after a step, before any kernel reads it."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastbyol.config.errors import shown
from fastbyol.host.saved_structure import first_difference


def state_difference(optimizer: Optimizer, saved: object) -> str | None:
    """Returns why `saved` cannot be a state of this optimizer, or None if it can. The optimizer stays as it is."""
    # A copy takes one step, which shows for every optimizer what buffers it keeps, and of what shapes.
    one = _after_a_step(optimizer)
    own = one.state_dict()
    if not isinstance(saved, dict) or not isinstance(saved.get("state"), dict):
        return f"optimizer is {shown(saved)}, must hold state and param_groups"
    groups = _with_flags(saved.get("param_groups"), own["param_groups"])
    if wrong := first_difference(groups, own["param_groups"], "optimizer.param_groups"):
        return wrong
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own["param_groups"]]:
        return "optimizer.param_groups has the parameters in another order"
    if own["state"] and not saved["state"]:
        return "optimizer.state is empty"
    params = dict(zip((i for group in own["param_groups"] for i in group["params"]), _params(optimizer), strict=True))
    for index, kept in saved["state"].items():
        where = f"optimizer.state.{shown(index)}"
        if index not in own["state"] or not isinstance(kept, dict):
            return f"{where} belongs to no parameter"
        # A buffer that appears only after some steps is missing in the copy.
        later = {
            name: params[index] if isinstance(value, Tensor) else value for name, value in kept.items() if name not in own["state"][index]
        }
        if wrong := first_difference(kept, own["state"][index] | later, where):
            return wrong
        for name, value in kept.items():  # a scalar tensor counts steps
            if isinstance(value, Tensor) and not value.ndim and not (math.isfinite(value) and value >= 0):
                return f"{where}.{name} is {shown(float(value))}, must be finite and not negative"
    try:
        one.load_state_dict(saved)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        return f"optimizer: {error}"
    return None


def load_optimizer_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Takes over the buffers and counters of a state that has no `state_difference`; rates and switches stay as the config has them."""
    # torch's own loader would also take over the saved groups' options.
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update(options)


def _with_flags(saved: Any, own: list[dict[str, Any]]) -> Any:
    """Returns the saved groups with the flags added that an older version of the library did not have; its own loader fills them in too."""
    if not isinstance(saved, list) or len(saved) != len(own):
        return saved
    flags = [{name: value for name, value in group.items() if value is None or isinstance(value, bool)} for group in own]
    return [before | group if isinstance(group, dict) else group for before, group in zip(flags, saved, strict=True)]


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _after_a_step(optimizer: Optimizer) -> Optimizer:
    one = copy.deepcopy(optimizer)
    for param in _params(one):
        param.grad = torch.ones_like(param)
    # An optimizer may draw numbers, and a resumed run must draw the same ones as without this check.
    with torch.random.fork_rng(devices={param.device for param in _params(one) if param.device.type == "cuda"}):
        one.step()
    return one
