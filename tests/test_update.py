"""One training step's update: every way that optim.update names, every optimizer, and steps that a gradient scaler leaves out."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastbyol.config.errors import UserError
from fastbyol.config.schema import UPDATES, TrainConfig
from fastbyol.monitors import build_monitor
from fastbyol.optim import ema, multi_tensor
from fastbyol.optim.ema import check_update
from fastbyol.ranks.process_group import Process
from fastbyol.run.command_line import parse_train_config
from fastbyol.run.state import TrainState
from fastbyol.train import build, train_step
from tests.commands import SMALL_RUN

CPU = torch.device("cpu")
PROCESS = Process(rank=0, world_size=1, device=CPU)
SMALL = (*SMALL_RUN, "--precision.autocast", "off")


def started(beton: Path, *options: str) -> tuple[TrainConfig, TrainState]:
    """A run before its first step; its loader is closed, for the steps take `steps`' own batch."""
    config = parse_train_config([*SMALL, "--data.train", str(beton), *options], usage="")
    state = build(config, PROCESS)
    state.loader.close()
    return config, state


@pytest.fixture(scope="module")
def batch(beton: Path):
    config = parse_train_config([*SMALL, "--data.train", str(beton)], usage="")
    with build(config, PROCESS).loader as loader:
        return next(iter(loader))


def step(config: TrainConfig, state: TrainState, batch) -> None:
    train_step(config, PROCESS, state, itertools.repeat(batch), build_monitor(config, PROCESS), lr=0.1, tau=0.9)


def parameters(state: TrainState) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in state.byol.named_parameters()}


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "timm_lamb", "torch_optimizer_lars"])
def test_neither_network_moves_in_a_step_whose_gradient_overflows_and_both_do_in_the_next(name: str, beton: Path, batch) -> None:
    config, state = started(beton, "--optim.name", name)
    with torch.no_grad():
        for target, online in zip(state.byol.target.encoder.parameters(), state.byol.online.encoder.parameters(), strict=True):
            target.copy_(online + 1)  # a target that equals the online network would stay where it is whether it is moved or not
    state.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # type: ignore[attr-defined]
    before = parameters(state)
    overflow = state.byol.online.encoder.conv1.weight.register_hook(lambda gradient: gradient * math.inf)
    step(config, state, batch)
    overflow.remove()
    assert state.scaler.get_scale() == 4.0, "the scaler has seen the overflow"
    assert all(torch.equal(value, before[key]) for key, value in parameters(state).items())
    assert not any(isinstance(value, Tensor) for kept in state.optimizer.state_dict()["state"].values() for value in kept.values())
    step(config, state, batch)
    after = parameters(state)
    assert state.scaler.get_scale() == 4.0
    assert not torch.equal(after["online.encoder.conv1.weight"], before["online.encoder.conv1.weight"])
    expected = 0.9 * before["target.encoder.conv1.weight"] + 0.1 * after["online.encoder.conv1.weight"]
    torch.testing.assert_close(after["target.encoder.conv1.weight"], expected, rtol=1e-6, atol=1e-6)


class Seen:
    """How many of the target's tensors each way has moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, targets: set[int]) -> None:
        self.moved = dict.fromkeys(("kernel", "foreach", "triton", "apex"), 0)
        kernel, foreach, triton = multi_tensor._apply_in_blocks, torch._foreach_lerp_, ema._triton_lerp_

        def in_blocks(update: multi_tensor.Update, followers: list[Tensor | None], weight: float) -> None:
            self.moved["kernel"] += sum(follower is not None for follower in followers)
            kernel(update, followers, weight)

        def foreach_lerp_(target: Sequence[Tensor], online: Sequence[Tensor], weight: float) -> None:
            self.moved["foreach"] += len({id(t) for t in target} & targets)
            foreach(target, online, weight)

        def triton_lerp_(target: list[Tensor], online: list[Tensor], weight: float | Tensor) -> None:
            self.moved["triton"] += len(target)
            triton(target, online, weight)

        def axpby(chunk: int, overflow: Tensor, lists: list[list[Tensor]], a: float, b: float, checked: int) -> None:
            """Does what multi_tensor_axpby.cu of apex does: out = a x + b y."""
            self.moved["apex"] += len(lists[0])
            for x, y, out in zip(*lists, strict=True):
                out.copy_(a * x + b * y)

        monkeypatch.setattr(multi_tensor, "_apply_in_blocks", in_blocks)
        monkeypatch.setattr(torch, "_foreach_lerp_", foreach_lerp_)
        monkeypatch.setattr(ema, "_triton_lerp_", triton_lerp_)
        monkeypatch.setitem(sys.modules, "amp_C", SimpleNamespace(multi_tensor_axpby=axpby))


@pytest.mark.usefixtures("triton_imported_anew")
@pytest.mark.parametrize("name", ["lars", "sgd"])
def test_each_way_to_update_is_the_one_that_moves_the_target_and_all_agree_to_rounding(
    name: str, beton: Path, batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("fastbyol.train.check_update", lambda backend, device: None)  # apex is a stand-in here
    results = {}
    for update in UPDATES:
        config, state = started(beton, "--optim.name", name, "--optim.update", update)
        targets = list(state.byol.target.parameters())
        with monkeypatch.context() as counting:
            seen = Seen(counting, {id(target) for target in targets})
            step(config, state, batch)
        weights = sum(target.ndim > 1 for target in targets)
        ours = {"kernel": weights, "foreach": len(targets) - weights} if (name, update) == ("lars", "auto") else {}
        assert {way: num for way, num in seen.moved.items() if num} == (ours or {"foreach" if update == "auto" else update: len(targets)})
        results[update] = parameters(state)
    for update, values in results.items():
        for key, value in values.items():
            torch.testing.assert_close(value, results["auto"][key], rtol=2e-6, atol=2e-6, msg=f"{update}: {key}")


def test_a_copy_of_an_optimizer_with_a_target_update_steps_itself_and_not_the_original(beton: Path, batch) -> None:
    _, state = started(beton, "--optim.name", "adamw")
    before = parameters(state)
    copied = copy.deepcopy(state.optimizer)
    for group in copied.param_groups:
        group["lr"] = 0.1
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    copied.step()
    assert all(torch.equal(value, before[key]) for key, value in parameters(state).items())
    assert copied.state_dict()["state"]
    assert not state.optimizer.state_dict()["state"]


@pytest.mark.usefixtures("triton_imported_anew")
def test_a_way_to_update_that_does_not_work_here_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    check_update("auto", CPU)
    check_update("foreach", CPU)
    with pytest.raises(UserError, match="optim.update = 'triton': the tensors are on cpu; it needs CUDA, or take 'foreach'"):
        check_update("triton", CPU)
    with pytest.raises(UserError, match="optim.update = 'apex': needs a GPU, and the device is cpu; take auto"):
        check_update("apex", CPU)
    with pytest.raises(UserError, match="optim.update = 'amp': must be one of auto, foreach, triton, apex"):
        check_update("amp", CPU)

    def fail(*_: object) -> None:
        raise RuntimeError("no C compiler\nand more")

    monkeypatch.setattr(ema, "_triton_lerp_", fail)
    with pytest.raises(UserError, match=r"'triton': does not work on cpu \(no C compiler\); take auto"):
        check_update("triton", CPU)
    monkeypatch.setattr(ema, "_triton_lerp_", lambda *_: None)
    with pytest.raises(UserError, match="'triton': computes a wrong average on cpu; take auto"):
        check_update("triton", CPU)
